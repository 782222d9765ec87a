"""What is wrong with a tensor that comes out of a file, said by name before it is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .spd import symmetrised

_REMEDY = "load another checkpoint, or learn M anew."


class SpoiltError(ValueError):
    """A tensor of a state that would make M wrong.

    Args:
        name: Its name.
        what: What is wrong with it.
    """

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"'{name}' {what} in the state: {_REMEDY}")
        self.name, self.what = name, what


def check_tensor(name: str, given: Any, held: Tensor) -> None:
    """Whether a tensor can be copied into another without loss, and is finite.

    Raises:
        ValueError: It cannot.
    """
    if not isinstance(given, Tensor) or given.layout != torch.strided:
        raise SpoiltError(name, f"is a {type(given).__name__} and no dense tensor")
    if given.shape != held.shape:
        raise ValueError(
            f"'{name}' has shape {tuple(given.shape)} in the state and {tuple(held.shape)} here: "
            "make the structure for the same parameters and with the same options."
        )
    if torch.promote_types(given.dtype, held.dtype) != held.dtype:
        raise ValueError(
            f"'{name}' is {given.dtype} in the state and {held.dtype} here: make the structure for "
            "parameters of the wider dtype."
        )
    if given.dtype not in (torch.float32, torch.float64):
        raise SpoiltError(name, f"is {given.dtype}, to which no structure rounds,")
    if not bool(given.isfinite().all()):
        raise SpoiltError(name, "holds NaN or infinity")


def check_positive(name: str, given: Tensor) -> None:
    """Whether all entries are positive.

    Raises:
        ValueError: One is not.
    """
    if not bool((given > 0).all()):
        raise SpoiltError(name, "has entries that are not positive")


def check_definite(name: str, given: Tensor, share: float | None = None) -> None:
    """Whether a matrix, or the diagonal that stands for one, is positive definite to rounding.

    Args:
        name: Whose.
        given: (n, n) or (n,).
        share: Negative eigenvalues that are let through, relative to the Frobenius norm. None:
            what rounding a definite matrix to its dtype may make of it.

    Raises:
        ValueError: It is not, or not symmetric.
    """
    if given.ndim < 2:
        if share is None:
            check_positive(name, given)
        elif bool((given < 0).any()):
            raise SpoiltError(name, "has negative entries")
        return
    wide, eps = given.double(), torch.finfo(given.dtype).eps
    norm = torch.linalg.matrix_norm(wide)
    if bool(torch.linalg.matrix_norm(wide - wide.mT) > 10 * eps**0.5 * norm):
        raise SpoiltError(name, "is not symmetric")
    # Rounding moves an eigenvalue by at most eps/2 times the norm.
    shifted = symmetrised(wide)
    shifted.diagonal().add_((8 * eps if share is None else share) * norm)
    zero_mean = share is not None and not bool(norm > 0)
    if not zero_mean and int(torch.linalg.cholesky_ex(shifted)[1]):
        raise SpoiltError(name, "is not positive definite")


def check_orthonormal(name: str, given: Tensor) -> None:
    """Whether the columns of a matrix are orthonormal, to the root of rounding.

    Raises:
        ValueError: They are not.
    """
    check_gram(name, given.mT @ given)


def check_gram(name: str, gram: Tensor) -> None:
    """The same by the inner products of what is to be orthonormal."""
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # A matrix of float32 may have been multiplied by TF32.
    if not bool(((gram - eye).abs() < 10 * torch.finfo(gram.dtype).eps ** 0.5).all()):
        raise SpoiltError(name, "is not orthogonal")
