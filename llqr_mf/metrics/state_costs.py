"""Costs on the outputs of layers in between."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from linear_operator import LinearOperator
from torch import Tensor

from llqr_mf.losses import Loss
from llqr_mf.losses.base import Totals
from llqr_mf.operators.output_curvature import OutputCurvature

from .base import Metric, StateCostSpec
from .gauss_newton import GaussNewton


@dataclass(frozen=True, eq=False)
class StateCosts(Metric):
    """Another metric, with costs on layers' outputs added (structural damping, for one).

    Args:
        costs: By layer name, or layer index t for the OUTPUT of layer t. A number mu >= 0 costs
            mu/2 times the MEAN over the batch of |dx_n|^2, so Q = (mu/N) I with N samples. A
            tensor or operator is Q itself, on the flattened output of the whole batch (samples
            first), and carries its own 1/N.
        base: The metric at the network's output.
    """

    costs: Mapping[str | int, StateCostSpec]
    _: KW_ONLY
    base: Metric = field(default_factory=GaussNewton)

    def __post_init__(self) -> None:
        for key, cost in self.costs.items():
            _check_key(key)
            _check_cost(key, cost)
        if not isinstance(self.base, Metric):
            raise TypeError(f"base is {self.base!r}: give a Metric, such as GaussNewton().")
        object.__setattr__(self, "costs", MappingProxyType(dict(self.costs)))

    def __reduce__(self) -> Any:
        """Pickled by its arguments: a read-only view of a mapping has no pickle of its own."""
        return partial(StateCosts, base=self.base), (dict(self.costs),)

    @property
    def state_costs(self) -> Mapping[str | int, StateCostSpec]:
        """The base's costs and these; one may not replace another."""
        twice = set(self.base.state_costs) & set(self.costs)
        if twice:
            raise ValueError(
                f"both StateCosts and its base put a cost on {sorted(map(str, twice))}: add them "
                "up and give one."
            )
        return MappingProxyType({**self.base.state_costs, **self.costs})

    def terminal(self, loss: Loss, outputs: Tensor, targets: Tensor) -> OutputCurvature:
        """The base's Q_T, shape (N*D, N*D)."""
        return self.base.terminal(loss, outputs, targets)

    @property
    def may_curve(self) -> bool:
        """The base's."""
        return self.base.may_curve

    def mass(self, totals: Totals) -> float:
        """The base's."""
        return self.base.mass(totals)

    def of_batch(self, place: int) -> StateCosts:
        """With the base's draws."""
        return replace(self, base=self.base.of_batch(place))

    def costate(self, loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """The base's p_T, of the outputs' shape."""
        return self.base.costate(loss, outputs, targets)


def _check_key(key: object) -> None:
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise TypeError(f"key {key!r} of costs is no layer: give a layer's name or its index t.")
    if isinstance(key, int) and key < 0:
        raise ValueError(f"key {key} of costs is negative: layers are counted from 0.")


def _check_cost(key: object, cost: object) -> None:
    if isinstance(cost, bool) or not isinstance(cost, int | float | Tensor | LinearOperator):
        raise TypeError(
            f"cost {key!r} is a {type(cost).__name__}: give a number mu >= 0 for (mu/N) I, or Q as "
            "a tensor or a LinearOperator."
        )
    if isinstance(cost, int | float):
        if not (math.isfinite(cost) and cost >= 0):
            raise ValueError(f"cost {key!r} is {cost}: give a finite mu >= 0.")
        return
    if len(cost.shape) != 2 or cost.shape[0] != cost.shape[1]:
        raise ValueError(
            f"cost {key!r} has shape {tuple(cost.shape)}: Q must be square, one row per entry of "
            "the layer's flattened output for the whole batch."
        )
    if isinstance(cost, Tensor) and not torch.allclose(cost, cost.mT):
        raise ValueError(f"cost {key!r} is not symmetric: give (Q + Q.mT) / 2.")
