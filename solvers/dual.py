"""The exact step through the output space, for very wide layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators.system import System
from ..operators.tangent import from_rows
from .cg import CGResult, cg
from .coordinates import Coordinates, Factor, solve_by_cholesky
from .dots import row_norms
from .product import RowProduct
from .status import Code, Status

GRAM_PASS = 32
"""Columns per pass when the Gram matrix is formed by products."""

PASS_ELEMENTS = 2**23
"""Numbers in the controls of one such pass, of which a few are alive at a time."""


@dataclass(frozen=True)
class DualResult:
    """A solution found in the output space.

    Args:
        u: Rows (k, P).
        iterations: CG iterations in the output space.
        residual_norm: True relative residual of the condensed equations, per row.
        products: Condensed products spent, counting a rollout with an adjoint as one.
        status: How it ended.
    """

    u: Tensor
    iterations: int
    residual_norm: Tensor
    products: int
    status: Status


class Dual:
    """(I + G) y = h with G = L'J R^{-1} J'L; design.md section 2, fact 3.

    For H = J'LL'J + R and a right-hand side b, the solution is u = R^{-1}(b - J'L y) with
    (I + G) y = L'J R^{-1} b. Everything of size N r is in float64; the Cholesky factor of I + G
    preconditions CG on the true products, so that the rounding of a float32 Gram matrix costs an
    iteration or two, not accuracy. Without a Gram matrix this is matrix-free dual CG.

    The two terms of u cancel, more so the smaller the damping: one pass leaves a relative residual
    of about eps |H| / damping. So u is refined: the residual is solved for, and added.

    Args:
        system: Terminal cost only.
        factor: L.
        gram: G, shape (r N, r N) with index j N + n, or None.
        preconditioner: Without a Gram matrix: rows (k, r N) to rows, about (I + G)^{-1}.
    """

    def __init__(
        self,
        system: System,
        factor: Factor,
        gram: Tensor | None,
        preconditioner: RowProduct | None = None,
    ) -> None:
        if system.curved:
            raise ValueError(
                "the dual solve needs a terminal cost alone: this problem has costs on other "
                "layers or second-order terms; use method='cg'."
            )
        self.system, self.coordinates = system, Coordinates(factor)
        self._cholesky = None if gram is None else safe_cholesky(gram)
        self._approximate = preconditioner if gram is None else self._precondition

    def solve(
        self, b: Tensor, *, rtol: float, max_iterations: int | None, progress: bool = False
    ) -> DualResult:
        """H u = b for rows b of shape (k, P), to a relative residual of rtol.

        Args:
            b: Right-hand sides.
            rtol: Wanted true relative residual.
            max_iterations: Most CG iterations in all.
            progress: Whether to show a progress bar.
        """
        system = self.system
        norm = row_norms(b)
        limit = max(1, self.coordinates.size if max_iterations is None else max_iterations)
        iterations, products = 0, 0
        u, left = torch.zeros_like(b), b
        residual = (norm != 0).to(norm)
        worst, tolerance = float(residual.max()), rtol
        code, message = Code.CONVERGED, ""
        while worst > rtol:
            if iterations >= limit:
                code, message = Code.MAX_ITERATIONS, "Raise max_iterations, or the damping."
                break
            correction, inner = self._correction(left, tolerance, limit - iterations, progress)
            iterations, products = iterations + inner.iterations, products + inner.products + 3
            before = worst
            corrected = correction.add_(u)
            left = system.condensed_product(corrected).neg_().add_(b)
            measured = row_norms(left)
            measured = torch.where(norm > 0, measured / norm, measured)
            worst = float(measured.max())
            if not math.isfinite(worst):
                code, message = Code.NOT_FINITE, "A product was not finite: look at the inputs."
                break
            if worst < before:
                u, residual = corrected, measured
            if worst > max(rtol, before / 2):
                code = Code.STAGNATED
                message = (
                    f"The residual stays at {min(worst, before):.2e}, which the precision of the "
                    "products limits: use float64 parameters, more damping, a larger rtol, or "
                    "method='cg'."
                )
                break
            # An error of y shows in u enlarged by up to |G|, which is seen here.
            enlarged = worst / (before * tolerance)
            tolerance = min(0.5 * rtol / max(worst, 1e-300), 0.1) / max(enlarged, 1.0)
            tolerance = max(tolerance, torch.finfo(b.dtype).eps)
        if code is Code.CONVERGED:
            message = f"Exact dual solve, {iterations} CG iterations in the output space."
        return DualResult(u, iterations, residual, products, Status(code, message))

    def precondition_rows(self, v: Tensor) -> Tensor:
        """H^{-1} v by the Gram matrix, as exact as that is; rows (k, P)."""
        start = self.system.control_cost.inverse_product(v)
        y = self._precondition(self._observe(start))
        return start.sub_(self._spread(y))

    def _observe(self, u: Tensor) -> Tensor:
        """L'J u as float64 rows (k, r N)."""
        return self.coordinates.seen(self.system.output_product(u))

    def _correction(
        self, b: Tensor, rtol: float, max_iterations: int, progress: bool
    ) -> tuple[Tensor, CGResult]:
        """R^{-1} (b - J'L y), and how y was found."""
        start = self.system.control_cost.inverse_product(b)
        inner = cg(
            self._matrix,
            self._observe(start).mT,
            preconditioner=self._approximate,
            rtol=rtol,
            max_iterations=max_iterations,
            recurrence_dtype=torch.float64,
            progress=progress,
        )
        return start.sub(self._spread(inner.x.mT)), inner

    def _spread(self, y: Tensor) -> Tensor:
        """R^{-1} J'L y, float64 rows (k, r N) to rows (k, P)."""
        system = self.system
        outputs = self.coordinates.spread(y).to(system.proto.dtype)
        costate = from_rows(outputs, system.state_shapes(system.horizon))
        return system.control_cost.inverse_product(system.output_product_t(costate, len(y)))

    def _matrix(self, y: Tensor) -> Tensor:
        """(I + G) y by products."""
        return y + self._observe(self._spread(y))

    def _precondition(self, y: Tensor) -> Tensor:
        assert self._cholesky is not None
        return solve_by_cholesky(self._cholesky, y)


def gram_by_products(system: System, factor: Factor) -> Tensor:
    """G = L'J R^{-1} J'L, some columns at a time, for any network and any R."""
    dual = Dual(system, factor, None)
    size = dual.coordinates.size
    eye = torch.eye(size, dtype=torch.float64, device=system.proto.device)
    step = max(1, min(GRAM_PASS, PASS_ELEMENTS // max(1, system.control_size)))
    rows = [dual._observe(dual._spread(part)) for part in eye.split(step) if size]
    gram = torch.cat([eye[:0], *rows])
    return (gram + gram.mT) / 2


class FactorizationError(ValueError):
    """I + G cannot be factored, since G is not finite."""


def safe_cholesky(gram: Tensor) -> Tensor:
    """Triangular factor F of I + G = F F' in float64, without G's rounding-made negative part.

    Raises:
        FactorizationError: G is not finite.
    """
    matrix = gram.double().clone()
    matrix.diagonal().add_(1)
    if not bool(torch.isfinite(matrix).all()):
        raise FactorizationError(
            "the Gram matrix G = L'J R^{-1} J'L is not finite: raise the damping, whose inverse it "
            "is a multiple of, use a wider dtype or method='cg', or look at the layers' "
            "derivatives on this batch."
        )
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        return factor
    # Of sizes that cannot overflow on the way.
    largest = matrix.abs().max()
    try:
        eigenvalues, vectors = torch.linalg.eigh((matrix + matrix.mT) / largest / 2)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # LAPACK's, where its iteration does not converge
        return _shifted(matrix, largest)
    roots = (eigenvalues * largest).clamp(min=1.0).sqrt()
    # R'R = V diag V' for any range of eigenvalues, which a second Cholesky would not be.
    return torch.linalg.qr(roots.unsqueeze(-1) * vectors.mT, mode="r").R.mT.contiguous()


def _shifted(matrix: Tensor, largest: Tensor) -> Tensor:
    """Cholesky factor with the least multiple of the identity, of a growing series, that works."""
    shift = float(largest) * len(matrix) * torch.finfo(matrix.dtype).eps
    while True:
        matrix.diagonal().add_(shift)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            return factor
        shift *= 10
