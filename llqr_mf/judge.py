"""What a solve may be asked for, and whether it was reached."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch

from .choose import HALF
from .methods import Found, Options
from .methods.base import rows_of
from .operators.apply import apply_rows
from .solvers.dots import row_norms
from .solvers.status import MESSAGES, Code, Status

SOLVED = (Code.CONVERGED, Code.MAX_ITERATIONS, Code.STAGNATED)
"""Ends whose name depends on the residual; others are answers to another question."""

POWER_STEPS = 4
"""Products that a lower bound of |H| takes."""

ROUNDED = 4.0
"""Roundings of |H| |u| that a residual keeps: what `solve_to_true_residual` reckons with."""


def default_rtol(dtype: torch.dtype) -> float:
    """The relative residual that is wanted where none is given."""
    if dtype in HALF:
        return 1e-2
    return 1e-5 if dtype == torch.float32 else 1e-6


def check_numbers(
    rtol: Any, max_iterations: Any, momentum: Any, radius: Any, recurrence_dtype: Any
) -> None:
    """The numbers among the options of `solve`.

    Raises:
        ValueError: One makes no sense, with its name.
    """
    if rtol is not None and not (_is_number(rtol) and 0 <= rtol < math.inf):
        raise ValueError(f"rtol is {rtol!r}: give a finite number >= 0 such as 1e-6, or None.")
    if max_iterations is not None:
        whole = isinstance(max_iterations, Integral) and not isinstance(max_iterations, bool)
        if not whole or max_iterations < 1:
            raise ValueError(
                f"max_iterations is {max_iterations!r}: give a whole number, at least 1, or None."
            )
    if not (_is_number(momentum) and 0 <= momentum < 1):
        raise ValueError(f"momentum is {momentum!r}: give a number in [0, 1).")
    if radius is not None and not (_is_number(radius) and 0 < radius < math.inf):
        raise ValueError(f"radius is {radius!r}: give a finite number > 0, or None.")
    if recurrence_dtype is not None and not (
        isinstance(recurrence_dtype, torch.dtype) and recurrence_dtype.is_floating_point
    ):
        raise ValueError(
            f"recurrence_dtype is {recurrence_dtype!r}: give torch.float64 or float32, or None."
        )


def judged(options: Options, found: Found, relative: float, *, literal: bool) -> Status:
    """How a solve ended by what its residual says, whatever the method thought.

    Args:
        options: What was asked for.
        found: What a method found.
        relative: The measured relative residual.
        literal: Whether rtol was given. The default is as much as the products' rounding allows.
    """
    status: Status = found.status
    if not math.isfinite(relative):
        return Status(Code.NOT_FINITE, f"the residual is {relative}: {MESSAGES[Code.NOT_FINITE]}")
    if status.code not in SOLVED:
        return status
    if relative <= options.rtol:
        if status.code is Code.CONVERGED:
            return status
        return Status(Code.CONVERGED, f"the true residual is {relative:.2e}, within tolerance.")
    if status.code is Code.MAX_ITERATIONS:
        return status
    if not literal and relative <= _attainable(options, found):
        return Status(
            Code.CONVERGED,
            f"{status.message} The true residual is {relative:.2e}, what {options.problem.dtype} "
            "allows.",
        )
    if status.code is Code.STAGNATED:
        return status
    return Status(
        Code.STAGNATED,
        f"The true residual is {relative:.2e} > rtol = {options.rtol:.2e}, which the precision of "
        f"the method or of the products limits: use float64 parameters, more damping, a larger "
        f"rtol, or method='cg'. ({status.message})",
    )


def _attainable(options: Options, found: Found) -> float:
    """The relative residual that rounding leaves, eps |H| |u| / |b|, up to the root of eps.

    In half precisions it is up to twice the default, which is a few roundings already.
    """
    eps = torch.finfo(options.problem.dtype).eps
    if found.step is None:
        return 0.0
    steps, sides = (rows_of(found.step), rows_of(options.b))
    v = steps
    norm, seen = row_norms(v), torch.zeros(len(v), dtype=torch.float64, device=v.device)
    for _ in range(POWER_STEPS):
        scale = torch.where(norm > 0, 1 / norm, 0.0).to(v.dtype).unsqueeze(-1)
        v = apply_rows(options.problem.hessian, v * scale)
        norm = row_norms(v)
        seen = torch.maximum(seen, norm)
    left = ROUNDED * eps * seen * row_norms(steps) / row_norms(sides)
    most = 2 * options.rtol if options.problem.dtype in HALF else float(eps**0.5)
    return min(float(left.min()), most)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
