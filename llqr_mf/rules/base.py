"""What a layer rule is: a call's value, and the three products of its linearisation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

Tangents = Sequence[Tensor | None]
Curvature = Callable[[Tangents], list[Tensor | None]]
"""Second derivative of <p, f>: tangents of the inputs to cotangents of the inputs."""

GRAM_ELEMENTS = 2**26
"""Most elements that per-sample gradients of one small node may take in a Gram matrix."""


@dataclass(frozen=True)
class Slot:
    """An active tensor among a call's arguments: it moves with the controls or the input.

    Args:
        id: The program value it is.
        value: Its value on this batch.
        is_parameter: Whether it is one of the model's own tensors, which may be written to later.
    """

    id: int
    value: Tensor
    is_parameter: bool = False


@dataclass(frozen=True)
class Call:
    """One call met while the program runs on a batch.

    Args:
        function: A function, or a method of `Tensor`.
        args: Positional arguments; active tensors stand as `Slot`.
        kwargs: Keyword arguments, likewise.
        owner: Path of the module it was met in, for messages.
        second_order: Whether `curvature` will be asked for.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    owner: str
    second_order: bool

    @cached_property
    def flat(self) -> bool:
        """Whether no argument is a container; small networks feel what a pytree costs."""
        arguments = (*self.args, *self.kwargs.values())
        return not any(isinstance(value, list | tuple | dict) for value in arguments)

    @cached_property
    def leaves(self) -> list[Any]:
        """All arguments, in order, out of their containers."""
        if self.flat:
            return [*self.args, *self.kwargs.values()]
        return tree_flatten((self.args, dict(self.kwargs)))[0]

    @property
    def slots(self) -> list[Slot]:
        """The active arguments, in order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Slot)]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name; a `Slot` if it is active."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def evaluate(self) -> Any:
        """The call's value."""
        if self.flat:
            kwargs = {name: plain(value) for name, value in self.kwargs.items()}
            return self.function(*map(plain, self.args), **kwargs)
        args, kwargs = tree_map_only(Slot, lambda s: s.value, (self.args, dict(self.kwargs)))
        return self.function(*args, **kwargs)

    def with_values(self, values: Sequence[Tensor]) -> Any:
        """The call's value with the active arguments replaced, in the order of `slots`."""
        replacement = iter(values)
        args, kwargs = tree_map_only(
            Slot, lambda _: next(replacement), (self.args, dict(self.kwargs))
        )
        return self.function(*args, **kwargs)


def plain(value: Any) -> Any:
    """The tensor of a `Slot`; anything else as it is."""
    return value.value if isinstance(value, Slot) else value


class Node(ABC):
    """A linearised call.

    Every tangent and cotangent has a leading axis of k columns. A call has one output unless it
    overrides the plural methods.

    Args:
        result: The call's value.
        inputs: The active inputs, in the order in which `push` and `pull` take them.
    """

    couples_batch: bool | None = None
    """Whether samples interact: False when surely not, None when unknown (it is then probed)."""

    moves: Sequence[bool] | None = None
    """Which floating-point outputs depend on the active inputs; None for all. Others are left out
    of `push_all` and `pull_all`."""

    per_sample = False
    """Whether outputs belong to samples though the batch is read as constants (tokens)."""

    def __init__(self, result: Any, inputs: Sequence[Slot]) -> None:
        self.result = result
        self.inputs = tuple(slot.id for slot in inputs)

    @abstractmethod
    def push(self, tangents: Tangents) -> Tensor:
        """Jacobian times tangents (at least one is not None): (k, *in) to (k, *out)."""

    @abstractmethod
    def pull(
        self, cotangent: Tensor, needed: Sequence[bool], out: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Transposed Jacobian times a cotangent: (k, *out) to (k, *in) per needed input.

        Args:
            cotangent: Of the output.
            needed: Which inputs' cotangents are wanted.
            out: Buffers that may be written to and returned, to save a copy.
        """

    def curvature(self, costate: Tensor) -> Curvature | None:
        """The second derivative of <costate, f>, or None where it vanishes.

        Args:
            costate: p at the output, without a column axis.
        """
        return None

    # ---- several outputs: overridden by nodes that have them

    def push_all(self, tangents: Tangents) -> tuple[Tensor | None, ...]:
        """`push` for every output."""
        return (self.push(tangents),)

    def pull_all(
        self,
        cotangents: Sequence[Tensor | None],
        needed: Sequence[bool],
        out: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """`pull` from every output."""
        (cotangent,) = cotangents
        return [None] * len(needed) if cotangent is None else self.pull(cotangent, needed, out)

    def curvature_all(self, costates: Sequence[Tensor | None]) -> Curvature | None:
        """`curvature` from every output."""
        (costate,) = costates
        return None if costate is None else self.curvature(costate)

    # ---- the dual's Gram matrix

    def gram(self, deltas: Tensor, index: int) -> Tensor | None:
        """Gram matrix of per-sample gradients in one input, or None if it would be too large.

        Args:
            deltas: Cotangents of the output, shape (r, N, ...): row j holds, for every sample,
                its own j-th cotangent. Valid only where samples do not interact.
            index: Which input.

        Returns:
            Tensor (r N, r N), index j N + n.
        """
        r, n = deltas.shape[:2]
        flat = deltas.reshape(r * n, *deltas.shape[2:])
        needed = [i == index for i in range(len(self.inputs))]
        rows: list[Tensor] = []
        chunk = 64
        for start in range(0, r * n, chunk):
            picked = torch.arange(start, min(start + chunk, r * n), device=deltas.device)
            alone = deltas.new_zeros(len(picked), n, *deltas.shape[2:])
            alone[torch.arange(len(picked), device=deltas.device), picked % n] = flat[picked]
            gradient = self.pull_all([alone], needed, [None] * len(needed))[index]
            if gradient is None:
                return deltas.new_zeros(r * n, r * n)
            if gradient[0].numel() * r * n > GRAM_ELEMENTS:
                return None
            rows.append(gradient.reshape(len(picked), -1))
        whole = torch.cat(rows)
        return whole @ whole.mT


Rule = Callable[[Call], Node | None]
"""Linearises a call, or returns None to leave it to the generic rule."""

RULES: dict[Any, Rule] = {}


def register(*functions: Any) -> Callable[[Rule], Rule]:
    """Registers a rule for functions, and for methods of `Tensor` by name."""

    def decorate(rule: Rule) -> Rule:
        for function in functions:
            RULES[getattr(Tensor, function) if isinstance(function, str) else function] = rule
        return rule

    return decorate


def align(tangent: Tensor, ndim: int) -> Tensor:
    """A tangent (k, *shape) with ones after k, so that it broadcasts against (k, *out)."""
    missing = ndim - (tangent.ndim - 1)
    return tangent.reshape(len(tangent), *(1,) * missing, *tangent.shape[1:])


def reduce_to(cotangent: Tensor, shape: Sequence[int]) -> Tensor:
    """The transpose of broadcasting `shape` to the cotangent's shape, column by column."""
    extra = cotangent.ndim - 1 - len(shape)
    if extra:
        cotangent = cotangent.flatten(1, extra).sum(1) if extra > 1 else cotangent.sum(1)
    dims = [i + 1 for i, size in enumerate(shape) if size == 1 and cotangent.shape[i + 1] != 1]
    return cotangent.sum(dims, keepdim=True) if dims else cotangent
