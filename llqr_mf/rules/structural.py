"""Maps that are linear in their input: reshapes, sums, gathers, concatenations, pooling."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .base import Call, Node, Slot, Tangents, register


class LinearMapNode(Node):
    """y = L x: the call itself pushes tangents, and its vjp pulls cotangents.

    Args:
        call: Linear in its active arguments.
        result: The value, which may differ from the call's by a constant.
    """

    def __init__(self, call: Call, result: Any) -> None:
        slots = call.slots
        values = [slot.value for slot in slots]
        super().__init__(result, slots)
        self._shapes = [value.shape for value in values]

        def function(*given: Tensor) -> tuple[Tensor, ...]:
            return tuple(tree_leaves(call.with_values(given)))

        self._function = function
        # Evaluated at zeros, so that no activation is kept.
        zeros = [value.new_zeros(()).expand(value.shape) for value in values]
        outputs, self._pull = torch.func.vjp(function, *zeros)  # type: ignore[misc]
        # One element each, which carries dtype and device of an absent tangent.
        self._ins = [value.new_zeros(()) for value in values]
        self._outs = [(output.new_zeros(()), output.shape) for output in outputs]

    def push(self, tangents: Tangents) -> Tensor:
        """L dx."""
        result = self.push_all(tangents)[0]
        assert result is not None
        return result

    def push_all(self, tangents: Tangents) -> tuple[Tensor | None, ...]:
        """L dx, for every output."""
        k = next(len(t) for t in tangents if t is not None)
        whole = [
            zero.expand(k, *shape) if t is None else t
            for t, zero, shape in zip(tangents, self._ins, self._shapes, strict=True)
        ]
        if k == 1:
            return tuple(y.unsqueeze(0) for y in self._function(*[t[0] for t in whole]))
        return tuple(torch.vmap(self._function)(*whole))

    def pull(
        self, cotangent: Tensor, needed: Sequence[bool], out: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """L' c."""
        return self.pull_all([cotangent], needed, out)

    def pull_all(
        self,
        cotangents: Sequence[Tensor | None],
        needed: Sequence[bool],
        out: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """L' c, from every output."""
        some = next((c for c in cotangents if c is not None), None)
        if some is None:
            return [None] * len(needed)
        k = len(some)
        whole = tuple(
            zero.expand(k, *shape) if c is None else c
            for c, (zero, shape) in zip(cotangents, self._outs, strict=True)
        )
        pull = self._traceable_pull() if torch.compiler.is_compiling() else self._pull
        if k == 1:
            pulled = [g.unsqueeze(0) for g in pull(tuple(c[0] for c in whole))]
        else:
            pulled = list(torch.vmap(pull)(whole))
        return [g if wanted else None for g, wanted in zip(pulled, needed, strict=True)]

    def _traceable_pull(self) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """The vjp made anew: torch.compile cannot enter one that was made outside of its graph."""
        points = [zero.expand(shape) for zero, shape in zip(self._ins, self._shapes, strict=True)]
        return torch.func.vjp(self._function, *points)[1]

    def curvature_all(self, costates: Sequence[Tensor | None]) -> None:
        """Zero."""
        return None


@register(
    *[torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze],
    *[torch.unsqueeze, torch.mean, torch.sum, torch.chunk, torch.split, torch.unbind],
    *[torch.roll, torch.flip, torch.movedim, torch.swapaxes],
    *[torch.select, torch.narrow, torch.index_select, torch.unflatten, torch.tril, torch.triu],
    *["flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "mean", "sum"],
    *["chunk", "split", "unbind", "roll", "flip", "movedim", "expand", "repeat"],
    *["t", "unflatten", "select", "narrow", "index_select", "float", "double", "to", "type_as"],
    *["expand_as", "view_as", "swapaxes", "tril", "triu", "__getitem__"],
    *[F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d],
    *[F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.unfold, F.fold, F.pixel_shuffle],
    *[operator.getitem],
)
def linear_map(call: Call) -> Node | None:
    """Rule of every call that is linear in its active arguments.

    Raises:
        ValueError: Bytes are viewed as another dtype, which autograd pushes through and does not
            pull through.
    """
    name = getattr(call.function, "__name__", "")
    if name in ("view", "reshape") and any(isinstance(leaf, torch.dtype) for leaf in call.leaves):
        raise ValueError(
            f"view(dtype) in '{call.owner or 'the model'}' reinterprets bytes and has no "
            "derivative: convert with .to(dtype), or leave it out where the dtype is the same."
        )
    result = call.evaluate()
    floating = all(leaf.is_floating_point() for leaf in tree_leaves(result))
    return LinearMapNode(call, result) if floating else None


@register(torch.cat, torch.concat, torch.stack)
def joined(call: Call) -> Node | None:
    """Rule of `torch.cat` and `torch.stack`: affine where a part is constant."""
    parts = call.argument(0, "tensors")
    if not isinstance(parts, list | tuple):
        return None
    zeroed = [p if isinstance(p, Slot) else torch.zeros_like(p) for p in parts]
    kwargs = {name: value for name, value in call.kwargs.items() if name != "tensors"}
    args = (zeroed, *call.args[1:])
    return LinearMapNode(replace(call, args=args, kwargs=kwargs), call.evaluate())


@register(F.pad)
def pad(call: Call) -> Node | None:
    """Rule of `F.pad`, linear but for a non-zero fill."""
    return None if call.argument(3, "value") else linear_map(call)
