"""What a metric is: the quadratic model's cost at the output and in between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from linear_operator import LinearOperator
from torch import Tensor

from llqr_mf.losses import Loss
from llqr_mf.losses.base import Totals
from llqr_mf.operators.output_curvature import OutputCurvature

StateCostSpec: TypeAlias = float | LinearOperator | Tensor
"""A cost on a layer's output: mu for (mu/N) I, or Q itself."""


@dataclass(frozen=True, eq=False)
class CostModel:
    """The costs that a metric puts on one batch.

    Args:
        terminal: Q_T, the Hessian of the divergence at the network's output; None for no cost.
        costate: p_T, the divergence's gradient at the output, of the outputs' shape. Earlier
            layers' second derivatives are weighted by the adjoint that starts from it; None means
            that it vanishes, so they have no such terms.
        state_costs: Costs on layers' outputs, by layer name or index.
    """

    terminal: OutputCurvature | None
    costate: Tensor | None = None
    state_costs: Mapping[str | int, StateCostSpec] = field(default_factory=dict)


class Metric(ABC):
    """A divergence that measures a step by the change it makes to the network's output.

    Its Hessian where the two outputs coincide is the curvature of the quadratic model, a mean
    over the batch like the loss.
    """

    @abstractmethod
    def terminal(self, loss: Loss, outputs: Tensor, targets: Tensor) -> OutputCurvature:
        """Q_T, shape (N*D, N*D)."""

    def costate(self, loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """P_T, of the outputs' shape; None where the divergence's gradient vanishes."""
        return None

    @property
    def may_curve(self) -> bool:
        """Whether `costate` may be more than None: whether layers must keep second derivatives."""
        return type(self).costate is not Metric.costate

    def mass(self, totals: Totals) -> float:
        """What the curvature's mean divides by on data with these totals.

        Data that come in batches have a mean, too: that of each batch times its mass is added up
        and divided by the mass of them all. So a mass is a function of totals that makes a sum of
        the product with the curvature; it need not be one itself.
        """
        return totals.fisher

    def of_batch(self, place: int) -> Metric:
        """The metric for batch number `place` of many: one that draws, draws anew for each."""
        return self

    @property
    def state_costs(self) -> Mapping[str | int, StateCostSpec]:
        """Costs on layers' outputs; none unless the metric says so."""
        return {}

    def cost_model(self, loss: Loss, outputs: Tensor, targets: Tensor) -> CostModel:
        """All of it for one batch."""
        return CostModel(
            terminal=self.terminal(loss, outputs, targets),
            costate=self.costate(loss, outputs, targets),
            state_costs=self.state_costs,
        )
