"""Tangents of states and controls, and their flat form.

A tangent is a tuple of tensors, one per component, each with a leading axis of k columns:
(k, *shape). None stands for an exact zero, which costs nothing to push or pull.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SQUARED = 2**20
"""Numbers that are widened at a time for squares in float64."""

Shape = tuple[int, ...]
Tangent = tuple[Tensor | None, ...]


def size_of(shapes: Sequence[Shape]) -> int:
    """The length of the flat vector of these components."""
    return sum(math.prod(shape) for shape in shapes)


def to_rows(tangent: Tangent, shapes: Sequence[Shape], proto: Tensor, k: int) -> Tensor:
    """The flat form of a tangent, shape (k, n): a view when there is one component."""
    parts = [
        proto.new_zeros(k, math.prod(shape)) if part is None else part.reshape(k, math.prod(shape))
        for part, shape in zip(tangent, shapes, strict=True)
    ]
    if not parts:
        return proto.new_zeros(k, 0)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def from_rows(rows: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
    """The components of a flat tangent of shape (k, n), as views."""
    if len(shapes) == 1:
        return (rows.reshape(len(rows), *shapes[0]),)
    parts = rows.split([math.prod(shape) for shape in shapes], dim=1)
    return tuple(part.reshape(len(rows), *shape) for part, shape in zip(parts, shapes, strict=True))


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two tangent components, either of which may be an exact zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def add_tangents(a: Tangent, b: Tangent) -> Tangent:
    """The sum of two tangents, component by component."""
    return tuple(add(x, y) for x, y in zip(a, b, strict=True))


def is_plain(rows: Tensor) -> bool:
    """Whether products of `rows` may be written into buffers: no autograd, func or tracing."""
    return not (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and rows.requires_grad)
        or torch._C._functorch.is_functorch_wrapped_tensor(rows)
        or torch.autograd.forward_ad._current_level >= 0
    )
