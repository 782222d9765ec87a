"""The marginal likelihood of the Laplace posterior, and the prior and noise that raise it most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..operators.from_function import from_function
from ..output_sweep import required_factor
from ..probe.estimate import Estimate
from ..probe.logdet import logdet
from ..problem import LQRProblem
from ..solvers.dual import Dual
from ..streamed import StreamedProblem
from .laplace import Laplace, PriorMean
from .likelihood import Likelihood, likelihood_of, positive
from .posterior import DualPosterior

PRIORS = 57
"""Prior precisions of the default grid: four per decade."""

NOISES = 33
"""Noise variances tried for each."""

NOTHING = 1e-30
"""Losses and curvatures up to here are rounding."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """Log p(D) as a function of prior precision and noise, at fixed weights.

        log p(D) ~ log p(D | theta) - delta/2 |theta - mu|^2 - 1/2 sum_i log(1 + s gamma_i / delta)

    with gamma_i the eigenvalues of the mean curvature J'Q J (MacKay 1992, in the form of Immer et
    al. 2021). At weights that are optimal for another delta the formula leaves the gradient out.

    Args:
        eigenvalues: gamma_i > 0, float64; those of L'J J'L.
        likelihood: log p(D | theta) and s, by noise.
        squared_distance: |theta - mu|^2.
    """

    eigenvalues: Tensor
    likelihood: Likelihood
    squared_distance: float

    def __call__(self, prior_precision: Any, noise: Any = None) -> Tensor:
        """Log p(D), float64.

        Args:
            prior_precision: delta; a number or a tensor.
            noise: The variance v for "mse"; broadcast against it.
        """
        delta = torch.as_tensor(prior_precision, dtype=torch.float64)
        v = None if noise is None else torch.as_tensor(noise, dtype=torch.float64)
        ratio = self._ratio(delta, v)
        log_determinant = torch.log1p(self.eigenvalues * ratio.unsqueeze(-1)).sum(-1)
        fit = self.likelihood.log_likelihood(v).to(delta.device)
        return fit - delta / 2 * self.squared_distance - log_determinant / 2

    def effective_parameters(self, prior_precision: Any, noise: Any = None) -> Tensor:
        """How many weights the data determine: sum_i s gamma_i / (s gamma_i + delta)."""
        delta = torch.as_tensor(prior_precision, dtype=torch.float64)
        v = None if noise is None else torch.as_tensor(noise, dtype=torch.float64)
        scaled = self.eigenvalues * self._ratio(delta, v).unsqueeze(-1)
        return (scaled / (1 + scaled)).sum(-1)

    def _ratio(self, delta: Tensor, v: Tensor | None) -> Tensor:
        if self.likelihood.gaussian and v is None:
            raise ValueError("noise is missing: give the variance of the observations.")
        return torch.as_tensor(self.likelihood.scale(v)) / delta


@dataclass(frozen=True, eq=False)
class PriorChoice:
    """The best prior, and the curve it was found on.

    Args:
        prior_precision: delta.
        noise: v for "mse", else None.
        log_evidence: There.
        effective_parameters: There.
        prior_precisions: The grid, (n,).
        curve: log p(D) on it, each with its best noise; (n,).
        noises: Those, (n,); None without.
        at_edge: Whether the best is an end of a grid, so that a wider one may have better.
        evidence: The function itself.
    """

    prior_precision: float
    noise: float | None
    log_evidence: float
    effective_parameters: float
    prior_precisions: Tensor
    curve: Tensor
    noises: Tensor | None
    at_edge: bool
    evidence: Evidence

    def __str__(self) -> str:
        noise = "" if self.noise is None else f", noise variance {self.noise:.4g}"
        edge = " (at the edge of the grid)" if self.at_edge else ""
        return (
            f"prior precision {self.prior_precision:.4g}{noise}: log evidence "
            f"{self.log_evidence:.6g}, {self.effective_parameters:.1f} effective parameters{edge}"
        )


@torch.no_grad()
def log_evidence(
    laplace: Laplace,
    *,
    prior_mean: PriorMean = "zero",
    method: str = "auto",
    **options: Any,
) -> Estimate:
    """Log p(D) of one posterior, as a number (`float(...)`) with its standard error.

    Args:
        laplace: Whose.
        prior_mean: "zero", "weights" (the trained ones), or flat weights (P,).
        method: "exact" by the Cholesky factor of the dual, "stochastic" by `lq.probe.logdet`
            on I + G, which is not formed; "auto" takes the exact one where there is a factor.
        options: For `lq.probe.logdet`.

    Returns:
        An estimate; of the exact one, the standard error is zero.

    Raises:
        ValueError: The method is unknown, or "exact" of a posterior without a Gram matrix.
    """
    if method not in ("auto", "exact", "stochastic"):
        raise ValueError(f"method={method!r}: choose 'auto', 'exact' or 'stochastic'.")
    laplace.check()
    posterior = laplace.posterior
    rest = float(laplace.likelihood.log_likelihood(laplace.noise))
    values = posterior.problem.control_cost.block_values or ()
    parts = _distance(posterior.problem, prior_mean)
    rest -= laplace.scale / 2 * sum(v * d for v, d in zip(values, parts, strict=True))
    if isinstance(posterior, DualPosterior) and method != "stochastic":
        value = torch.tensor(rest - posterior.log_determinant / 2, dtype=torch.float64)
        return Estimate(value, torch.zeros_like(value), 0, 0, 0, "Cholesky factor of I + G")
    if method == "exact":
        raise ValueError("method='exact' needs a posterior by method='dual': use 'stochastic'.")
    found = _stochastic_logdet(posterior.problem, options)
    return replace(
        found,
        value=rest - found.value / 2,
        standard_error=found.standard_error / 2,
        bias_bound=found.bias_bound / 2,
    )


@torch.no_grad()
def choose_prior(
    of: Laplace | LQRProblem,
    *,
    prior_precisions: Sequence[float] | Tensor | None = None,
    noise: float | None = None,
    noises: Sequence[float] | Tensor | None = None,
    prior_mean: PriorMean = "zero",
    optimise: bool = True,
) -> PriorChoice:
    """The prior precision, and for "mse" the noise, of the largest marginal likelihood.

    The Gram matrix and its eigenvalues are made once: about ten times a Cholesky factor's time.
    Then every point of the grid costs a sum over them.

    Args:
        of: A problem, or a `Laplace` posterior by the dual, whose Gram matrix is used.
        prior_precisions: The grid; by default over 14 decades below the largest eigenvalue of the
            curvature times 100.
        noise: Holds the noise fixed.
        noises: Grid of the noise; by default two decades on either side of the mean squared error.
        prior_mean: "zero", "weights" (the trained ones), or flat weights (P,).
        optimise: Whether the best point of the grid is refined (L-BFGS on logarithms).

    Returns:
        The choice; hand `prior_precision` and `noise` to `Laplace` or `Laplace.with_prior`.

    Raises:
        ValueError: There is no Gram matrix, a grid is not positive, a noise is given without
            "mse", or loss or curvature is zero and a grid is needed.
        RuntimeError: The weights or the data changed since.
    """
    evidence = evidence_of(of, prior_mean=prior_mean)
    like = evidence.likelihood
    if not like.gaussian and (noise is not None or noises is not None):
        raise ValueError("a noise belongs to 'mse' alone: leave noise and noises out.")
    if noise is not None:
        noise = positive("noise", noise)
        noises = [noise]
    device = evidence.eigenvalues.device
    tried: Tensor | None = None
    if like.gaussian:
        middle = like.loss_value
        if noises is None and not middle > NOTHING:
            raise ValueError(
                f"the loss is {middle:.3g}: the network fits its targets exactly, and the noise of "
                "the largest evidence is zero. Give noise=, or a grid of noises."
            )
        tried = _grid("noises", noises, middle * 1e-2, middle * 1e2, NOISES, device)
        middle = float(tried.log().mean().exp())
    top = float(evidence.eigenvalues.max()) * float(like.scale(None if tried is None else middle))
    if prior_precisions is None and not top > NOTHING:
        raise ValueError(
            f"the curvature of the likelihood is {top:.3g} (a saturated softmax?): the data say "
            "nothing of the weights, and no prior is best. Give prior_precisions=, or train less."
        )
    grid = _grid("prior_precisions", prior_precisions, top * 1e-12, top * 1e2, PRIORS, device)
    curve, best = [], []
    for delta in grid:
        values = evidence(delta.expand(1 if tried is None else len(tried)), tried)
        place = int(values.argmax())
        curve.append(values[place])
        best.append(place)
    heights = torch.stack(curve)
    top_place = int(heights.argmax())
    found_noises = None if tried is None else tried[torch.tensor(best, device=device)]
    point = [float(grid[top_place])]
    bounds = [(float(grid.min()), float(grid.max()))]
    at_edge = len(grid) > 1 and top_place in (0, len(grid) - 1)
    if found_noises is not None and tried is not None and noise is None:
        point.append(float(found_noises[top_place]))
        bounds.append((float(tried.min()), float(tried.max())))
        at_edge |= len(tried) > 1 and best[top_place] in (0, len(tried) - 1)
    if optimise:
        point = _refined(evidence, point, bounds, noise)
    chosen_noise = (point[1] if len(point) > 1 else noise) if like.gaussian else None
    return PriorChoice(
        prior_precision=point[0],
        noise=chosen_noise,
        log_evidence=float(evidence(point[0], chosen_noise)),
        effective_parameters=float(evidence.effective_parameters(point[0], chosen_noise)),
        prior_precisions=grid,
        curve=heights,
        noises=found_noises,
        at_edge=at_edge,
        evidence=evidence,
    )


@torch.no_grad()
def evidence_of(of: Laplace | LQRProblem, *, prior_mean: PriorMean = "zero") -> Evidence:
    """The evidence as a function, by the eigenvalues of the Gram matrix; see `choose_prior`."""
    if isinstance(of, LQRProblem):
        # Any prior and noise will do: they are divided out again.
        noise = 1.0 if likelihood_of(of).gaussian else None
        of = Laplace(of, prior_precision=1.0, noise=noise, method="dual")
    if isinstance(of, Laplace):
        of.check()
    if not isinstance(of, Laplace) or not isinstance(of.posterior, DualPosterior):
        raise ValueError(
            "the eigenvalues need a Gram matrix: give an LQRProblem, or a Laplace by method='dual'."
        )
    uniform = of.posterior.problem.control_cost.uniform
    if uniform is None:
        raise ValueError(
            "the prior differs from parameter to parameter, so it is no one number: use "
            "log_evidence(laplace)."
        )
    eigenvalues = torch.linalg.eigvalsh(of.posterior.gram.double()).mul_(uniform).clamp_(min=0)
    distance = sum(_distance(of.posterior.problem, prior_mean))
    return Evidence(eigenvalues, of.likelihood, distance)


def _refined(
    evidence: Evidence,
    point: list[float],
    bounds: list[tuple[float, float]],
    noise: float | None,
) -> list[float]:
    device = evidence.eigenvalues.device

    # It takes as long to import as the rest of the library.
    from scipy.optimize import minimize

    def negative(logarithms: Any) -> tuple[float, Any]:
        with torch.enable_grad():
            x = torch.tensor(logarithms, dtype=torch.float64, device=device, requires_grad=True)
            values = x.exp()
            v = values[1] if len(point) > 1 else noise
            loss = -evidence(values[0], v)
            loss.backward()
        assert x.grad is not None
        return float(loss.detach()), x.grad.cpu().numpy()

    start = torch.tensor(point, dtype=torch.float64).log().numpy()
    limits = [tuple(torch.tensor(b, dtype=torch.float64).log().tolist()) for b in bounds]
    found = minimize(negative, start, jac=True, method="L-BFGS-B", bounds=limits)
    if found.fun <= negative(start)[0]:
        point = torch.tensor(found.x, dtype=torch.float64).exp().tolist()
    return point


def _grid(
    name: str, given: Any, low: float, high: float, count: int, device: torch.device
) -> Tensor:
    if given is None:
        ends = math.log10(low), math.log10(high)
        return torch.logspace(ends[0], ends[1], count, dtype=torch.float64, device=device)
    grid = torch.as_tensor(given, dtype=torch.float64, device=device).flatten()
    if len(grid) == 0 or not bool((grid.isfinite() & (grid > 0)).all()):
        raise ValueError(f"{name} must be a grid of positive numbers.")
    return grid.sort().values


def _distance(problem: LQRProblem | StreamedProblem, prior_mean: PriorMean) -> list[float]:
    """|theta_b - mu_b|^2 of every parameter."""
    if isinstance(prior_mean, str) and prior_mean not in ("zero", "weights"):
        raise ValueError(f"prior_mean={prior_mean!r}: choose 'zero' or 'weights', or give (P,).")
    if isinstance(problem, StreamedProblem):
        layers, names = problem._layers, problem.layout.names
    else:
        assert problem.origin is not None
        layers, names = problem.origin.layers, problem.names
    if isinstance(prior_mean, str) and prior_mean == "weights":
        return [0.0] * len(names)
    held = dict(layers[0].program.model.named_parameters())
    if isinstance(prior_mean, Tensor):
        if prior_mean.shape != (problem.size,):
            raise ValueError(
                f"prior_mean has shape {tuple(prior_mean.shape)}: give flat weights "
                f"({problem.size},)."
            )
        centre = problem.unflatten(prior_mean)
        return [float((held[n].double() - centre[n].double()).square().sum()) for n in names]
    return [float(torch.linalg.vector_norm(held[n], dtype=torch.float64) ** 2) for n in names]


def _stochastic_logdet(problem: LQRProblem | StreamedProblem, options: dict[str, Any]) -> Estimate:
    """Log det(I + G), G by products: it is smaller than Lambda's ratio and has its determinant."""
    # All eigenvalues are 1 at least, but for rounding.
    options = {"lower": 0.9, **options}
    if isinstance(problem, StreamedProblem):
        uniform, hessian = problem.control_cost.uniform, problem.hessian
        if uniform is None:
            raise ValueError("a streamed evidence needs one prior precision for all parameters.")
        ratio = from_function(
            lambda rows: hessian._rows(rows) / uniform,
            problem.size,
            dtype=problem.dtype,
            device=problem.device,
            rows=True,
        )
        return logdet(ratio, **options)
    dual = Dual(problem.system, required_factor(problem, "evidences"), None)
    observed = from_function(
        dual._matrix,
        dual.coordinates.size,
        dtype=torch.float64,
        device=problem.device,
        rows=True,
        columns=problem._columns,
    )
    return logdet(observed, **options)
