"""Small dense symmetric matrices: the factors of a structure. All of it runs in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def symmetrised(matrix: Tensor) -> Tensor:
    """(A + A') / 2."""
    return (matrix + matrix.mT) / 2


def cholesky(matrix: Tensor, name: str) -> Tensor:
    """The lower factor in float64.

    Raises:
        ValueError: The matrix is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(matrix.double())
    if int(info) != 0:
        raise ValueError(
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
        ValueError: The matrix is not positive definite.
    """
    values, vectors = torch.linalg.eigh(symmetrised(matrix).double())
    if not bool((values > 0).all()):
        raise ValueError(
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
    values, vectors = torch.linalg.eigh(symmetric.double())
    # Rounding the result to its dtype moves an eigenvalue by at most eps/2 times the norm.
    rounding = 8 * torch.finfo(matrix.dtype).eps * values.norm()
    floor = rounding.clamp(min=least)
    if bool((values >= floor).all()):
        return symmetric
    return symmetrised((vectors * values.clamp(min=floor)) @ vectors.mT).to(matrix.dtype)
