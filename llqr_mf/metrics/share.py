"""A metric on one batch of many."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llqr_mf.losses import Loss
from llqr_mf.losses.base import Totals
from llqr_mf.losses.nothing import Nothing
from llqr_mf.operators.output_curvature import OutputCurvature

from .base import CostModel, Metric


@dataclass(frozen=True)
class Share(Metric):
    """Another metric's costs on one batch, so that those of all batches add up to the mean.

    Args:
        base: The metric.
        terminal_share: What part of the divergence's mean is the batch's.
        state_share: What part of the mean over samples is, for costs on layers' outputs.
    """

    base: Metric
    terminal_share: float
    state_share: float

    @staticmethod
    def of(base: Metric, part: Totals, whole: Totals) -> Share:
        """The share of a batch in all of them."""
        mass = base.mass(part)
        return Share(
            base,
            terminal_share=mass / base.mass(whole) if mass else 0.0,
            state_share=part.samples / whole.samples,
        )

    def terminal(self, loss: Loss, outputs: Tensor, targets: Tensor) -> OutputCurvature:
        """The base's times the share; zero where nothing counts."""
        if not self.terminal_share:
            return Nothing().hessian(outputs, targets)
        return self.base.terminal(loss, outputs, targets).scaled(self.terminal_share)

    def costate(self, loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """The base's times the share."""
        costate = self.base.costate(loss, outputs, targets)
        return None if costate is None else costate * self.terminal_share

    @property
    def may_curve(self) -> bool:
        """The base's."""
        return self.base.may_curve

    def mass(self, totals: Totals) -> float:
        """The base's."""
        return self.base.mass(totals)

    def cost_model(self, loss: Loss, outputs: Tensor, targets: Tensor) -> CostModel:
        """All of it for one batch."""
        costs = self.base.state_costs
        return CostModel(
            terminal=self.terminal(loss, outputs, targets),
            costate=self.costate(loss, outputs, targets),
            state_costs={key: cost * self.state_share for key, cost in costs.items()},
        )
