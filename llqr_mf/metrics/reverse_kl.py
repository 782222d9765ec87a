"""The reverse Kullback-Leibler metric."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llqr_mf.losses import Loss
from llqr_mf.operators.output_curvature import OutputCurvature

from .base import Metric


@dataclass(frozen=True)
class ReverseKL(Metric):
    """KL(p || p_0), p_0 the output distribution now and p the one after the step.

    It differs from `KL` from the third order in the step on. To second order both are
    1/2 E[(d log p)^2], so gradient (zero) and Hessian (the Fisher matrix) are the same.
    """

    def terminal(self, loss: Loss, outputs: Tensor, targets: Tensor) -> OutputCurvature:
        """The exact Fisher matrix, shape (N*D, N*D)."""
        return loss.fisher(outputs, targets)
