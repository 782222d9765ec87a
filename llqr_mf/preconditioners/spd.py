"""Small dense symmetric matrices: the factors of a structure. All of it runs in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FactorizationError


def symmetrised(matrix: Tensor) -> Tensor:
    """(A + A') / 2."""
    return (matrix + matrix.mT) / 2


def eigenvectors(matrix: Tensor, name: str) -> Tensor:
    """Those of the symmetric part, as columns, in float64.

    Raises:
        FactorizationError: There are none: LAPACK gave up, or gave NaN, which it does without a
            word for large matrices.
    """
    # A scale of one keeps the range: neither the sum nor the squares inside overflow.
    wide = matrix.double()
    largest = wide.abs().amax() if wide.numel() else wide.new_ones(())
    return eigen(wide / torch.where(largest > 0, largest, torch.ones_like(largest)), name)[1]


def eigen(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of the symmetric part of a float64 matrix.

    Raises:
        FactorizationError: As `eigenvectors`.
    """
    try:
        values, vectors = torch.linalg.eigh(symmetrised(matrix))
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise FactorizationError(f"'{name}' has no eigenvectors: {error}") from error
    if not bool(vectors.isfinite().all() & values.isfinite().all()):
        raise FactorizationError(f"'{name}' has no eigenvectors: it holds NaN or infinity.")
    return values, vectors


def cholesky(matrix: Tensor, name: str) -> Tensor:
    """The lower factor in float64.

    Raises:
        FactorizationError: The matrix is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(matrix.double())
    if int(info) != 0:
        raise FactorizationError(
            f"'{name}' is not positive definite: assign only symmetric positive-definite factors, "
            "or fit with a larger floor."
        )
    return factor


def spd_inverse(matrix: Tensor, name: str) -> Tensor:
    """The inverse, in the matrix's dtype and exactly symmetric."""
    return symmetrised(torch.cholesky_inverse(cholesky(matrix, name))).to(matrix.dtype)


def spd_root(matrix: Tensor, name: str) -> Tensor:
    """The symmetric root, in the matrix's dtype.

    Raises:
        FactorizationError: The matrix is not positive definite.
    """
    values, vectors = eigen(matrix.double(), name)
    if not bool((values > 0).all()):
        raise FactorizationError(
            f"'{name}' is not positive definite: assign only symmetric positive-definite factors, "
            "or fit with a larger floor."
        )
    return symmetrised((vectors * values.sqrt()) @ vectors.mT).to(matrix.dtype)


def spd_logdet(matrix: Tensor, name: str) -> Tensor:
    """The log-determinant, a float64 scalar."""
    return 2 * cholesky(matrix, name).diagonal().log().sum()


def clip_eigenvalues(matrix: Tensor, least: float) -> Tensor:
    """The nearest symmetric matrix in Frobenius norm without an eigenvalue below `least`.

    A `least` below the rounding of the matrix is raised to it, so that what comes back is positive
    definite in its own dtype. A matrix that needs no clipping comes back as its symmetric part.
    """
    symmetric = symmetrised(matrix)
    values, vectors = eigen(symmetric.double(), "the matrix to be clipped")
    # Rounding the result to its dtype moves an eigenvalue by at most eps/2 times the norm.
    rounding = 8 * torch.finfo(matrix.dtype).eps * values.norm()
    floor = rounding.clamp(min=least)
    if bool((values >= floor).all()):
        return symmetric
    return symmetrised((vectors * values.clamp(min=floor)) @ vectors.mT).to(matrix.dtype)
