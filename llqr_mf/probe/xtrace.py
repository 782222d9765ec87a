"""XTrace: every vector sketches for the others and is tested against their sketch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..solvers.dots import row_dots
from .estimate import Estimate
from .hutchpp import basis_core, gram, range_basis
from .probed import Probed

PAIRS_OF = 64
"""Most vectors of which all pairs are left out for a standard error."""


def xtrace(probed: Probed, products: int) -> Estimate:
    """The trace by Epperly, Tropp and Webber (2024).

    It is the mean over i of

        tr(Q_i'AQ_i) + w_i'(I - Q_iQ_i') A (I - Q_iQ_i') w_i,

    Q_i an orthonormal basis of the A w_j, j != i. Half the products go to the m vectors w, half
    to the basis Q of all A w_j; the rest is arithmetic on m x m matrices. Vectors on the sphere
    are scaled to length sqrt(n - m + 1) after the projection, which leaves less
    variance. It holds m = products / 2 vectors, and twice as many, one for every product, while
    they are put together and while their QR decomposition is made.

    The m summands share most of their sketches, so that their errors are correlated, and their
    deviation over sqrt(m), the error estimate of the paper, is too small: between 0.5 and 1 of the
    true error (0.3 and 1 for XNysTrace) on seven spectra. The standard error here has the
    covariance too, see `exchangeable_error`.
    """
    count = products // 2
    basis, R = range_basis(probed, count)
    W, square = _against(probed, basis, count)
    H = basis_core(probed, basis)
    spherical = probed.kind == "spherical"

    def without(j: int) -> Tensor:
        keep = torch.arange(count) != j
        q, smaller = torch.linalg.qr(R[:, keep])
        parts = (smaller, q.mT @ H @ q, q.mT @ W[:, keep], square[keep])
        return _estimates(*parts, probed.size, spherical)

    estimates = _estimates(R, H, W, square, probed.size, spherical)
    return Estimate(
        estimates.mean(),
        exchangeable_error(estimates, without),
        count,
        probed.products,
        probed.seed,
        method="xtrace",
    )


def directions_left_out(R: Tensor) -> Tensor:
    """The unit vectors s_i orthogonal to every column of R but the i-th, as columns.

    Then Q_iQ_i' = Q (I - s_i s_i') Q' (Epperly, Tropp and Webber 2024). A diagonal
    entry of R that is zero to rounding, as of a low-rank A, is taken as the rounding.

    Args:
        R: Upper triangular, (m, m), float64.
    """
    diagonal = R.diagonal()
    floor = torch.finfo(R.dtype).eps * float(R.norm()) or 1.0
    raised = torch.where(diagonal.abs() < floor, floor - diagonal, 0.0)
    solved = torch.linalg.solve_triangular(
        (R + torch.diag(raised)).mT, torch.eye(len(R), dtype=R.dtype), upper=False
    )
    return solved / solved.norm(dim=0)


def exchangeable_error(estimates: Tensor, without: Callable[[int], Tensor]) -> Tensor:
    """The standard error of the mean of leave-one-out estimates, with their covariance.

    g_i is unbiased given all vectors but the i-th. So is h_ij, the same without vector j, and it
    does not depend on w_j. Hence g_j - tau has mean zero given all that h_ij depends on, and

        Cov(g_i, g_j) = E (g_i - h_ij) (g_j - h_ji)

    exactly, tau the true value: all other terms of the product have mean zero. With s^2 the sample
    variance of the g, whose mean is Var(g) - Cov, the variance of the mean of all g is

        E s^2 / m + Cov,

    without bias. A negative estimate of the covariance, which happens where the spectrum decays so
    fast that a vector less is felt, is taken as zero; the standard error is then too large rather
    than too small.

    Args:
        estimates: g; shape (m,).
        without: Gives h_ij of all i != j, in order, for one j; shape (m - 1,). Asked for the first
            `PAIRS_OF` at most.
    """
    count = min(len(estimates), PAIRS_OF)
    gaps = torch.zeros(count, count, dtype=estimates.dtype)
    for j in range(count):
        others = torch.arange(count) != j
        gaps[j, others] = estimates[:count][others] - without(j)[: count - 1]
    return error_from_gaps(estimates, gaps)


def error_from_gaps(estimates: Tensor, gaps: Tensor) -> Tensor:
    """The formula of `exchangeable_error`.

    Args:
        estimates: g; shape (m, ...).
        gaps: g_i - h_ij at [j, i], zero for i = j; shape (p, p, ...), p <= m.
    """
    pairs = len(gaps) * (len(gaps) - 1)
    covariance = (gaps * gaps.transpose(0, 1)).sum((0, 1)) / pairs
    return (estimates.var(0) / len(estimates) + covariance.clamp(min=0)).sqrt()


def _estimates(
    R: Tensor, H: Tensor, W: Tensor, square: Tensor, size: int, spherical: bool
) -> Tensor:
    """The estimates of all i; shape (m,).

    With x_i = (I - s_i s_i') Q'w_i and A w_i = Q r_i, the second term is
    (s_i'Q'w_i)(s_i'r_i) - x_i'r_i + x_i'H x_i.
    """
    S = directions_left_out(R)
    along = (S * W).sum(0)
    X = W - S * along
    missed = along * (S * R).sum(0) - (X * R).sum(0) + (X * (H @ X)).sum(0)
    if spherical:
        missed = missed * (size - len(R) + 1) / (square - (X * X).sum(0))
    return H.trace() - (S * (H @ S)).sum(0) + missed


def _against(probed: Probed, basis: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Q'Omega, (k, m), and the squares of the vectors, (m,); drawn again, not held."""
    step = probed.columns or count
    dots, squares = [], []
    for start in range(0, count, step):
        z = probed.draw(range(start, min(start + step, count)))
        dots.append(gram(basis, z))
        squares.append(row_dots(z, z))
    return torch.cat(dots, 1).cpu(), torch.cat(squares).cpu()
