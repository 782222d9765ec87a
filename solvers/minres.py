"""The minimal residual method of Paige and Saunders (1975)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from .dots import cross_dots, row_dots, update_rows
from .krylov import (
    RUNNING,
    Ends,
    KrylovResult,
    System,
    default_iterations,
    first_event,
    per_row,
    read_events,
    show_progress,
    solve_to_true_residual,
)
from .product import RowProduct
from .status import MESSAGES, Code, worst_status

_MESSAGES = MESSAGES | {
    Code.STAGNATED: (
        "the true residual stopped falling above the tolerance. Either b is not in the range of "
        "the operator, and x is a least-squares solution, or the precision of the products "
        "limits it: loosen `rtol`, run the operator in a wider dtype, or add damping."
    ),
}


@dataclass(frozen=True, eq=False)
class MinresResult(KrylovResult):
    """The answer of `minres`."""


@torch.no_grad()
def minres(
    operator: RowProduct,
    b: Tensor,
    *,
    preconditioner: RowProduct | None = None,
    rtol: float = 1e-6,
    max_iterations: int | None = None,
    recurrence_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> MinresResult:
    """Solves A x = b for a symmetric A of any sign, minimising |b - A x|.

    Blocks of columns, mixed precision, tolerances and the check of the true residual are as in
    `cg`, and so is the count of products. With a preconditioner M the norm that falls is that of
    M; the one that stops a column is the Euclidean norm all the same. Where b is not in the range
    of A the solve ends as `STAGNATED`, with a least-squares solution.

    Args:
        operator: A: a `LinearOperator`, or a function of rows (k, n) to (k, n) whose products
            have b's dtype.
        b: Right-hand sides; shape (n,) or columns (n, k).
        preconditioner: M, approximates the inverse of |A|; positive definite. Any dtype.
        rtol: A column stops when |r_j| <= rtol |b_j|.
        max_iterations: Of the whole block, restarts included; None takes
            `default_iterations(n)`.
        recurrence_dtype: None takes float64 for blocks of at most 2^24 numbers, else b's dtype,
            and float32 at least.
        progress: Show a progress bar.

    Returns:
        The solution and how it was reached.

    Raises:
        ValueError: An argument does not fit, or b is not finite.
    """
    system = System(
        operator,
        b,
        preconditioner=preconditioner,
        rtol=rtol,
        atol=0.0,
        recurrence_dtype=recurrence_dtype,
    )
    if max_iterations is None:
        max_iterations = default_iterations(len(b))
    x, r = system.start(None)
    with tqdm(total=max_iterations, desc="minres", disable=not progress) as bar:
        run = _MinimalResiduals(system, bar)
        x, codes, norm, iterations = solve_to_true_residual(system, x, r, run, max_iterations)
    relative = system.relative(norm)
    return MinresResult(
        x=system.columns_of(x),
        iterations=iterations,
        residual_norm=relative.squeeze(0) if system.is_vector else relative,
        status=worst_status(codes, _MESSAGES),
        codes=codes,
        products=system.multiply.count,
    )


class _MinimalResiduals:
    """Lanczos on A in the inner product of M, and a QR of its tridiagonal matrix.

    v are the Lanczos vectors before normalisation and z = M v / gamma after it; w are the
    directions of x, and (c, s) the rotations.
    """

    def __init__(self, system: System, bar: tqdm) -> None:
        self.system, self.bar = system, bar
        self.eps = torch.finfo(system.dtype).eps
        self.v, self.v_old, self.z, self.w, self.w_old = (system.zeros() for _ in range(5))

    def __call__(self, x: Tensor, r: Tensor, todo: list[int], budget: int) -> tuple[Ends, int]:
        """Advances columns `todo` of x and r in place; what ended, and after how many steps."""
        system, z = self.system, self.z
        v, v_old, w, w_old = self.v.copy_(r), self.v_old, self.w, self.w_old
        for block in (v_old, w, w_old):
            block.zero_()
        running = system.mask(todo)
        ended: Ends = {}
        y = system.apply_preconditioner(v)
        square = row_dots(v, y)
        gamma = square.clamp(min=0).sqrt()
        self._normalise(y, gamma, running & (square > 0))
        gamma_old, eta, size = torch.ones_like(gamma), gamma, torch.zeros_like(gamma)
        c_old = c = torch.ones_like(gamma)
        s_old = s = torch.zeros_like(gamma)
        iteration = 0
        while iteration < budget:
            iteration += 1
            zz = row_dots(z, z)
            q = system.multiply(z, zz)
            delta, qq = cross_dots(z, q)
            system.see_norm((qq / zz).sqrt())
            v_old.mul_(per_row(-gamma / gamma_old, v)).add_(q)
            # A callable makes the next product before it would let go of this one.
            del q
            v_old.addcmul_(v, per_row(-delta / gamma, v))
            v, v_old = v_old, v
            definite = ~(square < 0)
            y = system.apply_preconditioner(v)
            square = row_dots(v, y)
            definite &= ~(square < 0)
            gamma_old, gamma = gamma, square.clamp(min=0).sqrt()

            # The next column of the tridiagonal matrix, through the last two rotations.
            a0 = c * delta - c_old * s * gamma_old
            a1 = (a0**2 + square.clamp(min=0)).sqrt()
            a2 = s * delta + c_old * c * gamma_old
            a3 = s_old * gamma_old
            # |A r| is |r| times this root, in the norm of M. Where it is zero r cannot fall; the
            # recurrence sees a zero as sqrt(eps), and a fall of r by a factor of 1 - a0^2 / 2 a1^2.
            root = (a0**2 + (c * gamma) ** 2).sqrt()
            size = torch.fmax(size, (delta**2 + gamma**2).sqrt())
            optimal = (root <= self.eps**0.5 * size) & (a0**2 <= 100 * self.eps * a1**2)
            finite = (delta + square).isfinite()
            usable = running & finite & definite & ~optimal
            c_old, c = c, a0 / a1
            s_old, s = s, gamma / a1

            inverse = torch.where(usable, 1 / a1, 0.0)
            w_old.mul_(per_row(torch.where(usable, -a3 * inverse, 0.0), w))
            w_old.addcmul_(w, per_row(torch.where(usable, -a2 * inverse, 0.0), w))
            w_old.addcmul_(z, per_row(inverse, w))
            w, w_old = w_old, w
            x.addcmul_(w, per_row(torch.where(usable, c * eta, 0.0), x))
            eta = -s * eta
            along = torch.where(usable & (gamma > 0), c * eta / gamma, 0.0)
            r_norm = update_rows(r, v, decay=s**2, step=along).sqrt()

            outcome = first_event(
                running,
                {
                    Code.INDEFINITE: ~definite,
                    Code.NOT_FINITE: ~finite,
                    Code.STAGNATED: optimal,
                    Code.CONVERGED: r_norm <= system.tolerance,
                },
            )
            # The one time in an iteration that the device is read.
            places, residuals = torch.stack([outcome.double(), system.relative(r_norm)]).tolist()
            show_progress(self.bar, residuals)
            news = read_events(places)
            if news:
                ended.update(news)
                running = running & (outcome == RUNNING)
                if len(ended) == len(todo):
                    break
            self._normalise(y, gamma, running & (square > 0))
        return ended, iteration

    def _normalise(self, y: Tensor, gamma: Tensor, live: Tensor) -> None:
        """Z = y / gamma, and zero in every column that has stopped."""
        inverse = per_row(torch.where(live, 1 / gamma, 0.0), y)
        torch.mul(y, inverse, out=self.z).masked_fill_(~live.unsqueeze(-1), 0)
