"""How good a preconditioner is on whole batches: its LQR objective beside the exact optimum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods.base import Problem
from ..solve import solve
from ..solvers.dots import row_dots
from ..solvers.status import Code

Apply = Callable[[Tensor], Tensor]
"""M times rows (k, P)."""


@dataclass(frozen=True, eq=False)
class Exact:
    """The exact step of a problem.

    Args:
        step: u* = -H^{-1} g, flat (P,); None where there is none (H is not positive definite along
            the way, or something is not finite).
        optimum: J(u*) = -1/2 g'H^{-1}g.
        products: Condensed products spent.
    """

    step: Tensor | None
    optimum: float
    products: int


@torch.no_grad()
def exact_step(problem: Problem, *, rtol: float | None = None, progress: bool = False) -> Exact:
    """Solves one problem (`solve`, method "auto").

    Args:
        problem: Which.
        rtol: True relative residual. None: 1e-6, and 1e-2 in half precisions.
        progress: Show a progress bar.
    """
    if not bool(torch.isfinite(problem.gradient).all()):
        return Exact(None, math.nan, 0)
    solution = solve(problem, rtol=rtol, progress=progress)
    optimum = -float(solution.model_decrease)
    bad = (Code.NEGATIVE_CURVATURE, Code.INDEFINITE, Code.NOT_FINITE)
    if solution.status.code in bad or not math.isfinite(optimum):
        return Exact(None, math.nan, solution.products)
    return Exact(solution.step, optimum, solution.products)


@dataclass(frozen=True)
class Measured:
    """A preconditioner on the full gradients g_b of some problems; means over them.

    Args:
        slope: g'M g.
        bend: (M g)'H (M g).
        cosine: Between -M g and the exact step; NaN where that is not known.
    """

    slope: float
    bend: float
    cosine: float

    @property
    def objective(self) -> float:
        """J(-M g)."""
        return self.bend / 2 - self.slope

    @property
    def multiple(self) -> float:
        """The c at which J(-c M g) is least; NaN where there is none."""
        return self.slope / self.bend if self.bend > 0 else math.nan

    @property
    def best(self) -> float:
        """J(-c M g) at that c."""
        return -self.slope * self.multiple / 2


@torch.no_grad()
def measure(
    candidates: Sequence[Apply], problems: Sequence[Problem], exact: Sequence[Exact | None]
) -> list[Measured]:
    """Measures preconditioners: one product per candidate and problem, those of a problem as one.

    Args:
        candidates: M_1, M_2, ...
        problems: On which.
        exact: Their exact steps, or None.
    """
    slopes, bends, cosines = ([[0.0] * len(problems) for _ in candidates] for _ in range(3))
    for b, (problem, best) in enumerate(zip(problems, exact, strict=True)):
        g = problem.gradient.unsqueeze(0)
        x = torch.cat([apply(g).to(g.dtype) for apply in candidates])
        y = problem.hessian.times_rows(x)
        wide = g.expand_as(x)
        slope, bend = row_dots(wide, x).tolist(), row_dots(x, y).tolist()
        cosine = [math.nan] * len(candidates)
        if best is not None and best.step is not None:
            u = best.step.unsqueeze(0).expand_as(x)
            norms = (row_dots(x, x) * row_dots(u, u)).sqrt()
            cosine = (-row_dots(x, u) / norms).tolist()
        for i in range(len(candidates)):
            slopes[i][b], bends[i][b], cosines[i][b] = slope[i], bend[i], cosine[i]
    return [
        Measured(mean(slopes[i]), mean(bends[i]), mean(cosines[i])) for i in range(len(candidates))
    ]


def mean(values: Sequence[float]) -> float:
    """Of a few numbers; NaN of none."""
    return sum(values) / len(values) if values else math.nan
