"""Parameters as tensors with a few sides: where a Kronecker factor can stand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .blueprint import Blueprint

Biases = Literal["diagonal", "joined"]
Kernels = Literal["auto", "matrix", "tensor"]


@dataclass(frozen=True)
class Site:
    """One weight, or a weight with its bias as one more input, as a tensor with named sides.

    Args:
        name: The weight's name.
        bias: The name of the bias that is joined as the last column, or None.
        shape: The weight's own shape.
        sides: Sizes of the sides: (n,) for a vector, (out, in) for a matrix, (out, in * kernel)
            or (out, in, kernel) for a convolution; in + 1 with a bias.
        full: For every side, whether a matrix may act on it (else a diagonal). Never for a vector.
    """

    name: str
    bias: str | None
    shape: tuple[int, ...]
    sides: tuple[int, ...]
    full: tuple[bool, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of its parameters."""
        return (self.name,) if self.bias is None else (self.name, self.bias)

    @property
    def size(self) -> int:
        """Number of weights, bias included."""
        return math.prod(self.sides)

    def gather(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Rows by name, each (k, *shape), as (k, *sides)."""
        weight = parts[self.name]
        if self.bias is None:
            return weight.reshape(len(weight), *self.sides)
        matrix = weight.reshape(len(weight), self.shape[0], -1)
        return torch.cat([matrix, parts[self.bias].unsqueeze(-1)], dim=-1)

    def scatter(self, x: Tensor) -> dict[str, Tensor]:
        """The inverse of `gather`."""
        if self.bias is None:
            return {self.name: x.reshape(len(x), *self.shape)}
        weight = x[..., :-1].reshape(len(x), *self.shape)
        return {self.name: weight, self.bias: x[..., -1]}


def sites(
    blueprint: Blueprint,
    *,
    biases: Biases = "diagonal",
    kernels: Kernels = "auto",
    max_side: int = 2048,
) -> tuple[Site, ...]:
    """The sites of a layout.

    Args:
        blueprint: Names, shapes and vocabulary sides.
        biases: "joined" puts a bias beside the weight of the same module, as one more input, when
            the weight is no tensor with a kernel side and has no vocabulary side; "diagonal"
            leaves it a vector.
        kernels: A convolution as the matrix (out, in * kernel), as the tensor (out, in, kernel),
            or as the matrix where in * kernel <= max_side ("auto").
        max_side: A larger side gets a diagonal.

    Raises:
        ValueError: An option is none of these.
    """
    for option, value, known in (
        ("biases", biases, ("diagonal", "joined")),
        ("kernels", kernels, ("auto", "matrix", "tensor")),
    ):
        if value not in known:
            raise ValueError(f"{option}={value!r}: choose one of {known}.")
    if max_side < 0:
        raise ValueError(f"max_side is {max_side}: give 0 (no matrix) or more.")
    shapes = dict(zip(blueprint.layout.names, blueprint.layout.shapes, strict=True))
    made: list[Site] = []
    joined: set[str] = set()
    for name, shape in shapes.items():
        bias = None
        sides, full = _sides(shape, blueprint.vocabulary.get(name), kernels, max_side)
        stem, _, last = name.rpartition("weight")
        if (
            biases == "joined"
            and last == ""
            and len(sides) == 2
            and name not in blueprint.vocabulary
        ):
            wanted = f"{stem}bias"
            if shapes.get(wanted) == (sides[0],):
                bias = wanted
                joined.add(bias)
                sides = (sides[0], sides[1] + 1)
                full = (full[0], sides[1] <= max_side)
        made.append(Site(name, bias, tuple(shape), sides, full))
    return tuple(site for site in made if site.name not in joined)


def _sides(
    shape: tuple[int, ...], vocabulary: int | None, kernels: Kernels, max_side: int
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    kept = [i for i, n in enumerate(shape) if n != 1]
    if len(shape) < 2 or len(kept) < 2:
        return (math.prod(shape),), (False,)
    if len(shape) == 2:
        sides: tuple[int, ...] = tuple(shape)
    else:
        out, inner, kernel = shape[0], shape[1], math.prod(shape[2:])
        as_matrix = kernels == "matrix" or (kernels == "auto" and inner * kernel <= max_side)
        sides = (out, inner * kernel) if as_matrix else (out, inner, kernel)
    return sides, tuple(n <= max_side and i != vocabulary for i, n in enumerate(sides))


def times_side(x: Tensor, matrix: Tensor, side: int) -> Tensor:
    """A matrix (m, n), or a diagonal (n,), applied to one side of x of shape (k, *sides)."""
    axis = side + 1
    if matrix.ndim == 1:
        return x * matrix.reshape(-1, *(1,) * (x.ndim - axis - 1))
    if axis == x.ndim - 1:
        return x @ matrix.mT
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    if math.prod(before) > 1 and math.prod(after) < len(matrix):
        # One large GEMM and a copy, not a small one for every row.
        return (x.movedim(axis, -1) @ matrix.mT).movedim(-1, axis)
    flat = x.reshape(math.prod(before), x.shape[axis], -1)
    return (matrix @ flat).reshape(*before, len(matrix), *after)


def side_moments(x: Tensor, y: Tensor, side: int, *, full: bool = True) -> Tensor:
    """Sum over rows and all other sides of x y' in one side; (k, *sides) twice to (n, n).

    Of that only the diagonal, (n,), where `full` is False.
    """
    if not full:
        return (x * y).movedim(side + 1, 0).flatten(1).sum(1)
    a, b = (t.movedim(side + 1, -1).reshape(-1, t.shape[side + 1]) for t in (x, y))
    return a.mT @ b
