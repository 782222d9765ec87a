"""Roots F F' = M of whatever may be given as a preconditioner."""

from __future__ import annotations

import torch
from linear_operator import LinearOperator
from linear_operator.operators import DenseLinearOperator, DiagLinearOperator
from torch import Tensor

from ..operators.apply import as_operator
from .base import Structure
from .spd import cholesky


def root_of(M: LinearOperator | Tensor) -> LinearOperator:
    """F of a structure, a positive-definite matrix or a diagonal; shape (n, n).

    Raises:
        ValueError: No root of its kind is known, or it is not positive definite.
    """
    if isinstance(M, Structure):
        return _structure_root(M, inverse=False)
    operator = as_operator(M)
    if isinstance(operator, DiagLinearOperator):
        return DiagLinearOperator(_positive(operator).sqrt())
    return DenseLinearOperator(_lower(operator).to(operator.dtype))


def inverse_root_of(M: LinearOperator | Tensor) -> LinearOperator:
    """F^{-T}, a root of M^{-1}, for the F of `root_of`; raises as that does."""
    if isinstance(M, Structure):
        # Every structure's root is made so that this is true.
        return _structure_root(M, inverse=True)
    operator = as_operator(M)
    if isinstance(operator, DiagLinearOperator):
        return DiagLinearOperator(_positive(operator).rsqrt())
    lower = _lower(operator)
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    solved = torch.linalg.solve_triangular(lower, eye, upper=False)
    return DenseLinearOperator(solved.mT.to(operator.dtype))


def logdet_of(M: LinearOperator | Tensor) -> float:
    """Its log-determinant; raises as `root_of` does."""
    if isinstance(M, Structure):
        return float(M.logdet())
    operator = as_operator(M)
    if isinstance(operator, DiagLinearOperator):
        return float(_positive(operator).double().log().sum())
    return 2 * float(_lower(operator).diagonal().log().sum())


def _structure_root(M: Structure, *, inverse: bool) -> LinearOperator:
    try:
        return (M.inverse() if inverse else M).root()
    except NotImplementedError as error:
        raise _no_root(M) from error


def _no_root(M: LinearOperator) -> ValueError:
    return ValueError(
        f"no root of a {type(M).__name__} is known: give a matrix, a diagonal, or a structure that "
        "is diagonal, Kronecker, E-Kronecker or low rank, or composed of those."
    )


def _positive(operator: DiagLinearOperator) -> Tensor:
    diagonal: Tensor = operator.diagonal()
    if not bool((diagonal > 0).all()):
        raise ValueError("the preconditioner's diagonal is not positive.")
    return diagonal


def _lower(operator: LinearOperator) -> Tensor:
    if not isinstance(operator, DenseLinearOperator):
        raise _no_root(operator)
    return cholesky(operator.to_dense(), "preconditioner")
