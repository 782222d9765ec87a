"""The Newton metric."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llqr_mf.losses import Loss
from llqr_mf.losses.base import Totals
from llqr_mf.operators.output_curvature import OutputCurvature

from .base import Metric


@dataclass(frozen=True)
class Newton(Metric):
    """The Hessian of the loss through the whole network.

    The divergence is the loss itself, so its gradient does not vanish and the layers' own second
    derivatives enter, weighted by the loss's adjoint. The model need not be convex.
    """

    def terminal(self, loss: Loss, outputs: Tensor, targets: Tensor) -> OutputCurvature:
        """The loss's Hessian, shape (N*D, N*D)."""
        return loss.hessian(outputs, targets)

    def costate(self, loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss's gradient, of the outputs' shape."""
        return loss.gradient(outputs, targets)

    def mass(self, totals: Totals) -> float:
        """That of the loss, whose Hessian this is."""
        return totals.mass
