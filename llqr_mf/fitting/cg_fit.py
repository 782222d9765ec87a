"""Fitting by the normal equations of one chart of M after another, within its bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..preconditioners.base import Structure
from ..preconditioners.chart import Chart
from .found import Found
from .objective import FitFailed, Moments, ProbeObjective
from .projected import Above, Definite, Feasible, dot, minimise_projected

LEAST_FALL = 1e-6
"""Relative fall of the objective in a sweep below which there is no further sweep."""

RARE = 1e-2
"""A coordinate that the probes hardly see is scaled as if they saw this share of the mean."""


@dataclass(frozen=True)
class Stopping:
    """When `fit_by_cg` stops, and what holds it back; see `fit`.

    Args:
        anchor: Weight of the distance to the old M.
        sweeps: Over the charts, at most; None for 1 if there is one chart, else 3.
        max_iterations: Of a solve.
        rtol: Of a solve, relative to the right side of its normal equations.
        floor: Least eigenvalue relative to the mean.
    """

    anchor: float = 0.0
    sweeps: int | None = None
    max_iterations: int = 10
    rtol: float = 1e-4
    floor: float = 1e-6


def fit_by_cg(M: Structure, objective: ProbeObjective, *, options: Stopping) -> Found:
    """Minimises the objective in M, in place: its best multiple first, then chart by chart.

    The multiple costs the one product that the first solve starts with anyway. A chart is solved
    with its bounds active, entries' or eigenvalues' (`minimise_projected`), so that M is positive
    definite all along and the objective never rises.
    """
    moments, products = objective.at(M)
    before = moments.value()
    c = _scale_to_best(M, moments)
    value = moments.value(c)
    products = [product.mul_(c) for product in products]
    # The Rayleigh quotient of H along M v; the mean square of a probe's coordinate is 1.
    strength = options.anchor * abs(moments.bend) / moments.square
    charts = M.charts()
    sweeps = options.sweeps or (1 if len(charts) == 1 else 3)
    iterations, remark = 0, ""
    for sweep in range(sweeps):
        value_before = value
        for i, chart in enumerate(charts):
            if sweep + i > 0:
                moments, products = objective.at(M)
                value = moments.value()
            turn = _Turn(objective, chart, products, strength)
            products = []
            change, taken, bends_up = turn.solve(options)
            value += change
            iterations += taken
            if not bends_up:
                remark = "a direction without positive curvature ended a solve: add damping"
        if not value < value_before - LEAST_FALL * abs(value_before):
            break
    return Found(before * objective.unit, value * objective.unit, iterations, remark=remark)


def _scale_to_best(M: Structure, moments: Moments) -> float:
    """Scales M to its best multiple, and says by how much; 1 where it cannot be scaled."""
    try:
        M.scale_(moments.best)
    except NotImplementedError:
        return 1.0
    return moments.best


class _Turn:
    """The normal equations A phi = b of one chart, and how they are solved.

    A = sum T_v'H T_v + anchor, T_v phi = chart.times(phi, v); the anchor holds phi where it is.
    """

    def __init__(
        self,
        objective: ProbeObjective,
        chart: Chart,
        products: Sequence[Tensor],
        strength: float,
    ) -> None:
        self.objective, self.chart = objective, chart
        self.phi = chart.get()
        self.residual = objective.residual(chart, products)
        self.right = objective.right_side(chart)
        self.anchor = strength * chart.mass() if strength > 0 else torch.zeros_like(self.phi)

    def product(self, phi: Tensor) -> Tensor:
        """A phi."""
        return self.objective.normal(self.chart, phi).add_(self.anchor * phi)

    def solve(self, options: Stopping) -> tuple[float, int, bool]:
        """Moves the chart; the change of the objective, iterations, and whether H bent up."""
        phi, right = self.phi, self.right + self.anchor * self.phi
        if not dot(phi, self.right) > 0:
            return 0.0, 0, True
        feasible: Feasible
        if self.chart.elementwise:
            lower = self.chart.project(torch.full_like(phi, -torch.inf), options.floor)
            feasible = Above(torch.minimum(lower, phi))
            # Were H diagonal in these coordinates, A = diag(right / phi) at the minimum.
            seen = self.right + RARE * self.right.mean()
            scaling = 1 / (seen / phi + self.anchor)
        else:
            feasible = Definite(self.chart, options.floor)
            scaling = (phi.square().sum() / (phi * right).sum()).expand_as(phi)
        found = minimise_projected(
            self.product,
            phi,
            self.residual,
            feasible,
            scaling=scaling,
            tolerance=options.rtol * float((right.square() * scaling).sum()) ** 0.5,
            max_iterations=options.max_iterations,
        )
        if not bool(torch.isfinite(found.x).all()):
            raise FitFailed("a solve of the normal equations gave NaN or infinity")
        self.chart.put(found.x)
        move = found.x - phi
        change = found.change - dot(self.anchor * move, move) / 2
        return change, found.iterations, found.bends_up
