"""M as the inverse of a running mean of the curvature, in the form of its structure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..preconditioners.base import Structure
from ..preconditioners.baselines import curvature_factors, scaled_identity
from ..preconditioners.diagonal import Diagonal
from ..preconditioners.direct_sum import leaves
from ..preconditioners.ekronecker import EKronecker
from ..preconditioners.identity import Identity
from ..preconditioners.kronecker import Kronecker, factor_name
from ..preconditioners.low_rank import LowRank
from ..preconditioners.moments import damped_inverses, set_eigenbases, trace
from ..preconditioners.probes import curvature_probes
from ..preconditioners.scalar import Scalar
from ..preconditioners.sites import Site, sites
from ..preconditioners.squared_gradients import Bases, site_squares
from ..problem import LQRProblem
from .recipe import Recipe


class RefusedError(RuntimeError):
    """The curvature of a batch is nothing to learn from."""


class RunningMean:
    """Adds the curvature of one batch after another to M, in place.

    The curvature is averaged and not its inverse: 1 / D for a diagonal or a spectrum, the factors
    for Kronecker. E-Kronecker holds its past in its bases and spectrum. What a fit has made of M
    is a part of the past of whatever is averaged by M itself.

    Args:
        structure: M.
        recipe: Damping and random signs.
        generator: Of the signs.
    """

    def __init__(self, structure: Structure, recipe: Recipe, generator: torch.Generator) -> None:
        self.structure, self.recipe, self.generator = structure, recipe, generator
        self.factors: dict[str, Tensor] = {}
        """Mean Kronecker factors, for structures that hold only their inverses."""

    def add(self, problem: LQRProblem, weight: float) -> None:
        """M becomes that of (1 - weight) past + weight new; weight 1 forgets the past.

        With the authors' recipe, only where that needs directions to begin with.

        Raises:
            RefusedError: Something is NaN or infinite, or no curvature; M is in between then.
        """
        forms = STARTS if self.recipe.learn == "momentum" else {**CLOSED_FORMS, **STARTS}
        for part in leaves(self.structure):
            update = forms.get(type(part))
            if update is not None:
                update(part, problem, weight, self)
        held = (*self.structure.tensors.values(), *self.factors.values())
        if not all_finite(held):
            raise RefusedError("the curvature is NaN or infinite")

    def mixed_factors(
        self, part: Kronecker | EKronecker, problem: LQRProblem, weight: float
    ) -> dict[str, list[Tensor]]:
        """The mean Kronecker factors of every weight, this problem's included.

        Of E-Kronecker, zero where this problem has no curvature: its bases then stay.
        """
        recipe = self.recipe
        fresh = curvature_factors(
            *(problem, part, "expand", recipe.samples, recipe.probes, self.generator)
        )
        made: dict[str, list[Tensor]] = {}
        for site in part.sites:
            if site.name not in fresh:
                continue
            new = list(fresh[site.name])
            if not all_finite(new):
                raise RefusedError(f"the curvature of '{site.name}' is NaN or infinite")
            if isinstance(part, EKronecker) and not all(bool(factor.any()) for factor in new):
                # A product with a factor of zero is zero: its other factors say nothing either.
                new = [torch.zeros_like(factor) for factor in new]
            elif weight < 1:
                pairs = zip(self._past(part, site, new), new, strict=True)
                new = [past.lerp(factor, weight) for past, factor in pairs]
            made[site.name] = new
            if isinstance(part, Kronecker):
                self.factors.update({factor_name(site, i): f for i, f in enumerate(new)})
        return made

    def _past(
        self, part: Kronecker | EKronecker, site: Site, fresh: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        if isinstance(part, EKronecker):
            return _recovered(part, site, fresh, self.recipe.damping)
        names = [factor_name(site, side) for side in range(len(fresh))]
        return [self.factors.get(name, new) for name, new in zip(names, fresh, strict=True)]

    def squares(
        self, problem: LQRProblem, chosen: Sequence[Site], bases: Bases
    ) -> dict[str, Tensor]:
        """The curvature's diagonal in some bases, damping included."""
        recipe = self.recipe
        made = site_squares(
            *(problem, chosen, bases),
            samples=recipe.samples,
            probes=recipe.probes,
            generator=self.generator,
        )
        if not all_finite(made.values()):
            raise RefusedError("the curvature is NaN or infinite")
        return {name: square + recipe.damping for name, square in made.items()}


def _recovered(
    part: EKronecker, site: Site, fresh: Sequence[Tensor], damping: float
) -> list[Tensor]:
    """Past factors V_i diag(s_i) V_i', s_i the spectrum's mean over the other sides.

    Eigenvectors do not depend on a factor's scale, which is made that of the fresh one. A past
    without curvature is zero.
    """
    damped = 1 / part.spectrum(site)
    curvature = damped - damping
    # What the roundings of c + damping and of its two reciprocals leave is no curvature.
    rounding = 4 * torch.finfo(damped.dtype).eps * damped
    curvature = torch.where(curvature > rounding, curvature, torch.zeros_like(curvature))
    made = []
    for side, (basis, factor) in enumerate(zip(part.bases(site), fresh, strict=True)):
        values = _of_trace(curvature.movedim(side, 0).flatten(1).mean(1), trace(factor))
        if factor.ndim == 1:
            made.append(values)
        else:
            made.append(values.diag() if basis is None else (basis * values) @ basis.mT)
    return made


def _of_trace(values: Tensor, total: Tensor) -> Tensor:
    """Values >= 0 scaled to a sum, or zero where they are; nothing overflows on the way."""
    largest = values.max()
    shares = values / torch.where(largest > 0, largest, torch.ones_like(largest))
    # The largest share is one.
    return shares * (total / shares.sum().clamp(min=1))


def _ekronecker(part: EKronecker, problem: LQRProblem, weight: float, mean: RunningMean) -> None:
    factors = mean.mixed_factors(part, problem, weight)
    # While the bases turn, the spectrum is that of the curvature.
    for site in part.sites:
        part.spectrum(site).reciprocal_()
    set_eigenbases(part, factors)
    squares = mean.squares(problem, part.sites, {s.name: part.bases(s) for s in part.sites})
    for site in part.sites:
        part.spectrum(site).lerp_(squares[site.name], weight).reciprocal_()


def _kronecker(part: Kronecker, problem: LQRProblem, weight: float, mean: RunningMean) -> None:
    factors = mean.mixed_factors(part, problem, weight)
    vectors = [site for site in part.sites if site.name not in factors]
    squares = mean.squares(problem, vectors, {site.name: [None] for site in vectors})
    for site in part.sites:
        if site.name in squares:
            _average(part.tensors[factor_name(site, 0)], squares[site.name], weight)
            continue
        for side, inverse in enumerate(damped_inverses(factors[site.name], mean.recipe.damping)):
            part.tensors[factor_name(site, side)].copy_(inverse)


def _diagonal(
    part: Diagonal | LowRank, problem: LQRProblem, weight: float, mean: RunningMean
) -> None:
    chosen = sites(part.blueprint, biases="diagonal", kernels="matrix")
    units = {site.name: [None] * len(site.sides) for site in chosen}
    squares = mean.squares(problem, chosen, units)
    for site in chosen:
        fresh = squares[site.name].reshape(site.shape)
        _average(part.tensors[f"{site.name}.diagonal"], fresh, weight)


def _low_rank(part: LowRank, problem: LQRProblem, weight: float, mean: RunningMean) -> None:
    """Jacobi's D, and W the span of D^{1/2} J'L z: where the curvature is, as M sees it."""
    _diagonal(part, problem, weight, mean)
    probes = curvature_probes(problem, part.rank, mean.generator)
    rows = part.join(mean.structure.split(probes.to(part.dtype)), probes)
    if not all_finite([rows]):
        raise RefusedError("the curvature is NaN or infinite")
    part.set_basis(rows * part.flat().sqrt())


def _scalar(part: Scalar, problem: LQRProblem, weight: float, mean: RunningMean) -> None:
    try:
        best = scaled_identity(problem)
    except ValueError as error:  # no gradient, or no positive curvature along it
        raise RefusedError(str(error)) from error
    for name, held in part.tensors.items():
        _average(held, 1 / best.tensors[name], weight)


def _average(held: Tensor, fresh: Tensor, weight: float) -> None:
    """1 / held and fresh averaged, and inverted again, in place."""
    held.reciprocal_().lerp_(fresh, weight).reciprocal_()


def _identity(part: Identity, problem: LQRProblem, weight: float, mean: RunningMean) -> None:
    """Nothing to learn."""


Update = Callable[..., None]
CLOSED_FORMS: Mapping[type[Structure], Update] = {
    EKronecker: _ekronecker,
    Kronecker: _kronecker,
    Diagonal: _diagonal,
    Scalar: _scalar,
    Identity: _identity,
}
"""How a structure takes in a batch's curvature."""

STARTS: Mapping[type[Structure], Update] = {LowRank: _low_rank}
"""The same for structures that a fit has to complete."""


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no entry is NaN or infinite; one reading of the device."""
    held = [t.reshape(-1) for t in tensors if t.numel()]
    if not held:
        return True
    norms = torch._foreach_norm(held, float("inf"))
    wide = max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize)
    return bool(torch.stack([norm.to(wide) for norm in norms]).isfinite().all())
