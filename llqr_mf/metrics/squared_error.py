"""The squared-error metric."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llqr_mf.losses import Loss
from llqr_mf.losses.base import Totals
from llqr_mf.operators.diagonal_curvature import DiagonalCurvature
from llqr_mf.operators.output_curvature import at_least_float32

from .base import Metric


@dataclass(frozen=True)
class SquaredError(Metric):
    """1/2 |y - y_0|^2, summed over a sample's outputs and averaged over the N samples."""

    def terminal(self, loss: Loss, outputs: Tensor, targets: Tensor) -> DiagonalCurvature:
        """I/N, shape (N*D, N*D)."""
        h = torch.full(
            (), 1 / len(outputs), dtype=at_least_float32(outputs.dtype), device=outputs.device
        )
        return DiagonalCurvature(outputs.new_empty(0), diagonal=h.expand(outputs.shape))

    def mass(self, totals: Totals) -> float:
        """The number of samples."""
        return float(totals.samples)
