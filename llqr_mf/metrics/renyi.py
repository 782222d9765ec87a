"""The Renyi metric."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from llqr_mf.losses import Loss
from llqr_mf.operators.output_curvature import OutputCurvature

from .base import Metric


@dataclass(frozen=True)
class Renyi(Metric):
    """The Renyi divergence log(sum_y p_0^alpha p^(1 - alpha)) / (alpha - 1) of order alpha.

    Its gradient vanishes where the two distributions coincide and its Hessian there is alpha times
    the Fisher matrix, in either argument. The limit alpha = 1 is the KL divergence; alpha = 0 (no
    curvature) and infinity (no Hessian: the largest log-ratio has a kink) give no metric.

    Args:
        alpha: Order, positive and finite.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(
                f"alpha of Renyi is {self.alpha}: its Hessian is alpha times the Fisher matrix, "
                "which is a metric for a finite alpha > 0 only (1 is KL)."
            )

    def terminal(self, loss: Loss, outputs: Tensor, targets: Tensor) -> OutputCurvature:
        """Alpha times the exact Fisher matrix, shape (N*D, N*D)."""
        return loss.fisher(outputs, targets).scaled(self.alpha)
