"""The Kullback-Leibler metric."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llqr_mf.losses import Loss
from llqr_mf.operators.output_curvature import OutputCurvature

from .base import Metric


@dataclass(frozen=True)
class KL(Metric):
    """KL(p_0 || p), p_0 the output distribution now and p the one after the step.

    Where they coincide it is at its minimum, zero, so its gradient vanishes and the layers' second
    derivatives drop out. Its Hessian there is -E_{p_0} of the Hessian of log p, which is the
    Fisher matrix.
    """

    def terminal(self, loss: Loss, outputs: Tensor, targets: Tensor) -> OutputCurvature:
        """The exact Fisher matrix, shape (N*D, N*D)."""
        return loss.fisher(outputs, targets)
