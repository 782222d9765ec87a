"""The spectrum of an operator as a smooth density, with confidence bands."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .draws import Kind
from .estimate import Estimate, mean_estimate, wide_of
from .probed import Probeable
from .spectral_sum import lanczos_runs

DECADES = 0.1
"""Default width of the kernel on a log scale, in decades."""

REACH = 4.0
"""How many widths of the kernel a default grid goes beyond the outermost nodes."""


@dataclass(frozen=True, eq=False)
class Band:
    """A curve and its pointwise confidence band; float64, shapes (g,).

    Attributes:
        grid: Where.
        mean: The estimate.
        lower: Lower end of the interval at each point, by Student's t over the vectors; not
            below 0. NaN where there is one vector.
        upper: Upper end.
    """

    grid: Tensor
    mean: Tensor
    lower: Tensor
    upper: Tensor


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """What Lanczos runs from random vectors saw of a spectrum: one discrete measure per vector.

    The mass of each is n, the number of eigenvalues; with `normalize` a method makes it 1. Each
    vector's curve is an independent sample of which the expectation is the curve of the whole
    spectrum, smoothed by the same kernel, but for the truncation: a rule of m steps is exact for
    polynomials of degree 2 m - 1, which take a Gaussian of width (range of the spectrum) / m within
    a few percent. So a narrower kernel shows the nodes of the rule and not the spectrum.

    The bands are of the random vectors alone. They assume samples close to normal: where few
    eigenvalues lie under the kernel they are skewed, and a band of few vectors holds less often.

    Attributes:
        nodes: float64, shape (vectors, steps), rising.
        weights: Likewise; they sum to n along each row.
        size: n.
        products: Vectors multiplied by the operator.
        seed: Of the random vectors.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    products: int
    seed: int

    def width(self, *, log: bool = False) -> float:
        """The default width of the kernel: (largest node - smallest) / steps, or 0.1 decades."""
        if log:
            return DECADES
        low, high = float(self.nodes.min()), float(self.nodes.max())
        # All nodes may be one eigenvalue, to rounding.
        return max((high - low) / self.nodes.shape[1], 1e-3 * max(abs(low), abs(high)), 1e-30)

    def grid(
        self,
        points: int = 500,
        *,
        width: float | None = None,
        log: bool = False,
        sign: Literal[1, -1] = 1,
    ) -> Tensor:
        """Evenly spaced points over all nodes and 4 widths beyond; in log10 |l| with `log`.

        Args:
            points: How many.
            width: Of the kernel.
            log: Whether for `density(log=True)`.
            sign: For it, the eigenvalues of which sign.

        Raises:
            ValueError: With `log`, there is no node of this sign.
        """
        width = _positive(self.width(log=log) if width is None else width)
        nodes = self._on_axis(log, sign)[0]
        nodes = nodes[nodes.isfinite()]
        if len(nodes) == 0:
            word = "positive" if sign > 0 else "negative"
            raise ValueError(f"there is no {word} node.")
        reach = REACH * width
        return torch.linspace(
            float(nodes.min()) - reach, float(nodes.max()) + reach, points, dtype=torch.float64
        )

    def density(
        self,
        grid: Tensor | None = None,
        *,
        width: float | None = None,
        log: bool = False,
        sign: Literal[1, -1] = 1,
        normalize: bool = False,
        level: float = 0.95,
    ) -> Band:
        """Eigenvalues per unit of l, smoothed by a Gaussian.

        Args:
            grid: Points, shape (g,); None takes `grid()`.
            width: Standard deviation of the Gaussian; None takes `width()`.
            log: Eigenvalues per decade instead: the density of log10 |l| over those of one sign.
                Points and width are then in decades. Nodes within rounding of zero,
                |l| <= 1e-15 max |l|, are left out.
            sign: Of the eigenvalues, with `log`.
            normalize: Divide by n.
            level: Of the band.
        """
        width = _positive(self.width(log=log) if width is None else width)
        if grid is None:
            grid = self.grid(width=width, log=log, sign=sign)
        nodes, weights = self._on_axis(log, sign)

        def kernel(z: Tensor) -> Tensor:
            return torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5 / width

        return self._band(grid, nodes, weights, lambda gap: kernel(gap / width), normalize, level)

    def cumulative(
        self,
        grid: Tensor | None = None,
        *,
        width: float | None = None,
        normalize: bool = False,
        level: float = 0.95,
    ) -> Band:
        """Eigenvalues below each point, smoothed by a Gaussian: the integral of `density`.

        Args:
            grid: Points, shape (g,); None takes `grid()`.
            width: Standard deviation of the Gaussian; None takes `width()`, 0 gives steps.
            normalize: Divide by n.
            level: Of the band.
        """
        width = self.width() if width is None else width
        if grid is None:
            grid = self.grid(width=width or None)

        def below(gap: Tensor) -> Tensor:
            if width == 0:
                return (gap >= 0).double()
            return torch.special.ndtr(gap / _positive(width))

        return self._band(grid, self.nodes, self.weights, below, normalize, level)

    def moments(self, order: int = 4) -> Estimate:
        """The traces tr A, tr A^2, ..., tr A^order; shape (order,).

        They are free of truncation up to the order 2 steps - 1.

        Raises:
            ValueError: `order` is beyond that.
        """
        most = 2 * self.nodes.shape[1] - 1
        if not 1 <= order <= most:
            raise ValueError(f"order is {order}: give 1 to 2 steps - 1 = {most}.")
        powers = [(self.weights * self.nodes**k).sum(1) for k in range(1, order + 1)]
        return mean_estimate(
            torch.stack(powers, 1),
            products=self.products,
            seed=self.seed,
            method="moments of a spectral density",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; `SpectralDensity.from_dict` takes them back."""
        return {
            "nodes": self.nodes.tolist(),
            "weights": self.weights.tolist(),
            "size": self.size,
            "products": self.products,
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> SpectralDensity:
        """What `to_dict` was made of."""
        nodes, weights = (
            torch.tensor(held[name], dtype=torch.float64) for name in ("nodes", "weights")
        )
        return cls(nodes, weights, held["size"], held["products"], held["seed"])

    def plot(
        self,
        ax: Any = None,
        *,
        log: bool = False,
        width: float | None = None,
        normalize: bool = False,
        level: float = 0.95,
    ) -> Any:
        """Draws the density on a log scale, with its band; needs matplotlib (`llqr_mf[plots]`).

        Args:
            ax: Axes to draw on; None makes a figure.
            log: Over log10 |l|, the negative eigenvalues as a curve of their own.
            width: Of the kernel; None takes `width()`.
            normalize: Divide by n.
            level: Of the band.

        Returns:
            The axes.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        wanted: list[tuple[Literal[1, -1], str]] = [(1, "positive"), (-1, "negative")]
        for sign, name in wanted if log else wanted[:1]:
            if log and not bool(self._on_axis(True, sign)[0].isfinite().any()):
                continue
            band = self.density(width=width, log=log, sign=sign, normalize=normalize, level=level)
            x = band.grid.numpy()
            (line,) = ax.plot(x, band.mean.numpy(), label=f"{name} eigenvalues" if log else None)
            ends = band.lower.numpy(), band.upper.numpy()
            ax.fill_between(x, *ends, color=line.get_color(), alpha=0.3, linewidth=0)
        ax.set_yscale("log")
        total = 1 if normalize else self.size
        ax.set_ylim(bottom=1e-6 * total / float(band.grid[-1] - band.grid[0]))
        ax.set_xlabel("log10 |eigenvalue|" if log else "eigenvalue")
        share = "share of eigenvalues" if normalize else "eigenvalues"
        ax.set_ylabel(f"{share} per {'decade' if log else 'unit'}")
        if log:
            ax.legend()
        return ax

    def _on_axis(self, log: bool, sign: int) -> tuple[Tensor, Tensor]:
        """Nodes on the axis of a plot, and their weights; a node that is not shown is infinite."""
        if not log:
            return self.nodes, self.weights
        floor = 1e-15 * self.nodes.abs().max()
        shown = sign * self.nodes > floor
        nodes = torch.where(shown, self.nodes.abs(), torch.inf).log10()
        return nodes, torch.where(shown, self.weights, 0.0)

    def _band(
        self,
        grid: Tensor,
        nodes: Tensor,
        weights: Tensor,
        kernel: Any,
        normalize: bool,
        level: float,
    ) -> Band:
        if grid.ndim != 1:
            raise ValueError(f"grid has shape {tuple(grid.shape)}: give points (g,).")
        if not 0 < level < 1:
            raise ValueError(f"level is {level}: give a number between 0 and 1.")
        grid = grid.double().cpu()
        if normalize:
            weights = weights / self.size
        curves = torch.stack(
            [
                kernel(grid.unsqueeze(1) - own) @ weight
                for own, weight in zip(nodes, weights, strict=True)
            ]
        )
        made = mean_estimate(curves, products=self.products, seed=self.seed, method="density")
        wide = wide_of(level, len(curves)) * made.standard_error
        return Band(grid, made.value, (made.value - wide).clamp(min=0), made.value + wide)


def spectral_density(
    A: Probeable,
    *,
    vectors: int = 10,
    steps: int = 50,
    probes: Kind = "rademacher",
    seed: int = 0,
    reorthogonalize: bool = True,
    columns: int | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> SpectralDensity:
    """The density of eigenvalues by stochastic Lanczos quadrature.

    Lin, Saad and Yang (2016), section 3.2; for Hessians of networks Ghorbani, Krishnan and Xiao
    (2019). Products: vectors * steps. Memory: see `solvers.quadrature.tridiagonalize`.

    Args:
        A: A symmetric operator or matrix, or a problem, whose Hessian with its damping is meant.
        vectors: Random vectors.
        steps: Lanczos steps for each; they set the resolution.
        probes: Distribution of the vectors.
        seed: Of the vectors.
        reorthogonalize: Whether the Lanczos vectors are kept orthogonal, and in memory. Without it
            eigenvalues that have converged come more than once, their weight shared.
        columns: Vectors in memory at a time.
        progress: Show a progress bar.
        checkpoint: A folder to go on from; see `spectral_sum`.

    Returns:
        Nodes and weights on the CPU, from which curves and bands are made.

    Raises:
        ValueError: An option is out of range.
    """
    runs, probed = lanczos_runs(
        A,
        vectors=vectors,
        steps=steps,
        probes=probes,
        seed=seed,
        reorthogonalize=reorthogonalize,
        columns=columns,
        progress=progress,
        checkpoint=checkpoint,
    )
    nodes, weights = runs.rule()
    # A unit vector times n has the right trace in expectation, and no more noise.
    weights = weights * probed.size
    return SpectralDensity(nodes.cpu(), weights.cpu(), probed.size, probed.products, seed)


def _positive(width: float) -> float:
    if not 0 < width < float("inf"):
        raise ValueError(f"width is {width}: give a positive number, or None.")
    return width
