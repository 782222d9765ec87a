"""The generalised Gauss-Newton metric."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llqr_mf.losses import Loss
from llqr_mf.losses.base import Totals
from llqr_mf.operators.output_curvature import OutputCurvature

from .base import Metric


@dataclass(frozen=True)
class GaussNewton(Metric):
    """The Hessian of the loss at the output, and no second derivatives of the layers.

    Where the loss is a function that is not convex in the outputs, the positive part of every
    sample's Hessian is taken, with a warning; see `operators.output_blocks` for what is too large.
    """

    def terminal(self, loss: Loss, outputs: Tensor, targets: Tensor) -> OutputCurvature:
        """The loss's Hessian, or its positive part if it is a function; shape (N*D, N*D)."""
        return loss.gauss_newton(outputs, targets)

    def mass(self, totals: Totals) -> float:
        """That of the loss, whose Hessian this is."""
        return totals.mass
