"""b'A^{-1}b between two bounds."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators.apply import apply_rows, as_operator
from ..solvers.cg import CGResult, cg
from ..solvers.dots import row_dots
from ..solvers.product import RowProduct
from ..solvers.quadrature import SLACK, bracket, gauss
from .checks import check_definite, check_lower, check_rtol
from .estimate import Estimate
from .probed import Probeable, preconditioned, symmetric_operator


@torch.no_grad()
def inverse_quadratic(
    A: Probeable,
    b: Tensor,
    *,
    preconditioner: RowProduct | Tensor | None = None,
    lower: float | None = None,
    rtol: float = 1e-6,
    max_iterations: int | None = None,
    progress: bool = False,
) -> Estimate:
    """b'A^{-1}b for a positive-definite A, of one vector or of each column; nothing is random.

    With the x of CG and its true residual r = b - A x, whatever the rounding that x has seen,

        b'A^{-1}b = b'x + x'r + r'A^{-1}r,      0 <= r'A^{-1}r <= r'r / lower.

    The first two terms are the lower bound. (b'x alone, the Gauss rule of the CG, is one to first
    order in r.) In float64 and without M the upper bound is that of the Gauss-Radau rule with a
    node at `lower` where that is less (Golub and Meurant 2010, chapter 12). The value is the middle
    and `bias_bound` half of what is between. Without `lower` the last term is estimated as r'Mr
    over the smallest Ritz value of M A, which is not below its smallest eigenvalue: then
    `bias_bound` is no bound, but of the right size once CG has converged.

    `max_iterations` may end a solve early: the bounds are then wide, and right.
    Rounding of the products, which no residual shows, adds up to about eps |A| |x|^2 to either end.

    Args:
        A: A symmetric positive-definite operator or matrix, or a problem, whose Hessian with its
            damping is meant.
        b: Shape (n,) or columns (n, k), in A's dtype.
        preconditioner: M, about A^{-1}, positive definite.
        lower: A lower bound of the spectrum of A, say the damping; positive.
        rtol: Relative residual at which a column stops.
        max_iterations: Of the whole block; None takes `solvers.krylov.default_iterations`.
        progress: Show a progress bar.

    Returns:
        The numbers, float64, shape () or (k,), with a standard error of 0. `products` counts
        vectors.

    Raises:
        ValueError: A is not positive definite along b's Krylov space, `lower` is seen to be no
            lower bound, or an argument does not fit.
    """
    check_lower(lower)
    check_rtol(rtol)
    operator = symmetric_operator(A)
    if isinstance(preconditioner, Tensor):
        preconditioner = as_operator(preconditioner)
    solved = cg(
        operator,
        b,
        preconditioner=preconditioner,
        rtol=rtol,
        max_iterations=max_iterations,
        progress=progress,
    )
    check_definite(solved)
    rows = b.reshape(1, -1) if b.ndim == 1 else b.mT
    x = solved.x.reshape(1, -1) if b.ndim == 1 else solved.x.mT
    r = rows - apply_rows(operator, x.contiguous())
    below = row_dots(rows, x) + row_dots(x, r)
    if lower is not None:
        quotients = (row_dots(rows, x) - row_dots(x, r)) / row_dots(x, x)
        _check_bound(lower, quotients, solved, b.dtype, plain=preconditioner is None)
        gap = row_dots(r, r) / lower
        if preconditioner is None and b.dtype == torch.float64:
            square = row_dots(rows, rows)
            gap = torch.fmin(gap, (_radau(solved, square, lower) - below).clamp(min=0))
    else:
        gap = row_dots(r, preconditioned(preconditioner, r)) / _smallest_ritz(solved, len(rows))
    value, error = below + gap / 2, gap / 2
    if b.ndim == 1:
        value, error = value[0], error[0]
    return Estimate(
        value=value,
        standard_error=torch.zeros_like(value),
        samples=1,
        products=(solved.products + 1) * len(rows),
        seed=0,
        method="conjugate gradients",
        bias_bound=error,
    )


def _check_bound(
    lower: float, quotients: Tensor, solved: CGResult, dtype: torch.dtype, *, plain: bool
) -> None:
    """Refuses a `lower` that is above an eigenvalue, as the solution or a Ritz value shows.

    Args:
        lower: The bound.
        quotients: x'Ax / x'x, NaN of a zero b.
        solved: Without preconditioner its Ritz values are those of A.
        dtype: Of the products.
        plain: Whether there was no preconditioner.
    """
    met = quotients[quotients.isfinite()]
    if plain:
        made = [solved.tridiagonal(j) for j in range(len(quotients))]
        met = torch.cat([met, *(gauss(*own)[0] for own in made if len(own[0]))])
    if len(met) == 0:
        return
    least, most = float(met.min()), float(met.max())
    if least < lower - SLACK * torch.finfo(dtype).eps * max(most, lower):
        raise ValueError(
            f"lower={lower:.6g} is no bound of the spectrum: A has an eigenvalue of at most "
            f"{least:.6g}. Give a lower one, or None."
        )


def _radau(solved: CGResult, square: Tensor, lower: float) -> Tensor:
    """The upper bounds of Gauss-Radau rules, given b'b of every column."""
    made = []
    for j in range(len(square)):
        diagonal, off = solved.tridiagonal(j)
        if len(diagonal) == 0:
            made.append(torch.zeros_like(square[j]))
            continue
        value, error = bracket(diagonal, off, torch.reciprocal, lower=lower)
        # The node is moved by as many roundings of T, and its share is not above 1 / lower.
        moved = 2 * SLACK * torch.finfo(torch.float64).eps * diagonal.max() / lower
        made.append((value + error) * square[j] * (1 + moved))
    return torch.stack(made)


def _smallest_ritz(solved: CGResult, columns: int) -> Tensor:
    made = []
    for j in range(columns):
        diagonal, off = solved.tridiagonal(j)
        made.append(gauss(diagonal, off)[0][0] if len(diagonal) else diagonal.new_ones(()))
    return torch.stack(made)
