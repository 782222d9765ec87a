"""A positive number per weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from linear_operator import LinearOperator
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from .base import Parts, Structure
from .blueprint import Like
from .chart import Chart


class Diagonal(Structure):
    """M = diag(d), d > 0; one times the parameters of state.

    Args:
        like: What it is made for.
    """

    kind = "diagonal"

    def __init__(self, like: Like) -> None:
        super().__init__(like)
        for name, shape in zip(self.layout.names, self.layout.shapes, strict=True):
            self.tensors[f"{name}.diagonal"] = self._proto.new_ones(shape)

    def times_parts(self, parts: Mapping[str, Tensor]) -> Parts:
        """D v."""
        return {name: part * self.tensors[f"{name}.diagonal"] for name, part in parts.items()}

    def flat(self) -> Tensor:
        """d, shape (P,)."""
        return torch.cat([self._proto, *(t.reshape(-1) for t in self.tensors.values())])

    def _diagonal(self) -> Tensor:
        return self.flat()

    def inverse(self) -> LinearOperator:
        """diag(1 / d)."""
        return DiagLinearOperator(1 / self.flat())

    def logdet(self) -> Tensor:
        """sum log d."""
        return self.flat().log().sum()

    def scale_(self, c: float) -> None:
        """d becomes c d."""
        for tensor in self.tensors.values():
            tensor.mul_(c)

    def blend_(self, other: Diagonal, weight: float) -> None:
        """The mean of the two diagonals."""
        for name, tensor in self.tensors.items():
            tensor.lerp_(other.tensors[name], weight)

    def charts(self) -> Sequence[Chart]:
        """d itself."""
        return (_DiagonalChart(self),)


class _DiagonalChart(Chart):
    elementwise = True

    def __init__(self, structure: Diagonal) -> None:
        self.structure = structure

    def get(self) -> Tensor:
        return self.structure.flat()

    def put(self, phi: Tensor) -> None:
        sizes = self.structure.layout.sizes
        for tensor, part in zip(self.structure.tensors.values(), phi.split(sizes), strict=True):
            tensor.copy_(part.reshape(tensor.shape))

    def times(self, phi: Tensor, v: Tensor) -> Tensor:
        return phi * v

    def pull(self, v: Tensor, w: Tensor) -> Tensor:
        return (v * w).sum(0)

    def project(self, phi: Tensor, floor: float) -> Tensor:
        return phi.clamp(min=floor * float(self.structure.flat().mean()))

    def mass(self) -> Tensor:
        return torch.ones_like(self.get())
