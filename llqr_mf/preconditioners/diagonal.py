"""A positive number per weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import Parts, Structure
from .blueprint import Like
from .chart import Chart, ElementwiseChart
from .saved import check_positive


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

    def inverse(self) -> Diagonal:
        """diag(1 / d)."""
        other = self._bare()
        other.tensors = {name: 1 / tensor for name, tensor in self.tensors.items()}
        return other

    def root(self) -> Diagonal:
        """diag(sqrt(d))."""
        other = self._bare()
        other.tensors = {name: tensor.sqrt() for name, tensor in self.tensors.items()}
        return other

    def logdet(self) -> Tensor:
        """The sum of log d."""
        return self.flat().double().log().sum()

    def scale_(self, c: float) -> None:
        """Multiplies d by c."""
        self.check_scale(c)
        for tensor in self.tensors.values():
            tensor.mul_(c)

    def blend_(self, other: Diagonal, weight: float) -> None:
        """The mean of the two diagonals."""
        self.check_blend(other, weight)
        for name, tensor in self.tensors.items():
            tensor.lerp_(other.tensors[name], weight)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        """All entries are positive."""
        for name, tensor in tensors.items():
            check_positive(name, tensor)

    def charts(self) -> Sequence[Chart]:
        """The diagonal itself."""
        return (_DiagonalChart(list(self.tensors.values())),)


class _DiagonalChart(ElementwiseChart):
    def times(self, phi: Tensor, v: Tensor) -> Tensor:
        return phi * v

    def pull(self, v: Tensor, w: Tensor) -> Tensor:
        return (v * w).sum(0)
