"""The authors' fitter: heavy-ball steps on all tensors of M at once, for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..preconditioners.base import Structure
from ..preconditioners.chart import Chart
from .authors_ekronecker import AuthorsEKronecker
from .found import Found
from .objective import FitFailed, ProbeObjective

LEAST_ENTRY = 1e-8
"""Where the authors clip a diagonal."""


@dataclass(frozen=True)
class Momentum:
    """The recipe of Dufort-Labbe et al. (arXiv:2605.04230), as their code has it.

    Args:
        steps: Number of steps.
        learning_rate: Their length.
        momentum: Of the heavy ball.
        clip: Largest 2-norm of the gradient of one tensor.
        ema: Share of the old M in the new one.
    """

    steps: int = 50
    learning_rate: float = 1e-3
    momentum: float = 0.9
    clip: float = 5.0
    ema: float = 0.95

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}: give at least 1.")
        if not (self.learning_rate > 0 and self.clip > 0):
            raise ValueError(
                f"learning_rate={self.learning_rate} and clip={self.clip} must be positive."
            )
        if not (0 <= self.momentum < 1 and 0 <= self.ema < 1):
            raise ValueError(
                f"momentum={self.momentum} and ema={self.ema} must be from 0 to less than 1."
            )


def fit_by_momentum(
    M: Structure,
    objective: ProbeObjective,
    *,
    recipe: Momentum,
    floor: float,
) -> Found:
    """Follows -dJ/d(tensors of M) from M, in place, and averages the result with the M given.

    J is that of the probe as it is (the authors normalise nothing). A step costs one product, and
    there is one more at the end: with w = H M v - v, dJ = <w, dM v>, by autograd through the
    closed form of M alone.

    Coordinates that are positive are clipped at 1e-8 after every step, as the authors do. They
    leave matrices free, and so M may become indefinite; here a matrix is free during the steps and
    projected once after them (`AuthorsEKronecker` is left as it is).

    Args:
        M: What is fitted.
        objective: With its one probe.
        recipe: The numbers.
        floor: Least eigenvalue relative to the mean, for the projection.
    """
    old, charts = M.clone(), M.charts()
    learned = _learned(M, charts)
    velocity = [torch.zeros_like(tensor) for tensor in learned]
    before = 0.0
    for step in range(recipe.steps):
        value, gradients = _gradients(M, objective, learned)
        if step == 0:
            before = value
        for tensor, v, gradient in zip(learned, velocity, gradients, strict=True):
            norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
            v.mul_(recipe.momentum).add_(gradient, alpha=min(1.0, recipe.clip / max(norm, 1e-30)))
            tensor.sub_(v, alpha=recipe.learning_rate)
        for chart in charts:
            if chart.elementwise:
                chart.put(chart.get().clamp(min=LEAST_ENTRY))
    if not all(bool(torch.isfinite(tensor).all()) for tensor in learned):
        raise FitFailed("the momentum steps diverged: M holds NaN or infinity")
    reached = M.clone()
    M.assign_(old)
    for chart, own in zip(charts, reached.charts(), strict=True):
        if not chart.elementwise:
            # Relative to the mean of the M given, which is positive.
            own.put(chart.project(own.get(), floor))
    M.blend_(reached, 1 - recipe.ema)
    after = objective.at(M)[0].value() * objective.unit
    return Found(before, after, recipe.steps)


def _gradients(
    M: Structure, objective: ProbeObjective, learned: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    """J and its gradient in the tensors, in the probe's own units."""
    (v,) = objective.rows
    for tensor in learned:
        tensor.requires_grad_()
    try:
        with torch.enable_grad():
            x = M.times_rows(v)
        with torch.no_grad():
            y = objective.curved(0, x.detach())
            value = float((x.double() * (y / 2 - v).double()).sum()) * objective.unit
            gradients = torch.autograd.grad(x, learned, (y - v) * objective.unit)
    finally:
        for tensor in learned:
            tensor.requires_grad_(False)
    if not abs(value) < float("inf"):
        raise FitFailed("a product with the Hessian, or M itself, holds NaN or infinity")
    return value, list(gradients)


def _learned(M: Structure, charts: Sequence[Chart]) -> list[Tensor]:
    """The tensors that the charts write, seen by writing; all where there is no chart."""
    if isinstance(M, AuthorsEKronecker):
        return list(M.tensors.values())
    kept = {name: tensor.clone() for name, tensor in M.tensors.items()}
    for chart in charts:
        chart.put(2 * chart.get())
    changed = [name for name, tensor in M.tensors.items() if not torch.equal(tensor, kept[name])]
    for name, tensor in M.tensors.items():
        tensor.copy_(kept[name])
    return [M.tensors[name] for name in changed]
