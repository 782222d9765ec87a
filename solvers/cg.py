"""Preconditioned conjugate gradients that see rounding, curvature and the trust region."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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

OnNegativeCurvature = Literal["truncate", "direction", "raise"]


class NegativeCurvatureError(ValueError):
    """A direction of negative or zero curvature, where the caller asked not to meet one."""


@dataclass(frozen=True, eq=False)
class CGResult(KrylovResult):
    """The answer of `cg`.

    Attributes:
        direction: With `on_negative_curvature="direction"`, the directions of negative or zero
            curvature, of unit 2-norm; shape of b, zero for a column that met none. None if no
            column met one.
        curvature: p'Ap / p'p along them; float64, shape () or (k,), NaN for a column that met
            none. None with `direction`.
        coefficients: p'Ap / r'z and beta of every iteration of the first run (restarts left
            out); float64, shape (2, iterations, k), NaN where a column had already stopped. None
            if the preconditioner was flexible.
    """

    direction: Tensor | None
    curvature: Tensor | None
    coefficients: Tensor | None

    def tridiagonal(self, column: int = 0) -> tuple[Tensor, Tensor]:
        """The Lanczos matrix of A, or of M^(1/2) A M^(1/2) with a preconditioner M.

        Its eigenvalues, the Ritz values, lie between the extreme eigenvalues of that matrix.

        Args:
            column: Which column's Krylov space.

        Returns:
            The diagonal and the off-diagonal; float64, shapes (m,) and (m - 1,).

        Raises:
            ValueError: The solve was flexible, so its coefficients are not those of Lanczos.
        """
        if self.coefficients is None:
            raise ValueError("a flexible CG has no Lanczos matrix: solve with flexible=False.")
        curvature, beta = self.coefficients[:, :, column]
        curvature = curvature[~curvature.isnan()]
        beta = beta[: max(0, len(curvature) - 1)]
        diagonal = curvature.clone()
        diagonal[1:] += beta * curvature[:-1]
        return diagonal, beta.sqrt() * curvature[:-1]


@torch.no_grad()
def cg(
    operator: RowProduct,
    b: Tensor,
    *,
    preconditioner: RowProduct | None = None,
    initial: Tensor | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iterations: int | None = None,
    radius: float | None = None,
    on_negative_curvature: OnNegativeCurvature = "truncate",
    recurrence_dtype: torch.dtype | None = None,
    flexible: bool = False,
    vector_device: torch.device | str | None = None,
    progress: bool = False,
    give_up: Callable[[int, float], bool] | None = None,
) -> CGResult:
    """Solves A x = b, minimising 1/2 x'Ax - b'x, for a symmetric A.

    Every column stops on its own, and A is multiplied by all columns at once. Products run in
    the operator's dtype, vectors in `recurrence_dtype` and dot products in float64. When the
    recurrence has converged the residual is recomputed from x, which costs one product; should it
    be too large the solve starts again from it, as long as that keeps halving it.

    Products: the iterations, one for `initial`, and one for each run (restarts are rare).
    The device is read once per iteration.

    Memory: x, the residual r, the direction p and the product A p, besides b; one more for a
    preconditioner, and for products in another dtype up to two more in that one.

    Curvature that is not positive beyond the rounding of the products, p'Ap <= eps |A| |p|^2 with
    |A| the largest |Ap|/|p| met, is never divided by. The column keeps its current iterate. At
    the first iteration without `initial` that would be zero, so it steps along the preconditioned
    gradient z instead, by the length r'z / (|z||Az|): as if the curvature along z were as large as
    |Az|/|z| allows. (By 1 where Az = 0.)

    Args:
        operator: A: a `LinearOperator`, or a function of rows (k, n) to (k, n) whose products
            have b's dtype.
        b: Right-hand sides; shape (n,) or columns (n, k).
        preconditioner: M, approximates the inverse of A; positive definite. Any dtype.
        initial: First iterate; shape of b.
        rtol: A column stops when |r_j| <= max(rtol |b_j|, atol).
        atol: See `rtol`.
        max_iterations: Of the whole block, restarts included; None takes
            `default_iterations(n)`.
        radius: Trust region |x| <= radius (Steihaug and Toint), in the norm of M^(-1) if
            preconditioned, which is the norm in which the iterates grow. Takes no `initial`.
        on_negative_curvature: "truncate" stops the column; "direction" also returns the direction;
            "raise" raises.
        recurrence_dtype: None takes float64 for blocks of at most 2^24 numbers, else b's dtype,
            and float32 at least.
        flexible: Polak-Ribiere beta, for a preconditioner that changes or is itself inexact.
        vector_device: Where the vectors live, say "cpu" if an accelerator that multiplies has no
            room for them; None is b's device. That device then holds b and two more vectors. The
            answer is on b's device.
        progress: Show a progress bar.
        give_up: Sees the number of iterations and the worst relative residual of the recurrence
            after each, and ends the solve where it is true, as `max_iterations` would.

    Returns:
        The solution and how it was reached.

    Raises:
        ValueError: An argument does not fit, or b is not finite.
        NegativeCurvatureError: Asked for by `on_negative_curvature`.
    """
    if radius is not None and not radius > 0:
        raise ValueError(f"radius must be positive and is {radius}.")
    if radius is not None and (initial is not None or flexible):
        raise ValueError(
            "a trust region is centred at zero in a fixed norm: it takes neither `initial` nor "
            "`flexible`. Shift b by A @ initial, or drop `radius`."
        )
    if on_negative_curvature not in ("truncate", "direction", "raise"):
        raise ValueError(
            f"on_negative_curvature={on_negative_curvature!r}: "
            "choose 'truncate', 'direction' or 'raise'."
        )
    system = System(
        operator,
        b,
        preconditioner=preconditioner,
        rtol=rtol,
        atol=atol,
        recurrence_dtype=recurrence_dtype,
        vector_device=vector_device,
    )
    if max_iterations is None:
        max_iterations = default_iterations(len(b))
    x, r = system.start(initial)
    with tqdm(total=max_iterations, desc="cg", disable=not progress) as bar:
        run = _ConjugateGradients(
            system,
            radius=radius,
            on_negative_curvature=on_negative_curvature,
            flexible=flexible,
            from_zero=initial is None,
            bar=bar,
            give_up=give_up,
        )
        x, codes, norm, iterations = solve_to_true_residual(system, x, r, run, max_iterations)
    relative = system.relative(norm).to(b.device)
    direction, curvature = run.direction, run.curvature
    if direction is not None:
        direction = system.columns_of(direction)
    if curvature is not None:
        curvature = (curvature.squeeze(0) if system.is_vector else curvature).to(b.device)
    return CGResult(
        x=system.columns_of(x),
        iterations=iterations,
        residual_norm=relative.squeeze(0) if system.is_vector else relative,
        status=worst_status(codes),
        codes=codes,
        products=system.multiply.count,
        direction=direction,
        curvature=curvature,
        coefficients=None if flexible else run.coefficients().to(b.device),
    )


class _ConjugateGradients:
    """The recurrence, and what outlives a run of it."""

    def __init__(
        self,
        system: System,
        *,
        radius: float | None,
        on_negative_curvature: OnNegativeCurvature,
        flexible: bool,
        from_zero: bool,
        bar: tqdm,
        give_up: Callable[[int, float], bool] | None,
    ) -> None:
        self.system, self.flexible, self.bar = system, flexible, bar
        self.give_up, self.count = give_up, 0
        self.on_negative_curvature = on_negative_curvature
        self.ball = None if radius is None else _Ball(radius, system)
        self.eps = torch.finfo(system.dtype).eps
        self.p = system.zeros()
        self.at_zero = from_zero
        self.recorded: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.recording = True
        self.direction: Tensor | None = None
        self.curvature: Tensor | None = None

    def __call__(self, x: Tensor, r: Tensor, todo: list[int], budget: int) -> tuple[Ends, int]:
        """Advances columns `todo` of x and r in place; what ended, and after how many steps."""
        system, p, ball = self.system, self.p, self.ball
        running = system.mask(todo)
        ended: Ends = {}
        z = system.apply_preconditioner(r)
        rz = row_dots(r, z)
        p.copy_(z)
        if len(todo) < len(x):
            p.masked_fill_(~running.unsqueeze(-1), 0)
        del z
        pp = row_dots(p, p)
        if ball is not None:
            ball.enter(x, r, rz)
        iteration = 0
        while iteration < budget:
            iteration += 1
            q = system.multiply(p, pp)
            pq, qq = cross_dots(p, q)
            positive = pq > self.eps * system.see_norm((qq / pp).sqrt()) * pp
            size = (pp * qq).sqrt()
            alpha = torch.where(positive, rz / pq, self._length_uphill(rz, size))
            crosses = torch.zeros_like(positive)
            if ball is not None:
                alpha, crosses = ball.advance(alpha, positive)
            finite = (size + pq + rz).isfinite()
            usable = running & finite & (rz > 0)
            step = torch.where(usable, alpha, 0.0)
            rr = update_rows(r, q, step=-step)
            r_norm = rr.sqrt()
            self._record(0, torch.where(usable, pq / rz, torch.nan))

            outcome = first_event(
                running,
                {
                    Code.NOT_FINITE: ~(finite & r_norm.isfinite()),
                    Code.INDEFINITE: ~(rz > 0),
                    Code.TRUST_REGION: crosses,
                    Code.NEGATIVE_CURVATURE: ~positive,
                    Code.CONVERGED: r_norm <= system.tolerance,
                },
            )
            # The one time in an iteration that the device is read.
            places, bends_up, residuals = torch.stack(
                [outcome.double(), positive.double(), system.relative(r_norm)]
            ).tolist()
            show_progress(self.bar, residuals)
            news = read_events(places)
            for j, code in news.items():
                if code in (Code.TRUST_REGION, Code.NEGATIVE_CURVATURE) and not bends_up[j]:
                    self._meet_negative_curvature(j, pp[j], pq[j])
                if code in (Code.NOT_FINITE, Code.INDEFINITE):
                    # The step is zero, but p may be NaN.
                    p[j].zero_()
                r[j].zero_()
            x.addcmul_(p, per_row(step, x))
            self.count += 1
            if news:
                ended.update(news)
                running = running & (outcome == RUNNING)
                if len(ended) == len(todo):
                    break
            if self.give_up is not None and self.give_up(self.count, max(residuals)):
                ended.update({j: Code.MAX_ITERATIONS for j in todo if j not in ended})
                break

            z = system.apply_preconditioner(r)
            rz_old, rz = rz, rr if z is r else row_dots(r, z)
            # Polak-Ribiere's (r - r_old)'z / r_old'z_old, as r - r_old = -alpha q.
            beta = -row_dots(q, z) / pq if self.flexible else rz / rz_old
            beta = torch.where(running, beta, 0.0)
            pp = update_rows(p, z, decay=beta)
            if len(ended) or len(todo) < len(x):
                p.masked_fill_(~running.unsqueeze(-1), 0)
            if ball is not None:
                ball.turn(beta, rz)
            self._record(1, beta)
            # A callable makes the next of them before it would let go of these.
            del q, z
        self.recording = False
        return ended, iteration

    def coefficients(self) -> Tensor:
        """The two coefficients of every iteration of the first run; shape (2, iterations, k)."""
        curvatures, betas = self.recorded
        nothing = torch.full_like(self.system.b_norm, torch.nan)
        if not curvatures:
            return nothing.new_empty(2, 0, len(nothing))
        betas = betas[: len(curvatures)]
        betas = betas + [nothing] * (len(curvatures) - len(betas))
        return torch.stack([torch.stack(curvatures), torch.stack(betas)])

    def _length_uphill(self, rz: Tensor, size: Tensor) -> Tensor:
        """The step along a direction without a minimum: none, unless x would be left at zero."""
        if not self.at_zero:
            return torch.zeros_like(rz)
        self.at_zero = False
        return torch.where(size > 0, rz / size, 1.0)

    def _meet_negative_curvature(self, j: int, pp: Tensor, pq: Tensor) -> None:
        if self.on_negative_curvature == "raise":
            raise NegativeCurvatureError(
                f"column {j}, p'Ap / p'p = {float(pq / pp):.3g}: "
                f"{MESSAGES[Code.NEGATIVE_CURVATURE]}"
            )
        if self.on_negative_curvature == "direction":
            if self.direction is None:
                self.direction = torch.zeros_like(self.p, dtype=self.system.dtype)
                self.curvature = torch.full_like(self.system.b_norm, torch.nan)
            assert self.curvature is not None
            self.direction[j] = self.p[j] / pp.sqrt()
            self.curvature[j] = pq / pp

    def _record(self, which: int, coefficient: Tensor) -> None:
        if self.recording:
            self.recorded[which].append(coefficient)


class _Ball:
    """The trust region |x|_N <= radius, N the inverse of the preconditioner M or the identity.

    N is never applied: N p is known through the recurrence p = z + beta p_old, z = M r, in which
    r is orthogonal to p_old and to the steps already taken.
    """

    def __init__(self, radius: float, system: System) -> None:
        self.square = radius**2
        self.xx = torch.zeros_like(system.b_norm)

    def enter(self, x: Tensor, r: Tensor, rz: Tensor) -> None:
        """Starts a run at x with p = M r, so that x'Np = x'r and p'Np = r'z."""
        self.xp, self.pp = row_dots(x, r), rz

    def advance(self, alpha: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """The step cut at the boundary, and where it was; uphill the boundary is the only end."""
        room = (self.square - self.xx).clamp(min=0)
        crosses = ~positive | (alpha * (2 * self.xp + alpha * self.pp) >= room)
        root = (self.xp**2 + self.pp * room).sqrt()
        # The positive root of |x + t p| = radius, written without cancellation.
        ahead = torch.where(self.xp > 0, room / (self.xp + root), (root - self.xp) / self.pp)
        alpha = torch.where(crosses, ahead, alpha)
        self.xx = self.xx + alpha * (2 * self.xp + alpha * self.pp)
        self.xp = self.xp + alpha * self.pp
        return alpha, crosses

    def turn(self, beta: Tensor, rz: Tensor) -> None:
        """Follows p = z + beta p_old."""
        self.xp, self.pp = beta * self.xp, rz + beta**2 * self.pp
