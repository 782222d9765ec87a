"""Where a problem made from a network comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .losses import Loss
    from .losses.base import Totals
    from .metrics import Metric
    from .network import Layer, Linearization


@dataclass(frozen=True, eq=False)
class NetworkOrigin:
    """The network, batch, loss and metric of a problem.

    Args:
        layers: The layers of the split.
        loss: The loss.
        metric: The metric.
        outputs: The network's outputs on the batch.
        loss_value: The loss there, a mean.
        totals: What the means over the batch divide by.
        linearization: The linearised calls of every layer.
    """

    layers: tuple[Layer, ...]
    loss: Loss
    metric: Metric
    outputs: Tensor
    loss_value: Tensor
    totals: Totals
    linearization: Linearization
