"""Products of any `LinearOperator` with rows, and solves with the simple ones."""

from __future__ import annotations

import torch
from linear_operator import LinearOperator
from linear_operator.operators import (
    ConstantDiagLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    KroneckerProductLinearOperator,
)
from torch import Tensor

from .base import MatrixFreeOperator

DENSE_INVERSE = 4096
"""Largest size at which an operator without a cheap inverse is inverted as a dense matrix."""

NOT_DEFINITE = (
    "a control cost (damping) is not positive definite, and this method needs its inverse: give "
    "one that is, or use method='cg'."
)


def apply_rows(operator: LinearOperator, v: Tensor) -> Tensor:
    """Operator times k vectors; shape (k, n) to (k, m)."""
    if isinstance(operator, MatrixFreeOperator):
        return operator.times_rows(v)
    return operator._matmul(v.mT).mT


def apply_rows_t(operator: LinearOperator, w: Tensor) -> Tensor:
    """Transposed operator times k vectors; shape (k, m) to (k, n)."""
    if isinstance(operator, MatrixFreeOperator):
        return operator.times_rows(w, transposed=True)
    return operator._t_matmul(w.mT).mT


def as_operator(value: LinearOperator | Tensor) -> LinearOperator:
    """A tensor as a `DenseLinearOperator`; an operator as it is."""
    return value if isinstance(value, LinearOperator) else DenseLinearOperator(value)


def checked_operator(
    value: LinearOperator | Tensor,
    shape: tuple[int, int],
    what: str,
    proto: Tensor,
    *,
    symmetric: bool = False,
) -> LinearOperator:
    """What a user gives as a matrix, as an operator, once it is known to fit.

    Raises:
        TypeError: It is neither a tensor nor an operator.
        ValueError: Its shape, dtype or device does not fit, a tensor is not finite, or it is not
            symmetric and should be. (The entries of an operator are not looked at.)
    """
    if not isinstance(value, LinearOperator | Tensor):
        raise TypeError(f"{what} is a {type(value).__name__}: give a tensor or a LinearOperator.")
    if tuple(value.shape) != shape:
        raise ValueError(f"{what} has shape {tuple(value.shape)}, not {shape}.")
    if value.dtype != proto.dtype or value.device not in (proto.device, None):
        raise ValueError(
            f"{what} is {value.dtype} on {value.device} and the problem is {proto.dtype} on "
            f"{proto.device}: convert one of them with .to()."
        )
    if isinstance(value, Tensor):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{what} has entries that are NaN or infinite.")
        if symmetric and not torch.allclose(value, value.mT):
            raise ValueError(f"{what} is not symmetric: give (M + M.mT) / 2.")
    return as_operator(value)


def inverse_operator(operator: LinearOperator) -> LinearOperator:
    """The inverse of a positive-definite operator, where it is cheap to have.

    Diagonal, Kronecker with dense factors, an operator with its own `inverse()`, or any operator
    of size at most `DENSE_INVERSE` (by Cholesky in float64).

    Raises:
        ValueError: The operator is not positive definite.
        NotImplementedError: It is large and of a kind whose inverse is unknown.
    """
    if isinstance(operator, ConstantDiagLinearOperator | DiagLinearOperator):
        diagonal = operator._diagonal()
        if not bool((diagonal > 0).all()):
            raise ValueError(NOT_DEFINITE)
        return DiagLinearOperator(1 / diagonal)
    if isinstance(operator, KroneckerProductLinearOperator):
        return KroneckerProductLinearOperator(
            *[_dense_inverse(factor) for factor in operator.linear_ops]
        )
    if isinstance(operator, MatrixFreeOperator) and hasattr(operator, "inverse"):
        try:
            return operator.inverse()
        except NotImplementedError:
            pass
    if operator.shape[0] <= DENSE_INVERSE:
        return _dense_inverse(operator)
    raise NotImplementedError(
        f"the inverse of a {type(operator).__name__} of size {operator.shape[0]} is not known: "
        "give the damping as a number, a diagonal or a Kronecker product, or use method='cg', "
        "which needs only its products."
    )


def _dense_inverse(operator: LinearOperator) -> LinearOperator:
    dense = operator.to_dense()
    factor, info = torch.linalg.cholesky_ex(dense.double())
    if int(info) != 0:
        raise ValueError(NOT_DEFINITE)
    return DenseLinearOperator(torch.cholesky_inverse(factor).to(dense.dtype))
