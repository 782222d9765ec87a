"""What estimators of positive-definite operators refuse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..solvers.cg import CGResult
from ..solvers.status import Code

NO_VALUE = (Code.NEGATIVE_CURVATURE, Code.INDEFINITE, Code.NOT_FINITE)
"""How a CG ends whose coefficients say nothing."""


def check_lower(lower: float | None) -> None:
    """Raises a ValueError for a bound of a positive-definite spectrum that is not positive."""
    if lower is not None and not (lower > 0 and math.isfinite(lower)):
        raise ValueError(f"lower is {lower}: give a positive bound of the spectrum, or None.")


def check_rtol(rtol: float) -> None:
    """Raises a ValueError for a tolerance with which CG would not set out."""
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol is {rtol}: give a number from 0 to less than 1.")


def check_definite(solved: CGResult) -> None:
    """Raises a ValueError where CG has met what is not positive definite, or not finite."""
    if any(code in NO_VALUE for code in solved.codes):
        raise ValueError(f"this needs a positive-definite operator: {solved.status}")


def check_positive(ritz: Tensor, dtype: torch.dtype) -> None:
    """Raises a ValueError for Ritz values that are not positive beyond the rounding of products."""
    least, largest = float(ritz.min()), float(ritz.abs().max())
    if not least > torch.finfo(dtype).eps * largest:
        raise ValueError(
            f"A is not positive definite beyond the rounding of {dtype}: it has an eigenvalue of "
            f"at most {least:.3g} beside one of size {largest:.3g}. Add damping, use a "
            "Gauss-Newton or Fisher metric, or a wider dtype."
        )
