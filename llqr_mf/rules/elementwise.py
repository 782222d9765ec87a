"""Elementwise functions of one tensor: a product with their derivative."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Call, Curvature, Node, Slot, Tangents, register

_STRAIGHT = {F.hardsigmoid}
"""Piecewise linear functions whose backward torch cannot differentiate."""

_SLOPES: dict[Any, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys((torch.tanh, F.tanh, Tensor.tanh), lambda y: 1 - y * y),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, Tensor.sigmoid), lambda y: y * (1 - y)),
    **dict.fromkeys((torch.relu, F.relu, Tensor.relu), lambda y: (y > 0).to(y.dtype)),
}
"""Slopes that are known from the value, which spares a backward pass."""


class ElementwiseNode(Node):
    """y = phi(x) entry by entry; phi' is known, or comes from one backward pass with ones."""

    couples_batch = False

    def __init__(self, call: Call) -> None:
        (slot,) = call.slots
        known = _SLOPES.get(call.function)
        if known is not None and not call.second_order:
            super().__init__(call.evaluate(), [slot])
            self.slope, self._bend = known(self.result), None
            return
        second_order = call.second_order and call.function not in _STRAIGHT
        with torch.enable_grad():
            x = slot.value.detach().requires_grad_()
            y = call.with_values([x])
            (slope,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=second_order)
        super().__init__(y.detach(), [slot])
        self.slope = slope.detach()
        self._bend = _bend(slope, x) if second_order else None

    def push(self, tangents: Tangents) -> Tensor:
        """Phi'(x) dx."""
        (dx,) = tangents
        assert dx is not None
        return dx * self.slope

    def pull(
        self, cotangent: Tensor, needed: Sequence[bool], out: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Phi'(x) c."""
        return [cotangent * self.slope if needed[0] else None]

    def curvature(self, costate: Tensor) -> Curvature | None:
        """P phi''(x) dx."""
        if self._bend is None:
            return None
        weight = costate * self._bend
        return lambda tangents: [None if t is None else t * weight for t in tangents]


def _bend(slope: Tensor, x: Tensor) -> Tensor | None:
    """Phi''(x), or None for a piecewise linear function."""
    if not slope.requires_grad:
        return None
    (bend,) = torch.autograd.grad(slope, x, torch.ones_like(slope), allow_unused=True)
    return None if bend is None or not bool(bend.any()) else bend


@register(
    *[F.relu, F.relu6, F.gelu, F.silu, F.mish, F.elu, F.selu, F.celu, F.leaky_relu, F.softplus],
    *[F.hardtanh, F.hardswish, F.hardsigmoid, F.logsigmoid, F.softsign, F.tanhshrink, F.sigmoid],
    *[F.tanh, torch.relu, torch.tanh, torch.sigmoid, torch.exp, torch.log, torch.sin, torch.cos],
    *[torch.sqrt, torch.rsqrt, torch.abs, torch.erf, torch.square, torch.log1p, torch.expm1],
    *["relu", "tanh", "sigmoid", "exp", "log", "sin", "cos", "sqrt", "rsqrt", "abs", "erf"],
    *["square", "log1p", "expm1", "clamp", torch.clamp],
)
def elementwise(call: Call) -> Node | None:
    """Rule of every elementwise function of one tensor; bounds that are tensors may broadcast."""
    tensors = [leaf for leaf in call.leaves if isinstance(leaf, Tensor | Slot)]
    return ElementwiseNode(call) if len(tensors) == 1 else None


@register(operator.pow, operator.ipow, torch.pow, "pow", "__pow__")
def power(call: Call) -> Node | None:
    """Rule of x ** c with a constant exponent."""
    exponent = call.argument(1, "exponent")
    return ElementwiseNode(call) if isinstance(exponent, int | float) else None
