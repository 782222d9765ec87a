"""Hutch++, and the sketch of the range that it shares with XTrace and XDiag."""

from __future__ import annotations

import torch
from torch import Tensor

from ..solvers.dots import pieces, row_dots
from .estimate import Estimate
from .hutchinson import GivenVectors
from .probed import Probed


def hutchpp(probed: Probed, products: int) -> Estimate:
    """The trace exactly on a sketch of the range, and by Hutchinson on what the sketch misses.

    Meyer, Musco, Musco and Woodruff (2021), Algorithm 1: with Q an orthonormal basis of A S,

        tr(Q'AQ) + mean of g'(I - QQ') A (I - QQ') g.

    A third of the products each goes to S, to Q and to g, what is left over to g. Given Q, the
    samples of g are independent and unbiased, and the standard error is theirs. It holds
    products / 3 vectors.
    """
    rank = products // 3
    left = products - 2 * rank
    basis, _ = range_basis(probed, rank)
    core = basis_core(probed, basis)

    def forms(g: Tensor) -> tuple[Tensor]:
        missed = g - gram(g, basis).to(basis.dtype) @ basis
        missed = missed.to(probed.proto.dtype)
        return (row_dots(missed, probed.times(missed)),)

    (samples,) = probed.map(left, forms, start=rank, name="complement")
    samples = samples.cpu()
    return Estimate(
        core.trace() + samples.mean(),
        samples.std() / left**0.5,
        left,
        probed.products,
        probed.seed,
        method="hutch++",
    )


def range_basis(probed: Probed, count: int) -> tuple[Tensor, Tensor]:
    """Q and R of A Omega = Q R, for the first `count` random vectors Omega.

    Returns:
        Q' as orthonormal rows (count, n), in the operator's dtype or in float32 if that is wider,
        and R, (count, count), float64 on the CPU.
    """

    def times(z: Tensor) -> tuple[Tensor]:
        return (widened(probed.times(z)),)

    (images,) = probed.map(count, times, name="sketch")
    basis, triangle = torch.linalg.qr(images.mT)
    return basis.mT.contiguous(), triangle.double().cpu()


def basis_core(probed: Probed, basis: Tensor) -> Tensor:
    """H = Q'AQ of orthonormal rows (k, n); shape (k, k), float64 on the CPU. Costs k products."""

    def times(q: Tensor) -> tuple[Tensor]:
        return (gram(probed.times(q), basis),)

    rows = GivenVectors(probed, lambda i: basis[i.start : i.stop].to(probed.proto.dtype))
    (core,) = rows.map(len(basis), times, name="basis")
    return ((core + core.mT) / 2).cpu()


def gram(a: Tensor, b: Tensor) -> Tensor:
    """All dot products of rows; shapes (k, n), (m, n) to (k, m), float64."""
    total = torch.zeros(len(b), len(a), dtype=torch.float64, device=a.device)
    for y, x in pieces(b, a):
        total.addmm_(y.double(), x.double().mT)
    return total.mT


def widened(rows: Tensor) -> Tensor:
    """In a dtype that has a QR decomposition: float32 in place of a half precision."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
