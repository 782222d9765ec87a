"""The terminal costate of the exact step: N C numbers that hold all of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..operators.tangent_kernel import TangentKernelOperator
from .cg import cg
from .coordinates import Coordinates, Factor, solve_by_cholesky

CONTRACTION = 0.25
"""A correction that shrinks the residual less than this is followed by CG's."""

ROUNDED = 1e-3
"""Below this it is the rounding of p that stops corrections, and not a poor Gram matrix."""


class CostateEquation:
    """p = q + Q K-weighted feedback: p = q + L y with y = L'J u and u = -R^{-1} J' p.

    p is the costate p_T = Q_T x_T + q_T of the LQR problem, and u_t = -R_t^{-1} B_t' p_{t+1} its
    step; design.md section 2, fact 3, for the right-hand side -J'q. With K = J R^{-1} J' the
    equation is (I + L'K L) y = -L'K q. Its residual s = y + L'K p gives that of the step exactly,
    H u + g = -J'L s, so it is solved to what the step needs: |R^{-1/2} J'L s| <= rtol |R^{-1/2} g|.

    Nothing of the controls' size is formed. y is in float64, the products are the kernel's.

    Args:
        kernel: K.
        factor: L.
        q: Gradient at the last state; rows (1, n_T).
        cholesky: Factor of I + G, G about L'K L, float64 (rN, rN); None for matrix-free CG.
        preconditioner: For matrix-free CG: rows (k, rN) to rows, about (I + G)^{-1}.

    Raises:
        ValueError: J'q is not finite.
    """

    def __init__(
        self,
        kernel: TangentKernelOperator,
        factor: Factor,
        q: Tensor,
        *,
        cholesky: Tensor | None = None,
        preconditioner: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.kernel, self.coordinates, self.q = kernel, Coordinates(factor), q
        self.cholesky, self.preconditioner = cholesky, preconditioner
        self.direct = cholesky is not None
        self.iterations, self.products = 0, 1
        self.y = q.new_zeros(1, self.coordinates.size, dtype=torch.float64)
        self.p = q
        self.response, squares = kernel.rows_and_squares(q)
        self.gradient_norm, self.norm = squares.sqrt().flatten().tolist()
        if not math.isfinite(self.norm):
            raise ValueError(
                "the gradient has entries that are NaN or infinite: there is no step. Look at the "
                "layers' derivatives on this batch."
            )
        self.residual = self.coordinates.seen(self.response)
        self.estimate = self._relative(self.residual)

    def solve(self, rtol: float, max_iterations: int, *, progress: bool = False) -> None:
        """Corrects y until the estimated residual is at most rtol, or no longer falls.

        It leaves the best `p` that was met, with its `response`, K p.
        """
        before = math.inf
        while self.estimate > rtol and self.iterations < max_iterations:
            if not self.estimate < before / 2:
                return
            if self.direct and self.estimate > CONTRACTION * before:
                if self.estimate < ROUNDED:
                    return
                self.direct = False
            before = self.estimate
            kept = self.y, self.p, self.response, self.residual, self.estimate
            self.correct(self.residual, rtol, max_iterations, progress=progress)
            self.response = self._respond(self.p)
            self.residual = self.y + self.coordinates.seen(self.response)
            self.estimate = self._relative(self.residual)
            if not self.estimate < before:
                self.y, self.p, self.response, self.residual, self.estimate = kept
                return

    def correct(
        self, residual: Tensor, rtol: float, max_iterations: int, *, progress: bool = False
    ) -> Tensor:
        """Y - (I + G)^{-1} s, and p with it.

        Args:
            residual: s, rows (1, rN) in float64.
            rtol: The residual that is wanted in the end.
            max_iterations: Of CG, in all.
            progress: Whether CG shows a bar.

        Returns:
            By how much p has changed, a row (1, n_T).
        """
        if self.direct:
            assert self.cholesky is not None
            change = -solve_by_cholesky(self.cholesky, residual)
        else:
            # Half of what is wanted leaves room for the rounding of one product.
            inner = cg(
                self._matrix,
                residual.mT,
                preconditioner=self._precondition,
                rtol=min(0.5, 0.5 * rtol / max(self.estimate, rtol)),
                max_iterations=max(1, max_iterations - self.iterations),
                recurrence_dtype=torch.float64,
                progress=progress,
            )
            self.iterations += inner.iterations
            change = -inner.x.mT
        self.y = self.y + change
        self.p = (self.q.double() + self.coordinates.spread(self.y)).to(self.q.dtype)
        return self.coordinates.spread(change).to(self.q.dtype)

    def observed(self, state: Tensor) -> Tensor:
        """S = y - L'x for the last state x = J u that a step u reached; rows (1, n_T)."""
        return self.y - self.coordinates.seen(state)

    def unformed_residual(self) -> float:
        """|H u + g| / |g| of u = -R^{-1} J' p, the rounding of p included.

        With e what p was rounded by, H u + g = -J'(L s + e).
        """
        exact = self.q.double() + self.coordinates.spread(self.y)
        left = self.coordinates.spread(self.residual) + (self.p.double() - exact)
        self.products += 1
        _, squares = self.kernel.rows_and_squares(left.to(self.q.dtype))
        return math.sqrt(float(squares[0])) / (self.gradient_norm or 1.0)

    def _respond(self, p: Tensor) -> Tensor:
        self.products += 1
        return self.kernel._rows(p)

    def _matrix(self, y: Tensor) -> Tensor:
        outputs = self.coordinates.spread(y).to(self.q.dtype)
        return y + self.coordinates.seen(self._respond(outputs))

    def _precondition(self, y: Tensor) -> Tensor:
        if self.cholesky is not None:
            return solve_by_cholesky(self.cholesky, y)
        return y if self.preconditioner is None else self.preconditioner(y)

    def _relative(self, s: Tensor) -> float:
        """|R^{-1/2} J'L s| / |R^{-1/2} J'q|."""
        if self.norm == 0:
            return 0.0
        if self.cholesky is not None:
            square = float((s @ self.cholesky).square().sum() - s.square().sum())
        else:
            self.products += 1
            outputs = self.coordinates.spread(s).to(self.q.dtype)
            square = float(self.kernel.rows_and_squares(outputs)[1][1])
        return math.sqrt(max(square, 0.0)) / self.norm
