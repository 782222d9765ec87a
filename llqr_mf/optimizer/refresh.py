"""How a structure follows the curvature of the model while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..fitting import FitReport, fit
from ..preconditioners.base import Structure
from ..preconditioners.baselines import curvature_factors, scaled_identity
from ..preconditioners.diagonal import Diagonal
from ..preconditioners.direct_sum import leaves
from ..preconditioners.ekronecker import EKronecker
from ..preconditioners.identity import Identity
from ..preconditioners.kronecker import Kronecker, factor_name
from ..preconditioners.moments import damped_inverses, set_eigenbases, trace
from ..preconditioners.scalar import Scalar
from ..preconditioners.sites import Site, sites
from ..preconditioners.squared_gradients import Bases, site_squares
from ..problem import LQRProblem

Learn = Literal["closed_form", "cg", "momentum"]


@dataclass(frozen=True)
class Recipe:
    """How M is learned from a batch.

    Args:
        learn: "closed_form": the inverse of a running mean of the curvature in the form of the
            structure (Jacobi, K-FAC, EKFAC). "cg": that, then `fit` on the LQR objective, with its
            cross-layer terms, kept only if the objective on a held-out batch falls. "momentum":
            the LLQR authors' recipe alone.
        damping: lambda, added to the mean curvature.
        ema: The share that the past keeps at a refresh, once there have been 1 / (1 - ema) of them;
            before, all refreshes count alike.
        samples: Draws of random signs per refresh, for the curvature's second moments; None for
            all outputs.
        probes: Random-sign probes, for the weights that have no closed form and for "cg".
    """

    learn: Learn = "closed_form"
    damping: float = 1e-3
    ema: float = 0.8
    samples: int | None = 1
    probes: int = 8

    def __post_init__(self) -> None:
        if self.learn not in ("closed_form", "cg", "momentum"):
            raise ValueError(f"learn={self.learn!r}: choose 'closed_form', 'cg' or 'momentum'.")
        if not 0 < self.damping < float("inf"):
            raise ValueError(f"damping is {self.damping}: give a finite number > 0.")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}: it is a share, from 0 to less than 1.")
        for name, count in (("samples", self.samples), ("probes", self.probes)):
            if count is not None and count < 1:
                raise ValueError(f"{name} is {count}: give at least 1.")


class Refresher:
    """M, and what it remembers of past refreshes.

    Args:
        structure: M, written in place.
        recipe: How it is learned.
        generator: Of random signs.
    """

    def __init__(self, structure: Structure, recipe: Recipe, generator: torch.Generator) -> None:
        self.structure, self.recipe, self.generator = structure, recipe, generator
        self.factors: dict[str, Tensor] = {}
        self.count = 0
        if recipe.learn == "momentum":
            return
        for part in leaves(structure):
            if type(part) not in _UPDATES and recipe.learn == "closed_form":
                raise ValueError(
                    f"'{part.kind}' has no closed form: use learn='cg', or another structure."
                )

    def shares(self, batches: int) -> list[float]:
        """The weight of each of a refresh's batches in turn, so that all count alike."""
        whole = max(1 - self.recipe.ema, 1 / (self.count + 1))
        return [
            (whole / batches) / (1 - whole + j * whole / batches) for j in range(1, batches + 1)
        ]

    def update(self, problem: LQRProblem, weight: float) -> None:
        """M becomes that of the mean curvature, to which the problem's is added with `weight`."""
        if self.recipe.learn == "momentum":
            return
        for part in leaves(self.structure):
            update = _UPDATES.get(type(part))
            if update is not None:
                update(part, problem, weight, self)

    def fit(self, problems: Sequence[LQRProblem]) -> FitReport | None:
        """What the recipe fits on the LQR objective; the last problem is held out."""
        if self.recipe.learn == "closed_form":
            return None
        if self.recipe.learn == "momentum":
            return fit(self.structure, problems, method="momentum", exact=False)
        return fit(
            self.structure,
            problems,
            probes="curvature",
            count=self.recipe.probes,
            anchor=0.1,
            max_iterations=10,
            rtol=1e-2,
            generator=self.generator,
            exact=False,
        )

    # ---- what the updates share

    def mixed_factors(
        self, part: Kronecker | EKronecker, problem: LQRProblem, weight: float
    ) -> dict[str, list[Tensor]]:
        """The mean Kronecker factors of every weight, this problem's included."""
        recipe = self.recipe
        fresh = curvature_factors(
            *(problem, part, "expand", recipe.samples, recipe.probes, self.generator)
        )
        made: dict[str, list[Tensor]] = {}
        for site in part.sites:
            if site.name not in fresh:
                continue
            made[site.name] = list(fresh[site.name])
            if weight < 1:
                past = self._past(part, site, fresh[site.name])
                made[site.name] = [
                    p.lerp(f, weight) for p, f in zip(past, made[site.name], strict=True)
                ]
            if isinstance(part, Kronecker):
                for side, factor in enumerate(made[site.name]):
                    self.factors[factor_name(site, side)] = factor
        return made

    def _past(
        self, part: Kronecker | EKronecker, site: Site, fresh: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """E-Kronecker holds its past in its bases and spectrum; Kronecker's are kept apart."""
        if isinstance(part, EKronecker):
            return _recovered(part, site, fresh, self.recipe.damping)
        names = [factor_name(site, side) for side in range(len(fresh))]
        return [self.factors.get(name, new) for name, new in zip(names, fresh, strict=True)]

    def squares(
        self, problem: LQRProblem, chosen: Sequence[Site], bases: Bases
    ) -> dict[str, Tensor]:
        """The curvature's diagonal in some bases."""
        recipe = self.recipe
        return site_squares(
            *(problem, chosen, bases),
            samples=recipe.samples,
            probes=recipe.probes,
            generator=self.generator,
        )


def _recovered(
    part: EKronecker, site: Site, fresh: Sequence[Tensor], damping: float
) -> list[Tensor]:
    """Past factors V_i diag(s_i) V_i', s_i the spectrum's mean over the other sides.

    Eigenvectors do not depend on a factor's scale, which is made that of the fresh one.
    """
    curvature = (1 / part.spectrum(site) - damping).clamp(min=0)
    made = []
    for side, (basis, factor) in enumerate(zip(part.bases(site), fresh, strict=True)):
        values = curvature.movedim(side, 0).flatten(1).mean(1)
        values = values * (trace(factor) / values.sum().clamp(min=torch.finfo(values.dtype).tiny))
        if factor.ndim == 1:
            made.append(values)
        else:
            made.append(values.diag() if basis is None else (basis * values) @ basis.mT)
    return made


def _ekronecker(part: EKronecker, problem: LQRProblem, weight: float, mean: Refresher) -> None:
    factors = mean.mixed_factors(part, problem, weight)
    # The curvature is averaged, not its inverse: M becomes M^{-1} for a while.
    for site in part.sites:
        part.spectrum(site).reciprocal_()
    set_eigenbases(part, factors)
    bases = {site.name: part.bases(site) for site in part.sites}
    squares = mean.squares(problem, part.sites, bases)
    for site in part.sites:
        fresh = squares[site.name] + mean.recipe.damping
        part.spectrum(site).lerp_(fresh, weight).reciprocal_()


def _kronecker(part: Kronecker, problem: LQRProblem, weight: float, mean: Refresher) -> None:
    factors = mean.mixed_factors(part, problem, weight)
    vectors = [site for site in part.sites if site.name not in factors]
    squares = mean.squares(problem, vectors, {site.name: [None] for site in vectors})
    for site in part.sites:
        if site.name in squares:
            held = part.tensors[factor_name(site, 0)]
            _average_inverse(held, squares[site.name] + mean.recipe.damping, weight)
            continue
        for side, inverse in enumerate(damped_inverses(factors[site.name], mean.recipe.damping)):
            part.tensors[factor_name(site, side)].copy_(inverse)


def _diagonal(part: Diagonal, problem: LQRProblem, weight: float, mean: Refresher) -> None:
    chosen = sites(part.blueprint, biases="diagonal", kernels="matrix")
    squares = mean.squares(
        problem, chosen, {site.name: [None] * len(site.sides) for site in chosen}
    )
    for site in chosen:
        fresh = squares[site.name].reshape(site.shape) + mean.recipe.damping
        _average_inverse(part.tensors[f"{site.name}.diagonal"], fresh, weight)


def _scalar(part: Scalar, problem: LQRProblem, weight: float, mean: Refresher) -> None:
    best = scaled_identity(problem)
    for name, held in part.tensors.items():
        _average_inverse(held, 1 / best.tensors[name], weight)


def _average_inverse(held: Tensor, fresh: Tensor, weight: float) -> None:
    """1 / held and fresh averaged, and inverted again, in place."""
    held.reciprocal_().lerp_(fresh, weight).reciprocal_()


def _identity(part: Identity, problem: LQRProblem, weight: float, mean: Refresher) -> None:
    """Nothing to learn."""


_UPDATES: dict[type[Structure], Callable[..., None]] = {
    EKronecker: _ekronecker,
    Kronecker: _kronecker,
    Diagonal: _diagonal,
    Scalar: _scalar,
    Identity: _identity,
}
