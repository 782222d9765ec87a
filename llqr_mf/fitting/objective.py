"""The objective of a fit: the LQR objective of steps -M v, over many probes v."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ..methods.base import Problem
from ..operators.base import MatrixFreeOperator
from ..preconditioners.base import Structure
from ..preconditioners.chart import Chart
from ..solvers.dots import row_dots


class FitFailed(Exception):
    """A probe, a product or a fitted tensor holds NaN or infinity."""


@dataclass(frozen=True)
class Moments:
    """J along the multiples of M: J(c M) = -c slope + c^2 bend / 2.

    Args:
        slope: sum v'M v.
        bend: sum (M v)'H (M v).
        square: sum |M v|^2.
    """

    slope: float
    bend: float
    square: float

    def __post_init__(self) -> None:
        if not abs(self.value()) < float("inf"):
            raise FitFailed("a product with the Hessian, or M itself, holds NaN or infinity")

    def value(self, c: float = 1.0) -> float:
        """J(c M)."""
        return c * (c * self.bend / 2 - self.slope)

    @property
    def best(self) -> float:
        """The positive c where J(c M) is least; 1 where it has no minimum there."""
        return self.slope / self.bend if self.slope > 0 and self.bend > 0 else 1.0


class ProbeObjective:
    """J(M) = sum_b sum_v 1/2 (M v)'H_b (M v) - v'M v, v over the probe rows of problem b.

    The caller scales rows by the square roots of their weights, which makes the sum the mean that
    is wanted. Inside they are scaled once more, so that the squares of a coordinate sum to 1 on
    average: J is quadratic in that number, and narrow precisions keep their range.

    Args:
        problems: H_b.
        rows: Probes of every problem, (k_b, P).
        like: M, for its dtype.
        bar: Counts products.

    Attributes:
        products: Condensed products spent, a rollout and an adjoint sweep each: a block of k rows
            is k of them.
    """

    def __init__(
        self, problems: Sequence[Problem], rows: Sequence[Tensor], like: Structure, bar: tqdm
    ) -> None:
        square = sum(float(row_dots(v, v).sum()) for v in rows)
        if not 0 < square < float("inf"):
            raise FitFailed(
                "the probes are all zero: there is nothing to fit"
                if square == 0
                else "a probe holds NaN or infinity: look at the gradients"
            )
        self.unit = square / problems[0].size
        self.hessians: list[MatrixFreeOperator] = [problem.hessian for problem in problems]
        self.rows = [v.to(like.dtype) / self.unit**0.5 for v in rows]
        self.products = 0
        self._bar = bar
        most = max(self.rows, key=len)
        self._out = torch.empty_like(most, dtype=problems[0].dtype)

    def curved(self, b: int, x: Tensor) -> Tensor:
        """H_b x for rows x. The next call overwrites the result."""
        self.products += len(x)
        self._bar.update(len(x))
        out = self.hessians[b]._rows_into(x.to(self._out.dtype), self._out[: len(x)])
        return out.to(x.dtype)

    def at(self, M: Structure) -> tuple[Moments, list[Tensor]]:
        """J along the multiples of M, and H M v for the probes of each problem."""
        slope = bend = square = 0.0
        products = []
        for b, v in enumerate(self.rows):
            x = M.times_rows(v)
            y = self.curved(b, x).clone()
            slope += float(row_dots(v, x).sum())
            bend += float(row_dots(x, y).sum())
            square += float(row_dots(x, x).sum())
            products.append(y)
        return Moments(slope, bend, square), products

    def residual(self, chart: Chart, products: Sequence[Tensor]) -> Tensor:
        """-dJ/dphi where the products are H M v, (n,)."""
        parts = zip(self.rows, products, strict=True)
        return _total([chart.pull(v, v - y) for v, y in parts])

    def right_side(self, chart: Chart) -> Tensor:
        """Sum T_v'v, the normal equations' right side where nothing but the chart is in M, (n,)."""
        return _total([chart.pull(v, v) for v in self.rows])

    def normal(self, chart: Chart, phi: Tensor) -> Tensor:
        """Sum T_v'H T_v phi, (n,), with T_v phi = chart.times(phi, v)."""
        return _total(
            [chart.pull(v, self.curved(b, chart.times(phi, v))) for b, v in enumerate(self.rows)]
        )


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    if not bool(torch.isfinite(total.sum())):
        raise FitFailed("a product with the Hessian holds NaN or infinity")
    return total
