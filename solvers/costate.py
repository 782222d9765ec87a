"""The terminal costate of the exact step: N C numbers that hold all of its weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..operators.tangent_kernel import TangentKernelOperator
from .cg import cg
from .dual import Factor
from .krylov import RowProduct

CONTRACTION = 0.25
"""A correction that shrinks the residual less than this is followed by CG's."""


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
    """

    def __init__(
        self,
        kernel: TangentKernelOperator,
        factor: Factor,
        q: Tensor,
        *,
        cholesky: Tensor | None = None,
        preconditioner: RowProduct | None = None,
    ) -> None:
        assert factor.rank is not None
        self.kernel, self.factor, self.q = kernel, factor, q
        self.shape = (factor.rank, factor.samples)
        self.cholesky, self.preconditioner = cholesky, preconditioner
        self.direct = cholesky is not None
        self.iterations = 0
        self.y = q.new_zeros(1, factor.rank * factor.samples, dtype=torch.float64)
        self.p, self.products = q, 1
        self.response, square = kernel.rows_and_squares(q)
        self.gradient_norm = math.sqrt(float(square))
        self.residual = self._coordinates(self.response)
        self.norm = math.sqrt(max(float((q.double() * self.response.double()).sum()), 0.0))
        self.estimate = self._relative(self.residual)

    def solve(self, rtol: float, max_iterations: int, *, progress: bool = False) -> None:
        """Corrects y until the estimated residual is at most rtol, or no longer falls.

        It leaves `p` with its `response`, K p.
        """
        before = math.inf
        while self.estimate > rtol and self.iterations < max_iterations:
            if not self.estimate < before / 2:
                return
            ratio, before = self.estimate / before, self.estimate
            if ratio > CONTRACTION and before < 1:
                self.direct = False
            self.correct(self.residual, rtol, max_iterations, progress=progress)
            self._look()
            self.estimate = self._relative(self.residual)

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
            change = -self._by_cholesky(residual)
        else:
            # Half of what is wanted leaves room for the rounding of one product.
            inner = cg(
                self._matrix,
                residual.mT,
                preconditioner=self.preconditioner if self.cholesky is None else self._by_cholesky,
                rtol=min(0.5, 0.5 * rtol / max(self.estimate, rtol)),
                max_iterations=max(1, max_iterations - self.iterations),
                recurrence_dtype=torch.float64,
                progress=progress,
            )
            self.iterations += inner.iterations
            change = -inner.x.mT
        self.y = self.y + change
        self.p = (self.q.double() + self._spread(self.y)).to(self.q.dtype)
        return self._spread(change).to(self.q.dtype)

    def observed(self, state: Tensor) -> Tensor:
        """S = y - L'x for the last state x = J u that a step u reached; rows (1, n_T)."""
        return self.y - self._coordinates(state)

    def _look(self) -> None:
        """K p, and the residual s of the p there is."""
        self.response = self._respond(self.p)
        self.residual = self.y + self._coordinates(self.response)

    def _respond(self, p: Tensor) -> Tensor:
        self.products += 1
        return self.kernel._rows(p)

    def _coordinates(self, state: Tensor) -> Tensor:
        return self.factor.factor_t(state.double()).flatten(1)

    def _spread(self, y: Tensor) -> Tensor:
        return self.factor.factor(y.reshape(len(y), *self.shape))

    def _matrix(self, y: Tensor) -> Tensor:
        return y + self._coordinates(self._respond(self._spread(y).to(self.q.dtype)))

    def _by_cholesky(self, s: Tensor) -> Tensor:
        assert self.cholesky is not None
        return torch.cholesky_solve(s.double().mT, self.cholesky).mT

    def _relative(self, s: Tensor) -> float:
        """|R^{-1/2} J'L s| / |R^{-1/2} J'q|."""
        if self.norm == 0:
            return 0.0
        if self.cholesky is not None:
            square = float((s @ self.cholesky).square().sum() - s.square().sum())
        else:
            square = float((s * (self._matrix(s) - s)).sum())
        return math.sqrt(max(square, 0.0)) / self.norm
