"""XDiag: the diagonal as XTrace estimates the trace."""

from __future__ import annotations

import torch
from torch import Tensor

from ..solvers.dots import pieces
from .estimate import Estimate
from .hutchinson import GivenVectors
from .hutchpp import range_basis, widened
from .probed import Probed
from .xtrace import directions_left_out, error_from_gaps

PAIRS_OF = 16
"""Most vectors of which all pairs are left out for the standard errors."""


def xdiag(probed: Probed, products: int) -> Estimate:
    """The diagonal by Epperly, Tropp and Webber (2024).

    It is the mean over i of

        diag(Q_iQ_i'A) + w_i o (I - Q_iQ_i') A w_i,

    Q_i an orthonormal basis of the A w_j, j != i. It is unbiased for every distribution. (Dividing
    by w_i o w_i, which is one for signs, would have no mean for normals.) Half the products go to
    the m vectors w and half to the basis Q. It holds 3 m vectors, m = products / 2, and the two
    results in float64.

    With s_i as in `directions_left_out`, A w_j = Q r_j and Z = A Q, the i-th term is

        diag(Q Z') - (Q s_i) o (Z s_i) + (s_i'r_i) w_i o (Q s_i).

    The standard errors are as in XTrace (`exchangeable_error`), with the pairs among 16 vectors.
    """
    count = products // 2
    basis, R = range_basis(probed, count)

    def times(q: Tensor) -> tuple[Tensor]:
        return (widened(probed.times(q)),)

    rows = GivenVectors(probed, lambda i: basis[i.start : i.stop].to(probed.proto.dtype))
    (images,) = rows.map(count, times, name="basis")
    vectors = probed.draw(range(count))

    out = torch.empty(2, probed.size, dtype=torch.float64, device=basis.device)
    S = directions_left_out(R)
    whole = [each.to(basis.device) for each in (S, (S * R).sum(0))]
    pairs = [each.to(basis.device) for each in _pairs(R, min(count, PAIRS_OF))]
    for q, z, w, (mean, error) in pieces(basis, images, vectors, out):
        # The pairs take p numbers for every one of a piece, which is cut again for them.
        width = max(1, q.shape[1] // len(pairs[1]))
        for part in zip(
            *(x.split(width, 1) for x in (q, z, w, mean[None], error[None])), strict=True
        ):
            *blocks, means, errors = part
            terms, gaps = _terms(*(block.double() for block in blocks), *whole, *pairs)
            means[0] = terms.mean(0)
            errors[0] = error_from_gaps(terms, gaps)
    return Estimate(out[0], out[1], count, probed.products, probed.seed, method="xdiag")


def _pairs(R: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """s_i and s_i'r_i once more where w_j is left out too.

    Returns:
        The first at [j, :, i], (p, m, p), and the second at [j, i], (p, p); both are zero for
        i = j.
    """
    S = R.new_zeros(count, len(R), count)
    along = R.new_zeros(count, count)
    for j in range(count):
        q, smaller = torch.linalg.qr(R[:, torch.arange(len(R)) != j])
        s = directions_left_out(smaller)
        others = torch.arange(count) != j
        S[j][:, others] = (q @ s)[:, : count - 1]
        along[j, others] = (s * smaller).sum(0)[: count - 1]
    return S, along


def _terms(
    q: Tensor, z: Tensor, w: Tensor, S: Tensor, along: Tensor, S2: Tensor, along2: Tensor
) -> tuple[Tensor, Tensor]:
    """The m terms of the mean, and by how much each differs with one vector less.

    Args:
        q: Q', a piece of c columns; shape (m, c).
        z: Z', likewise.
        w: The vectors, likewise.
        S: All s_i as columns, (m, m).
        along: s_i'r_i, (m,).
        S2: From `_pairs`.
        along2: Likewise.

    Returns:
        Shapes (m, c) and (p, p, c).
    """
    count = len(along2)
    Qs, Zs = S.mT @ q, S.mT @ z
    removed = Qs * Zs - along[:, None] * w * Qs
    Qs2, Zs2 = S2.mT @ q, S2.mT @ z
    removed2 = Qs2 * Zs2 - along2[..., None] * w[:count] * Qs2
    # Without w_j the sketch lacks Q s_j throughout, and Q s_i as seen from the rest of it.
    gaps = (Qs * Zs)[:count, None] + removed2 - removed[:count]
    gaps[torch.arange(count), torch.arange(count)] = 0
    return (q * z).sum(0) - removed, gaps
