"""Preconditioners in closed form: what a fitted one is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..output_sweep import seeded
from ..problem import LQRProblem
from .blueprint import Like
from .diagonal import Diagonal
from .ekronecker import EKronecker
from .kronecker import Kronecker, factor_name
from .moments import (
    damped_inverses,
    inverse_root,
    moment_bases,
    normalised,
    row_moments,
    set_eigenbases,
    site_moments,
)
from .scalar import Scalar
from .sites import Biases, Kernels
from .squared_gradients import probe_parts, site_squares, squared_gradients
from .statistics import Sharing, layer_factors

__all__ = [
    "ekfac",
    "jacobi",
    "kfac",
    "kfac_bases",
    "moment_bases",
    "scaled_identity",
    "shampoo",
    "soap",
]


@torch.no_grad()
def scaled_identity(problem: LQRProblem) -> Scalar:
    """M = c I with the best c for this problem's gradient, c = g'g / g'Hg: steepest descent.

    Args:
        problem: Any.

    Raises:
        ValueError: The gradient is zero, or the curvature along it is not positive.
    """
    g = problem.gradient
    # The quotient does not depend on the length of g, whose square may leave the range.
    largest = float(g.abs().max())
    g = g / largest if 0 < largest < math.inf else g
    squared, curvature = float(g @ g), float(g @ (problem.hessian @ g))
    if not (squared > 0 and curvature > 0):
        raise ValueError(
            f"g'g is {squared:.3g} and g'Hg is {curvature:.3g}: the best multiple of the identity "
            "needs a gradient and positive curvature along it; add damping."
        )
    made = Scalar(problem)
    made.scale_(squared / curvature)
    return made


@torch.no_grad()
def jacobi(
    problem: LQRProblem,
    *,
    damping: float | None = None,
    samples: int | None = None,
    probes: int = 64,
    generator: torch.Generator | None = None,
) -> Diagonal:
    """M = 1 / (diag(J'Q_T J) + lambda), the inverse of the diagonal of H.

    Args:
        problem: From a network, whose only cost beside R is at the output, with a known factor.
        damping: lambda; None takes the problem's.
        samples: See `squared_gradients`.
        probes: See there.
        generator: See there.

    Raises:
        ValueError: The problem has no factor, or no number as damping.
    """
    lam = _damping(problem, damping)
    made = Diagonal(problem)
    squares = squared_gradients(problem, samples=samples, probes=probes, generator=generator)
    for name, square in squares.items():
        made.tensors[f"{name}.diagonal"].copy_(1 / (square + lam[name]))
    return made


@torch.no_grad()
def kfac(
    problem: LQRProblem,
    *,
    biases: Biases = "joined",
    kernels: Kernels = "auto",
    max_side: int = 2048,
    damping: float | None = None,
    sharing: Sharing = "expand",
    samples: int | None = None,
    probes: int = 64,
    generator: torch.Generator | None = None,
) -> Kronecker:
    """K-FAC: (G + lambda^(1/2) / pi I)^{-1} (x) (A + pi lambda^(1/2) I)^{-1} on every weight.

    A and G are those of `layer_factors` and pi^2 is the ratio of their mean eigenvalues (Martens
    and Grosse 2015, section 6.3; the terminal cost decides whether it is the Fisher or the
    Gauss-Newton matrix). Of d factors F_i with mean eigenvalues m_i, each gets
    lambda^(1/d) m_i / (prod m)^(1/d), which for two is the same. Weights that `layer_factors`
    leaves out take the partial traces of their block as factors, estimated from random-sign
    probes; vectors (biases on their own, norms) take the diagonal, as `jacobi` does.

    Args:
        problem: From a network, whose only cost beside R is at the output, with a known factor.
        biases: See `Kronecker`.
        kernels: See `Kronecker`.
        max_side: See `Kronecker`.
        damping: lambda; None takes the problem's (of a weight, for its joined bias too).
        sharing: See `layer_factors`.
        samples: See `layer_factors`.
        probes: How many, for what has no closed form.
        generator: Of all signs, on the problem's device; None takes one of seed 0.

    Raises:
        ValueError: The problem has no factor, or no number as damping.
    """
    made = Kronecker(problem, biases=biases, kernels=kernels, max_side=max_side)
    lam = _damping(problem, damping)
    source = seeded(problem, generator)
    factors = curvature_factors(problem, made, sharing, samples, probes, source)
    vectors = [site for site in made.sites if len(site.sides) == 1]
    bases = {site.name: [None] for site in vectors}
    squares = site_squares(
        problem, vectors, bases, samples=samples, probes=probes, generator=source
    )
    for site in made.sites:
        if site.name in squares:
            made.tensors[factor_name(site, 0)].copy_(1 / (squares[site.name] + lam[site.name]))
            continue
        for side, inverse in enumerate(damped_inverses(factors[site.name], lam[site.name])):
            made.tensors[factor_name(site, side)].copy_(inverse)
    return made


@torch.no_grad()
def ekfac(
    problem: LQRProblem,
    *,
    biases: Biases = "joined",
    kernels: Kernels = "auto",
    max_side: int = 2048,
    max_state: float | None = None,
    damping: float | None = None,
    sharing: Sharing = "expand",
    samples: int | None = None,
    probes: int = 64,
    generator: torch.Generator | None = None,
) -> EKronecker:
    """EKFAC: the eigenbases V of K-FAC's factors, and D = 1 / (diag(V'J'Q_T J V) + lambda).

    (George et al. 2018.) The spectrum is that of `squared_gradients`.

    Args:
        problem: From a network, whose only cost beside R is at the output, with a known factor.
        biases: See `EKronecker`.
        kernels: See `EKronecker`.
        max_side: See `EKronecker`.
        max_state: See `EKronecker`.
        damping: lambda; None takes the problem's (of a weight, for its joined bias too).
        sharing: See `layer_factors`.
        samples: See `layer_factors` and `squared_gradients`.
        probes: How many, for what has no closed form.
        generator: Of all signs, on the problem's device; None takes one of seed 0.

    Raises:
        ValueError: The problem has no factor, or no number as damping.
    """
    made = EKronecker(
        problem, biases=biases, kernels=kernels, max_side=max_side, max_state=max_state
    )
    lam = _damping(problem, damping)
    source = seeded(problem, generator)
    kfac_bases(problem, made, sharing=sharing, samples=samples, probes=probes, generator=source)
    squares = squared_gradients(problem, made, samples=samples, probes=probes, generator=source)
    for site in made.sites:
        made.spectrum(site).copy_(1 / (squares[site.name] + lam[site.name]))
    return made


@torch.no_grad()
def kfac_bases(
    problem: LQRProblem,
    structure: EKronecker,
    *,
    sharing: Sharing = "expand",
    samples: int | None = None,
    probes: int = 64,
    generator: torch.Generator | None = None,
) -> None:
    """Writes the eigenvectors of K-FAC's factors (see `kfac`) as a structure's bases.

    Args:
        problem: From a network, whose only cost beside R is at the output, with a known factor.
        structure: Whose bases; its spectrum is carried over (`EKronecker.set_bases`).
        sharing: See `layer_factors`.
        samples: See `layer_factors`.
        probes: How many, for weights that `layer_factors` leaves out.
        generator: Of all signs, on the problem's device; None takes one of seed 0.

    Raises:
        ValueError: The problem has no factor.
    """
    source = seeded(problem, generator)
    set_eigenbases(
        structure, curvature_factors(problem, structure, sharing, samples, probes, source)
    )


# ---- from gradients


@torch.no_grad()
def shampoo(
    gradients: Tensor,
    like: Like,
    *,
    damping: float = 1e-6,
    exponent: float | None = None,
    biases: Biases = "diagonal",
    kernels: Kernels = "auto",
    max_side: int = 2048,
) -> Kronecker:
    """Shampoo: (L + epsilon_L I)^{-p} (x) (R + epsilon_R I)^{-p} (Gupta et al. 2018).

    L and R are the means of GG' and G'G over the gradients G, and p = 1 / (2 d) for d sides, so
    that a matrix takes fourth roots and a vector, whose moment is a diagonal, a square root.
    epsilon is relative, damping times the largest eigenvalue (Anil et al. 2020). M is in the units
    of Adam's 1 / v^(1/2), an inverse gradient.

    Args:
        gradients: Rows (k, P).
        like: What M is made for.
        damping: See above.
        exponent: p, on every side; None takes 1 / (2 d).
        biases: See `Kronecker`; "diagonal" is the paper's.
        kernels: See `Kronecker`.
        max_side: See `Kronecker`.

    Raises:
        ValueError: `damping` is not positive.
    """
    _positive(damping)
    made = Kronecker(like, biases=biases, kernels=kernels, max_side=max_side)
    for name, moments in row_moments(made, gradients).items():
        site = next(site for site in made.sites if site.name == name)
        power = 1 / (2 * len(moments)) if exponent is None else exponent
        for side, moment in enumerate(moments):
            made.tensors[factor_name(site, side)].copy_(inverse_root(moment, damping, power))
    return made


@torch.no_grad()
def soap(
    gradients: Tensor,
    like: Like,
    *,
    damping: float = 1e-8,
    biases: Biases = "diagonal",
    kernels: Kernels = "auto",
    max_side: int = 2048,
    max_state: float | None = None,
) -> EKronecker:
    """SOAP: Adam in Shampoo's bases V, D = 1 / (v^(1/2) + damping), v the mean of (V'g)^2.

    (Vyas et al. 2024; the means are over the rows where the optimizer has moving averages.)

    Args:
        gradients: Rows (k, P).
        like: What M is made for.
        damping: See above.
        biases: See `EKronecker`; "diagonal" is the paper's.
        kernels: See `EKronecker`.
        max_side: See `EKronecker`.
        max_state: See `EKronecker`.

    Raises:
        ValueError: `damping` is not positive.
    """
    _positive(damping)
    made = EKronecker(like, biases=biases, kernels=kernels, max_side=max_side, max_state=max_state)
    moment_bases(made, gradients)
    rotated = made.rotate(made.split(gradients.to(made.dtype)))
    for site in made.sites:
        second = rotated[site.name].square().mean(0)
        made.spectrum(site).copy_(1 / (second.sqrt() + damping))
    return made


# ---- their parts


def curvature_factors(
    problem: LQRProblem,
    structure: Kronecker | EKronecker,
    sharing: Sharing,
    samples: int | None,
    probes: int,
    generator: torch.Generator,
) -> dict[str, Sequence[Tensor]]:
    """One factor per side for every site that is no vector; see `kfac` for the arguments."""
    found = layer_factors(problem, structure, sharing=sharing, samples=samples, generator=generator)
    made: dict[str, Sequence[Tensor]] = {name: each.sides for name, each in found.items()}
    left = [site for site in structure.sites if len(site.sides) > 1 and site.name not in made]
    if left:
        for parts in probe_parts(problem, probes, generator):
            for site in left:
                added = [moment / probes for moment in site_moments(site, site.gather(parts))]
                held = made.get(site.name)
                if held is not None:
                    added = [a + b for a, b in zip(held, added, strict=True)]
                made[site.name] = added
        for site in left:
            made[site.name] = normalised(made[site.name])
    return made


def _damping(problem: LQRProblem, given: float | None) -> dict[str, float]:
    """Lambda of every parameter."""
    if given is not None:
        _positive(given)
        return dict.fromkeys(problem.names, float(given))
    values = problem.system.control_cost.block_values
    if values is None:
        raise ValueError(
            "the problem's damping is an operator and this preconditioner takes a number: give "
            "damping=."
        )
    for value in values:
        _positive(value)
    return dict(zip(problem.names, values, strict=True))


def _positive(damping: float) -> None:
    if not (math.isfinite(damping) and damping > 0):
        raise ValueError(f"damping is {damping}: this preconditioner needs a finite one above 0.")
