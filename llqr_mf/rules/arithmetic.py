"""Sums, differences and products of tensors, with broadcasting."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import (
    Call,
    Curvature,
    Node,
    Scales,
    Slot,
    Tangents,
    align,
    plain,
    reduce_to,
    register,
)
from .gram import Deltas, Rows, Term


class AffineNode(Node):
    """y = c_1 x_1 + c_2 x_2 + constant, with c_i numbers or constant tensors."""

    def __init__(self, call: Call, terms: list[tuple[Slot, Any]]) -> None:
        super().__init__(call.evaluate(), [slot for slot, _ in terms])
        self.factors = [factor for _, factor in terms]
        self.shapes = [slot.value.shape for slot, _ in terms]
        self.shape = self.result.shape

    def push(self, tangents: Tangents) -> Tensor:
        """The sum of c_i dx_i."""
        total: Tensor | None = None
        for tangent, factor in zip(tangents, self.factors, strict=True):
            if tangent is None:
                continue
            term = align(tangent, len(self.shape))
            term = term if _is_one(factor) else term * factor
            total = term if total is None else total + term
        assert total is not None
        return total.expand(len(total), *self.shape)

    def pull(
        self, cotangent: Tensor, needed: Sequence[bool], out: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """C_i c, summed over broadcast axes."""
        return [
            reduce_to(cotangent if _is_one(factor) else cotangent * factor, shape)
            if wanted
            else None
            for factor, shape, wanted in zip(self.factors, self.shapes, needed, strict=True)
        ]

    def gram_terms(self, deltas: Deltas, scales: Scales) -> list[Term] | None:
        """Each sample's cotangents times c_i, summed over broadcast axes."""
        if not _of_all_samples(self.shapes, self.shape, scales):
            return super().gram_terms(deltas, scales)
        return _sample_sums(deltas, self.shape, self.factors, self.shapes, scales)


class ProductNode(Node):
    """y = x_1 x_2 entry by entry, both active."""

    def __init__(self, call: Call, first: Slot, second: Slot) -> None:
        super().__init__(call.evaluate(), [first, second])
        self.values = (first.value, second.value)
        self.shape = self.result.shape

    def push(self, tangents: Tangents) -> Tensor:
        """dx_1 x_2 + x_1 dx_2."""
        total: Tensor | None = None
        for tangent, other in zip(tangents, reversed(self.values), strict=True):
            if tangent is not None:
                term = align(tangent, len(self.shape)) * other
                total = term if total is None else total + term
        assert total is not None
        return total

    def pull(
        self, cotangent: Tensor, needed: Sequence[bool], out: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """C x_2 and c x_1, summed over broadcast axes."""
        return [
            reduce_to(cotangent * other, value.shape) if wanted else None
            for value, other, wanted in zip(self.values, reversed(self.values), needed, strict=True)
        ]

    def gram_terms(self, deltas: Deltas, scales: Scales) -> list[Term] | None:
        """Each sample's cotangents times the other factor, summed over broadcast axes."""
        shapes = [value.shape for value in self.values]
        if not _of_all_samples(shapes, self.shape, scales):
            return super().gram_terms(deltas, scales)
        return _sample_sums(deltas, self.shape, self.values[::-1], shapes, scales)

    def curvature(self, costate: Tensor) -> Curvature | None:
        """P dx_2 and p dx_1."""

        def product(tangents: Tangents) -> list[Tensor | None]:
            return [
                None
                if tangent is None
                else reduce_to(
                    (align(tangent, len(self.shape)) * costate).expand(len(tangent), *self.shape),
                    value.shape,
                )
                for value, tangent in zip(self.values, reversed(list(tangents)), strict=True)
            ]

        return product


def _of_all_samples(shapes: Sequence[torch.Size], out: torch.Size, scales: Scales) -> bool:
    """Whether every input that counts is broadcast over the batch."""
    counted = [s for s, scale in zip(shapes, scales, strict=True) if scale is not None]
    return all(len(shape) < len(out) or shape[0] == 1 for shape in counted)


def _sample_sums(
    deltas: Deltas,
    out: torch.Size,
    factors: Sequence[Any],
    shapes: Sequence[torch.Size],
    scales: Scales,
) -> list[Term]:
    r, n = deltas.values.shape[:2]
    terms: list[Term] = []
    for factor, shape, scale in zip(factors, shapes, scales, strict=True):
        if scale is None:
            continue
        c = deltas.values
        if isinstance(factor, Tensor):
            c = c * deltas.select(factor.expand(out))
        elif not _is_one(factor):
            c = c * factor
        # Each sample as a batch of one.
        rows = reduce_to(c.reshape(r * n, 1, *out[1:]), shape)
        terms.append(Rows(rows.reshape(r, n, -1), scale))
    return terms


def _is_one(factor: Any) -> bool:
    return isinstance(factor, int | float) and factor == 1


def _one_dtype(first: Any, second: Any) -> bool:
    """Whether tensors are of one dtype with the result; promotions are left to autograd."""
    operands = plain(first), plain(second)
    if not all(isinstance(value, Tensor | int | float) for value in operands):
        return False
    result = torch.result_type(*operands)
    return all(v.value.dtype == result for v in (first, second) if isinstance(v, Slot))


@register(operator.add, torch.add, "add", "__add__", "__radd__", operator.iadd)
def addition(call: Call) -> Node | None:
    """Rule of x + alpha y."""
    return _sum(call, call.kwargs.get("alpha", 1))


@register(operator.sub, torch.sub, "sub", "__sub__", operator.isub)
def subtraction(call: Call) -> Node | None:
    """Rule of x - alpha y."""
    return _sum(call, -call.kwargs.get("alpha", 1))


@register(operator.neg, torch.neg, "neg", "__neg__")
def negation(call: Call) -> Node | None:
    """Rule of -x."""
    return AffineNode(call, [(call.slots[0], -1)])


@register("contiguous", "clone", torch.clone, operator.pos)
def identity(call: Call) -> Node | None:
    """Rule of calls that return their first argument, copied or not."""
    return AffineNode(call, [(call.slots[0], 1)])


@register(operator.mul, torch.mul, "mul", "__mul__", "__rmul__", operator.imul)
def multiplication(call: Call) -> Node | None:
    """Rule of x y."""
    first, second = call.argument(0, "input"), call.argument(1, "other")
    if not _one_dtype(first, second):
        return None
    if isinstance(first, Slot) and isinstance(second, Slot):
        return ProductNode(call, first, second)
    slot, factor = (first, second) if isinstance(first, Slot) else (second, first)
    return AffineNode(call, [(slot, factor)])


@register(operator.truediv, torch.div, "div", "__truediv__", operator.itruediv)
def division(call: Call) -> Node | None:
    """Rule of x / c with a constant c; a quotient of two active tensors is generic."""
    first, second = call.argument(0, "input"), call.argument(1, "other")
    if isinstance(second, Slot) or call.kwargs.get("rounding_mode") is not None:
        return None
    if not _one_dtype(first, second):
        return None
    # In the slot's dtype: the inverse of an integer tensor would be float32.
    factor = 1 / second.to(first.value.dtype) if isinstance(second, Tensor) else 1 / second
    return AffineNode(call, [(first, factor)])


def _sum(call: Call, factor: Any) -> Node | None:
    first, second = call.argument(0, "input"), call.argument(1, "other")
    if not _one_dtype(first, second):
        return None
    terms = [(v, f) for v, f in ((first, 1), (second, factor)) if isinstance(v, Slot)]
    return AffineNode(call, terms)
