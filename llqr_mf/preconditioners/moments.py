"""Moments on the sides of a weight, and what is made of them: bases, inverses and roots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import NotFiniteError
from .ekronecker import EKronecker
from .kronecker import Kronecker
from .sites import Site, side_moments
from .spd import eigen, eigenvectors, symmetrised


def site_moments(site: Site, x: Tensor) -> list[Tensor]:
    """Sums of x x' in every side of (k, *sides)."""
    return [side_moments(x, x, side, full=full) for side, full in enumerate(site.full)]


def row_moments(structure: Kronecker | EKronecker, rows: Tensor) -> dict[str, Sequence[Tensor]]:
    """Mean moments of rows (k, P) in every side of every site.

    Raises:
        NotFiniteError: A row holds NaN or infinity.
    """
    if not bool(rows.isfinite().all()):
        raise NotFiniteError("the rows hold NaN or infinity: look at the gradients they came from.")
    parts = structure.split(rows.to(structure.dtype))
    return {
        site.name: [moment / len(rows) for moment in site_moments(site, site.gather(parts))]
        for site in structure.sites
    }


def normalised(sides: Sequence[Tensor]) -> list[Tensor]:
    """Partial traces of one matrix as the factors of a product that has its trace."""
    first, *others = sides
    total = trace(first)
    return [first, *(torch.where(total > 0, side / total, side) for side in others)]


def trace(side: Tensor) -> Tensor:
    """Of a matrix, or of the diagonal that stands for one."""
    return side.diagonal().sum() if side.ndim == 2 else side.sum()


@torch.no_grad()
def moment_bases(structure: EKronecker, rows: Tensor) -> None:
    """Writes the eigenvectors of the rows' moments on every side as a structure's bases.

    Of a matrix G these are the means of GG' and of G'G. With gradients as rows they are the bases
    of SOAP (Vyas et al. 2024); with `curvature_probes` those of the partial traces of J'Q_T J.

    Args:
        structure: Whose bases; its spectrum is carried over (`EKronecker.set_bases`).
        rows: Shape (k, P).
    """
    set_eigenbases(structure, row_moments(structure, rows))


def set_eigenbases(structure: EKronecker, factors: Mapping[str, Sequence[Tensor]]) -> None:
    """Writes the eigenvectors of factors, by site name, where the structure has a basis.

    A factor of zero says nothing about a basis, which then stays.

    Raises:
        FactorizationError: A factor has no eigenvectors; nothing has been changed then.
    """
    bases: dict[str, list[Tensor | None]] = {}
    for site in structure.sites:
        if site.name not in factors:
            continue
        pairs = zip(structure.bases(site), factors[site.name], strict=True)
        bases[site.name] = [
            None
            if held is None or not bool(factor.any())
            else eigenvectors(factor, f"{site.name}, side {side}")
            for side, (held, factor) in enumerate(pairs)
        ]
    structure.set_bases(bases)


def damped_inverses(factors: Sequence[Tensor], lam: float) -> list[Tensor]:
    """(F_i + epsilon_i I)^{-1}, epsilon_i = lambda^(1/d) m_i / (prod m)^(1/d); see `kfac`."""
    means = [float(trace(factor.double())) / len(factor) for factor in factors]
    if min(means) <= 0:
        # The block is zero, so M is I / lambda.
        factors, means = [torch.zeros_like(f) for f in factors], [1.0] * len(means)
    # By logarithms: a product of means may leave the range where their root does not.
    root = math.exp((math.log(lam) - sum(map(math.log, means))) / len(means))
    shares = [m * root for m in means]
    return [_inverse(f.double(), share) for f, share in zip(factors, shares, strict=True)]


def _inverse(factor: Tensor, shift: float) -> Tensor:
    """(F + shift I)^{-1} of a float64 matrix, or of a diagonal."""
    if factor.ndim == 1:
        return 1 / (factor + shift)
    shifted = symmetrised(factor)
    shifted.diagonal().add_(shift)
    lower, info = torch.linalg.cholesky_ex(shifted)
    if int(info) == 0:
        return symmetrised(torch.cholesky_inverse(lower))
    # Sums in float32 leave a semidefinite matrix with eigenvalues below zero.
    values, vectors = eigen(factor, "a factor")
    return symmetrised((vectors / (values.clamp(min=0) + shift)) @ vectors.mT)


def inverse_root(moment: Tensor, damping: float, power: float) -> Tensor:
    """(F + damping max(F) I)^{-power}, and I for F = 0."""
    if moment.numel() == 0:
        return moment
    if moment.ndim == 1:
        values, vectors = moment.double(), None
    else:
        values, vectors = eigen(moment.double(), "a moment")
    largest = float(values.max())
    if largest <= 0:
        return torch.ones_like(moment) if vectors is None else torch.eye(len(moment)).to(moment)
    roots = (values.clamp(min=0) + damping * largest) ** -power
    return roots if vectors is None else symmetrised((vectors * roots) @ vectors.mT)
