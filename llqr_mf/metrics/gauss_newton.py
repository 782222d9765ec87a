"""The generalised Gauss-Newton metric."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llqr_mf.losses import Loss
from llqr_mf.operators.output_curvature import OutputCurvature

from .base import Metric


@dataclass(frozen=True)
class GaussNewton(Metric):
    """The Hessian of the loss at the output, and no second derivatives of the layers."""

    def terminal(self, loss: Loss, outputs: Tensor, targets: Tensor) -> OutputCurvature:
        """The loss's Hessian, shape (N*D, N*D)."""
        return loss.hessian(outputs, targets)

    def mass(self, loss: Loss, outputs: Tensor, targets: Tensor) -> float:
        """That of the loss, whose Hessian this is."""
        return loss.mass(outputs, targets)
