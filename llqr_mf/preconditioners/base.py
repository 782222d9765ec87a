"""What a structured inverse preconditioner is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from linear_operator import LinearOperator
from torch import Tensor

from ..operators.base import MatrixFreeOperator
from .blueprint import Blueprint, Like
from .chart import Chart
from .saved import check_tensor

Parts: TypeAlias = dict[str, Tensor]
"""Rows by parameter name: each (k, *shape)."""

VERSION = 1
"""Of what `Structure.state_dict` returns."""

S = TypeVar("S", bound="Structure")


class Structure(MatrixFreeOperator):
    """M, a symmetric positive-definite approximation of H^{-1}; shape (P, P), block diagonal.

    The step of a gradient g is -M g. A structure holds plain tensors under names that begin with
    the parameter's, and they are the only thing about it that changes: `fit` writes them through
    the structure's charts, an optimizer averages them with `blend_`, a checkpoint stores them.

    Args:
        like: What it is made for: a problem, a model, or tensors by name.
    """

    symmetric = True
    kind: ClassVar[str]

    def __init__(self, like: Like) -> None:
        self.blueprint = Blueprint.of(like)
        self.layout = self.blueprint.layout
        super().__init__(self.blueprint.proto)
        self.tensors: dict[str, Tensor] = {}

    @abstractmethod
    def times_parts(self, parts: Mapping[str, Tensor]) -> Parts:
        """M times rows given by parameter name, each (k, *shape), in the dtype of M."""

    @abstractmethod
    def inverse(self) -> Structure:
        """M^{-1}; shape (P, P). A snapshot: it does not follow later changes of M."""

    def root(self) -> LinearOperator:
        """F with F F' = M; shape (P, P), symmetric or not. A snapshot, as `inverse`.

        Raises:
            NotImplementedError: None is known for this kind.
        """
        raise NotImplementedError(f"no root of a {type(self).__name__} is known.")

    @abstractmethod
    def logdet(self) -> Tensor:
        """The log-determinant of M, a float64 scalar."""

    @abstractmethod
    def scale_(self, c: float) -> None:
        """M becomes c M, c > 0."""

    @abstractmethod
    def blend_(self: S, other: S, weight: float) -> None:
        """M becomes about (1 - weight) M + weight other, other of the same kind and layout.

        A structure that is no linear space says how it averages.
        """

    def charts(self) -> Sequence[Chart]:
        """Coordinates in which M is linear, for `fit`; one after another, in turn. None: fixed."""
        return ()

    def precondition(self, parts: Mapping[str, Tensor]) -> Parts:
        """M times rows of any float dtype, each (k, *shape); the result in the dtype given.

        The product itself runs in the dtype of M, float32 at least: the optimizer's way in.

        Raises:
            ValueError: A parameter of the layout is missing, or one is given that is not in it.
        """
        if set(parts) != set(self.layout.names):
            names = sorted(set(parts) ^ set(self.layout.names))
            raise ValueError(
                f"M acts on all parameters of its layout at once and {names[:4]} differ: give "
                "zeros for a parameter without a gradient."
            )
        out = self.times_parts({name: part.to(self.dtype) for name, part in parts.items()})
        return {name: out[name].to(part.dtype) for name, part in parts.items()}

    # ---- as an operator

    def _sizes(self) -> tuple[int, int]:
        size = sum(self.layout.sizes)
        return size, size

    def _rows(self, v: Tensor) -> Tensor:
        return self.join(self.times_parts(self.split(v)), v)

    def split(self, v: Tensor) -> Parts:
        """Rows (k, P) by parameter name (views)."""
        return self.layout.split_rows(v)

    def join(self, parts: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Rows (k, P) of rows by parameter name."""
        sizes = zip(self.layout.names, self.layout.sizes, strict=True)
        return torch.cat([parts[name].reshape(len(like), n) for name, n in sizes], dim=1)

    def clone(self: S) -> S:
        """An independent copy."""
        other = self._bare()
        other.tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return other

    def detach(self: S) -> S:
        """Itself: its tensors carry no graph."""
        return self

    def assign_(self: S, other: S) -> None:
        """Takes over the values of another of the same kind and layout."""
        self.check_alike(other)
        for name, tensor in other.tensors.items():
            self.tensors[name].copy_(tensor)

    def _bare(self: S) -> S:
        """The same options on the same blueprint, tensors shared."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.__dict__.pop("_memoize_cache", None)  # linear_operator's, of another state
        return other

    def representation_tree(self) -> Any:
        """Rebuilds nothing: linear_operator's sums and products multiply by M itself."""
        return lambda *_: self

    # ---- checks before anything changes

    def check_alike(self, other: Structure) -> None:
        """Whether another has the same kind and tensors of the same names and shapes.

        Raises:
            ValueError: It has not.
        """
        if other.kind != self.kind or other.layout != self.layout:
            raise ValueError(
                f"'other' is a '{other.kind}' structure and this one is '{self.kind}', or their "
                "layouts differ: make both with the same class, options and parameters."
            )
        shapes = {name: t.shape for name, t in other.tensors.items()}
        if shapes != {name: t.shape for name, t in self.tensors.items()}:
            raise ValueError("'other' was made with other options: its tensors differ in shape.")

    def check_blend(self, other: Structure, weight: float) -> None:
        """`check_alike`, and 0 <= weight <= 1, outside of which a mean may be indefinite."""
        self.check_alike(other)
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be from 0 to 1 and is {weight}.")

    @staticmethod
    def check_scale(c: float) -> None:
        """Whether c M is positive definite."""
        if not 0 < c < float("inf"):
            raise ValueError(f"c must be positive and finite, and is {c}.")

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors by name, safe for `torch.load(weights_only=True)`."""
        return {"version": VERSION, "kind": self.kind, "tensors": dict(self.tensors)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`, in place and without casting anything down.

        Raises:
            ValueError: See `check_state`; nothing has been changed then.
        """
        self.check_state(state)
        for name, tensor in self.tensors.items():
            tensor.copy_(state["tensors"][name])

    @torch.no_grad()
    def check_state(self, state: Mapping[str, Any]) -> None:
        """Whether `load_state_dict` can restore a state.

        Raises:
            ValueError: It is of another version or structure, or a tensor of it, which is named,
                is misshapen, of the wrong dtype, not finite, or makes M indefinite.
        """
        if not isinstance(state, Mapping) or state.get("version") != VERSION:
            found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"the state has version {found}, which does not fit: give what state_dict() of a "
                f"structure returned, of version {VERSION}."
            )
        if state.get("kind") != self.kind:
            raise ValueError(
                f"the state is of a '{state.get('kind')}' structure and this one is '{self.kind}'."
            )
        given = state.get("tensors", {})
        if set(given) != set(self.tensors):
            names = sorted(set(given) ^ set(self.tensors))
            raise ValueError(
                f"the state does not fit this structure: {names[:4]} differ. Make the structure "
                "with the options and for the parameters that it was saved with."
            )
        for name, tensor in self.tensors.items():
            check_tensor(name, given[name], tensor)
        self.check_values(given)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        """Whether finite tensors of the names and shapes of this structure make M definite.

        Raises:
            ValueError: One, which is named, does not.
        """

    @property
    def memory_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())
