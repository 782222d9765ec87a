"""Damping that follows how well the quadratic model predicts the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LevenbergMarquardt:
    """The Levenberg-Marquardt rule on the reduction ratio rho = actual / predicted decrease.

    Below `low` damping is multiplied by `increase`, above `high` divided by `decrease`
    (Martens 2010, section 4.1, has 1/4, 3/4 and 3/2). A step with rho <= `accept` is not worth
    taking.

    Args:
        damping: Current damping, > 0.
        low: Ratio under which damping grows.
        high: Ratio over which it falls.
        increase: Factor of growth, > 1.
        decrease: Factor of fall, > 1.
        accept: Ratio over which a step should be accepted.
        minimum: Least damping.
        maximum: Greatest damping.
        ratio: The last rho, NaN before the first.
    """

    damping: float
    low: float = 0.25
    high: float = 0.75
    increase: float = 1.5
    decrease: float = 1.5
    accept: float = 0.0
    minimum: float = 1e-12
    maximum: float = 1e12
    ratio: float = math.nan

    def __post_init__(self) -> None:
        if not (self.damping > 0 and math.isfinite(self.damping)):
            raise ValueError(f"damping is {self.damping}: give a finite number > 0.")
        if not (self.low < self.high and self.increase > 1 and self.decrease > 1):
            raise ValueError("need low < high, and increase and decrease over 1.")

    def updated(self, *, actual: float, predicted: float) -> LevenbergMarquardt:
        """The rule after a step.

        Args:
            actual: Loss before minus loss after, on the same batch; NaN or infinite counts as a
                failed step.
            predicted: The model's decrease, `Solution.model_decrease`.
        """
        failed = not (math.isfinite(actual) and math.isfinite(predicted) and predicted > 0)
        ratio = -math.inf if failed else actual / predicted
        factor = 1.0
        if ratio < self.low:
            factor = self.increase
        elif ratio > self.high:
            factor = 1 / self.decrease
        damping = min(max(self.damping * factor, self.minimum), self.maximum)
        return replace(self, damping=damping, ratio=ratio)

    @property
    def accepted(self) -> bool:
        """Whether the last step should be kept."""
        return self.ratio > self.accept
