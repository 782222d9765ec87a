"""XNysTrace: as XTrace, with Nystrom approximations of a positive semi-definite operator."""

from __future__ import annotations

import torch
from torch import Tensor

from .estimate import Estimate
from .hutchpp import gram, widened
from .probed import Probed
from .xtrace import exchangeable_error

GROWTHS = 4
"""How often the shift may grow tenfold before A is called indefinite."""


def xnystrace(probed: Probed, products: int) -> Estimate:
    """The trace of a positive semi-definite A by Epperly, Tropp and Webber (2024).

    It is the mean over i of

        tr(A_i) + w_i'(A - A_i) w_i,   A_i = Y_i (W_i'Y_i)^{-1} Y_i',   Y = A W,

    W_i the vectors but w_i. All products go to the m vectors; the rest is arithmetic on m x m
    matrices. For stability A + nu I is sketched, nu at the level of rounding, and n nu subtracted
    at the end. Vectors on the sphere are scaled as in XTrace, and the standard error is as there.
    It holds 2 m vectors, m = products.

    Raises:
        ValueError: W'AW has a negative eigenvalue beyond rounding, so that A is indefinite. One
            that shows in no w goes unnoticed.
    """
    images, vectors = _sketch(probed, products)
    G = gram(vectors, vectors).cpu()
    H = gram(vectors, images).cpu()
    H = (H + H.mT) / 2
    eps = torch.finfo(probed.proto.dtype).eps
    unit = eps * float(torch.linalg.vector_norm(images, dtype=torch.float64)) / probed.size**0.5
    shift, H = _shifted(H, G, unit or torch.finfo(images.dtype).tiny ** 0.5)
    R = torch.linalg.qr(images.add_(vectors, alpha=shift).mT, mode="r").R.double().cpu()
    del images, vectors
    spherical = probed.kind == "spherical"

    def without(j: int) -> Tensor:
        keep = torch.arange(products) != j
        parts = (R[:, keep], H[keep][:, keep], G[keep][:, keep])
        return _estimates(*parts, probed.size, spherical)

    estimates = _estimates(R, H, G, probed.size, spherical)
    return Estimate(
        estimates.mean() - shift * probed.size,
        exchangeable_error(estimates, without),
        products,
        probed.products,
        probed.seed,
        method="xnystrace",
    )


def _sketch(probed: Probed, count: int) -> tuple[Tensor, Tensor]:
    """A W and W as rows (m, n)."""

    def times(z: Tensor) -> tuple[Tensor]:
        return (widened(probed.times(z)),)

    (images,) = probed.map(count, times, name="sketch")
    return images, widened(probed.draw(range(count)))


def _shifted(H: Tensor, G: Tensor, unit: float) -> tuple[float, Tensor]:
    """The least of a growing series of shifts nu at which W'(A + nu I)W is positive, and that.

    Args:
        H: W'AW.
        G: W'W. Two vectors of signs may be equal where n is small, which makes it singular, so
            the rounding of a Cholesky factor is added to the diagonal besides.
        unit: The first nu.
    """
    rounding = 8 * len(H) * torch.finfo(H.dtype).eps * float(H.diagonal().abs().max())
    ridge = rounding * torch.eye(len(H), dtype=H.dtype)
    for power in range(GROWTHS):
        shift = unit * 10**power
        # Half must do, so that rounding leaves the blocks of H positive as well.
        if int(torch.linalg.cholesky_ex(H + (shift * G + ridge) / 2).info) == 0:
            return shift, H + shift * G + ridge
    lowest = float(torch.linalg.eigvalsh(H)[0])
    raise ValueError(
        f"A is indefinite (w'Aw = {lowest:.3g} for a combination w of the probes, beyond "
        "rounding) and method='xnystrace' needs a positive semi-definite one: use "
        "method='xtrace', or add damping."
    )


def _estimates(R: Tensor, H: Tensor, G: Tensor, size: int, spherical: bool) -> Tensor:
    """The estimates of all i, for A + nu I; shape (m,).

    With K = H^{-1}, leaving out w_i takes (Y K e_i)(Y K e_i)' / K_ii from the approximation, and
    as it is exact on all of W, w_i'(A - A_i) w_i = 1 / K_ii. For the same reason
    1 / (G^{-1})_ii is the square of w_i's part orthogonal to the others.

    Args:
        R: Any matrix with R'R = Y'Y.
        H: W'Y, positive definite.
        G: W'W.
        size: n.
        spherical: Whether to scale.
    """
    lower = torch.linalg.cholesky(H)
    half = torch.linalg.solve_triangular(
        lower, torch.eye(len(H), dtype=H.dtype), upper=False
    )  # K = half' half
    root = R @ half.mT  # A_i for all vectors is root root', up to Q.
    inverse = half.square().sum(0)
    removed = (root @ half).square().sum(0) / inverse
    missed = 1 / inverse
    if spherical:
        missed = missed * (size - len(H) + 1) * torch.linalg.inv(G).diagonal()
    return root.square().sum() - removed + missed
