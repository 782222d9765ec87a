"""What a layer rule is: a call's value, and the three products of its linearisation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from ..errors import Unsaved
from ..solvers.dots import row_dots
from . import gram
from .gram import Deltas, Pulled, Rows, Term

Tangents = Sequence[Tensor | None]
Curvature = Callable[[Tangents], list[Tensor | None]]
"""Second derivative of <p, f>: tangents of the inputs to cotangents of the inputs."""

Scales = Sequence[float | None]
"""A factor for each input of a node that is a parameter and counts; None for the others."""

GRAM_ELEMENTS = 2**26
"""Most elements of per-sample gradients that are pulled back and held at a time."""


@dataclass(frozen=True)
class Work:
    """What one column takes that passes through a call.

    Args:
        flops: Multiplications and additions of its GEMMs, from one input.
        kernels: Operations that are started, a traced call's being one.
        elements: Numbers that they write beside those.
    """

    flops: float
    kernels: float = 1.0
    elements: float = 0.0


@dataclass(frozen=True)
class Slot:
    """An active tensor among a call's arguments: it moves with the controls or the input.

    Args:
        id: The program value it is.
        value: Its value on this batch.
        is_parameter: Whether it is one of the model's own tensors.
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
        within: Of code that is not torch's: what must hold while it runs, and while a backward pass
            runs it again (activation checkpoints do so).
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    owner: str
    second_order: bool
    within: Callable[[], AbstractContextManager[None]] | None = None

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
        if self.within is not None:
            # In the mode that it would have in training: it may differentiate something itself.
            with torch.enable_grad():
                result = self.with_values([slot.value for slot in self.slots])
            return tree_map_only(Tensor, torch.Tensor.detach, result)
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


class Node(Unsaved, ABC):
    """A linearised call.

    Every tangent and cotangent has a leading axis of k columns. A call has one output unless it
    overrides the plural methods.

    Args:
        result: The call's value.
        inputs: The active inputs, in the order in which `push` and `pull` take them.
    """

    _remedy = (
        "a network's problem cannot be pickled or deep-copied, nor can its operators: their "
        "products are autograd graphs over the model's memory. Save the model, the batch and the "
        "options, and make the problem again where it is needed."
    )

    couples_batch: bool | None = None
    """Whether samples interact: False when surely not, None when unknown (it is then probed)."""

    moves: Sequence[bool] | None = None
    """Which floating-point outputs depend on the active inputs; None for all. Others are left out
    of `push_all` and `pull_all`."""

    per_sample = False
    """Whether outputs belong to samples though the batch is read as constants (tokens)."""

    flops = 0.0
    """Multiplications and additions of a column pushed from one input, where they are GEMMs."""

    def gram_flops(self, size: int) -> float:
        """Those of the Gram matrix of `size` per-sample gradients, beside the pulls to states."""
        return 0.0

    def gram_passes(self, rank: int, samples: int) -> float:
        """Passes of the whole batch that pulling a column of all samples back is worth."""
        return 1.0

    def work(self) -> Work:
        """What a column takes."""
        return Work(self.flops)

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

    # ---- parameters through R^{-1}: the tangent kernel, and steps taken in place

    def respond_all(
        self,
        tangents: Tangents,
        cotangents: Sequence[Tensor | None],
        scales: Sequence[float | None],
    ) -> tuple[Tensor | None, ...]:
        """`push_all` of the tangents, and of scale * (what the cotangents pull back) besides.

        Args:
            tangents: Of the inputs, as for `push_all`; None for inputs that have a scale.
            cotangents: Of the outputs, as for `pull_all`.
            scales: One number per input that is a parameter to be moved, None for the others.
        """
        needed = [scale is not None for scale in scales]
        pulled = self.pull_all(cotangents, needed, [None] * len(needed))
        moved = [
            tangent if scale is None or part is None else part * scale
            for tangent, part, scale in zip(tangents, pulled, scales, strict=True)
        ]
        if all(tangent is None for tangent in moved):
            return tuple(None for _ in cotangents)
        return self.push_all(moved)

    def add_pulled(
        self, cotangents: Sequence[Tensor | None], index: int, target: Tensor, scale: float
    ) -> None:
        """Adds scale * (what one column of cotangents pulls back to an input) to `target`."""
        needed = [i == index for i in range(len(self.inputs))]
        pulled = self.pull_all(cotangents, needed, [None] * len(needed))[index]
        if pulled is not None:
            target.add_(pulled[0], alpha=scale)

    def reads_none_of(self, storages: Collection[int]) -> bool:
        """Whether `add_pulled` into its own parameters reads none of these tensors' memory.

        Args:
            storages: Addresses of the storages of all parameters.
        """
        return False

    def pulled_squares(self, cotangents: Sequence[Tensor | None], index: int) -> Tensor:
        """Squared norms of what each column pulls back to an input, in float64; shape (k,)."""
        needed = [i == index for i in range(len(self.inputs))]
        pulled = self.pull_all(cotangents, needed, [None] * len(needed))[index]
        if pulled is not None:
            flat = pulled.reshape(len(pulled), -1)
            return row_dots(flat, flat)
        some = next(c for c in cotangents if c is not None)
        return torch.zeros(len(some), dtype=torch.float64, device=some.device)

    # ---- the dual's Gram matrix

    def gram_terms(self, deltas: Deltas, scales: Scales) -> list[Term] | None:
        """Per-sample gradients of the parameters among the inputs, or None if too large.

        Valid only where samples do not interact. Here they are pulled back when they are needed.

        Args:
            deltas: Cotangents of the only output.
            scales: A factor of the inner products for each input that counts; None for others.
        """
        needed = [scale is not None for scale in scales]
        columns, samples = deltas.values.shape[:2]
        if not any(needed) or not columns * samples:
            return []
        width = self.gradient_size(deltas, needed)
        if columns * width > GRAM_ELEMENTS:
            return None

        def gradients(ns: slice) -> list[Rows | None]:
            part = replace(deltas, values=deltas.values[:, ns], samples=deltas.owners[ns])
            return [
                None if g is None or scale is None else Rows(g.flatten(2), scale)
                for g, scale in zip(self.gradients_of_samples(part, needed), scales, strict=True)
            ]

        step = max(1, GRAM_ELEMENTS // max(1, columns * width))
        return [Pulled(gradients, deltas.values.new_zeros(()), columns, samples, step)]

    def gradient_size(self, deltas: Deltas, needed: Sequence[bool]) -> int:
        """Entries of one sample's gradients in all needed inputs."""
        values = deltas.values[:1, :1]
        one = replace(deltas, values=values, samples=deltas.owners[:1])
        return sum(0 if g is None else g.numel() for g in self.gradients_of_samples(one, needed))

    def gradients_of_samples(self, deltas: Deltas, needed: Sequence[bool]) -> list[Tensor | None]:
        """What every sample's own cotangents pull back to the inputs that are needed.

        Args:
            deltas: Cotangents of the only output.
            needed: Which inputs' gradients are wanted.

        Returns:
            Shape (r, n, *in) per needed input; None for others, and where nothing arrives.
        """
        r, n = deltas.values.shape[:2]
        shape, device = deltas.values.shape[2:], deltas.values.device
        flat, owners = deltas.values.reshape(r * n, *shape), deltas.owners.repeat(r)
        made: list[Tensor | None] = [None] * len(needed)
        step = min(64, max(1, gram.CHUNK_ELEMENTS // (deltas.batch * shape.numel())))
        for start in range(0, r * n, step):
            picked, owner = flat[start : start + step], owners[start : start + step]
            alone = flat.new_zeros(len(picked), deltas.batch, *shape)
            alone[torch.arange(len(picked), device=device), owner] = picked
            for i, g in enumerate(self.pull_all([alone], needed, [None] * len(needed))):
                if g is not None:
                    whole = made[i]
                    if whole is None:
                        whole = made[i] = g.new_empty(r * n, *g.shape[1:])
                    whole[start : start + step] = g
        return [None if g is None else g.reshape(r, n, *g.shape[1:]) for g in made]

    def add_gram(self, total: Tensor, deltas: Tensor, scales: Scales) -> bool:
        """Adds the Gram matrix of per-sample gradients, in the half n >= m (`gram.mirror`).

        Args:
            total: Shape (r, N, r, N).
            deltas: Cotangents of the output, (r, N, *out): row j holds every sample's own j-th.
            scales: A factor for each input that is a parameter, None for others.

        Returns:
            Whether it was added; False if the gradients would be too large.
        """
        terms = self.gram_terms(Deltas(deltas, deltas.shape[1]), scales)
        for term in terms or ():
            term.add(total, term, half=True)
        return terms is not None

    def gram(self, deltas: Tensor, index: int) -> Tensor | None:
        """The whole Gram matrix of one input, (r N, r N) with index j N + n, for a look at it."""
        r, n = deltas.shape[:2]
        total = deltas.new_zeros(r, n, r, n)
        scales = [1.0 if i == index else None for i in range(len(self.inputs))]
        if not self.add_gram(total, deltas, scales):
            return None
        gram.mirror(total)
        return total.reshape(r * n, r * n)


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
