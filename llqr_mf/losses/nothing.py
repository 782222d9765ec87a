"""The loss of a batch in which nothing counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llqr_mf.operators.diagonal_curvature import DiagonalCurvature
from llqr_mf.operators.output_curvature import at_least_float32

from .base import Loss


@dataclass(frozen=True)
class Nothing(Loss):
    """Zero, for a part of the data that has no target: `Loss.is_empty` says which."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Nothing can be wrong."""

    def count(self, outputs: Tensor, targets: Tensor) -> int:
        """0."""
        return 0

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """0."""
        return outputs.new_zeros((), dtype=at_least_float32(outputs.dtype))

    def hessian(self, outputs: Tensor, targets: Tensor) -> DiagonalCurvature:
        """0, of shape (N*D, N*D)."""
        h = outputs.new_zeros((), dtype=at_least_float32(outputs.dtype))
        return DiagonalCurvature(outputs.new_empty(0), diagonal=h.expand(outputs.shape))

    def fisher(self, outputs: Tensor, targets: Tensor) -> DiagonalCurvature:
        """0, of shape (N*D, N*D)."""
        return self.hessian(outputs, targets)

    def sample_gradients(
        self, outputs: Tensor, targets: Tensor, samples: int, generator: torch.Generator
    ) -> Tensor:
        """0, of shape (N, D, samples)."""
        wide = at_least_float32(outputs.dtype)
        return outputs.new_zeros(len(outputs), outputs[0].numel(), samples, dtype=wide)
