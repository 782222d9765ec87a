"""Iterative refinement: cheap, coarse products inside, exact ones where they decide."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..operators.base import MatrixFreeOperator
from .cg import cg
from .dots import row_norms
from .krylov import KrylovResult, System, default_iterations
from .product import RowProduct, multiply
from .status import Code, Status, worst_status

ROUND_RTOL = 0.1
"""Reduction asked of one round. Coarse products of relative error 4e-3 give no more than 1e-2, and
less than 1e-1 costs a true residual too often."""

FIRST_ROUND = 32
"""Iterations of the first round, doubled from round to round: a useless coarse operator is found
out early, and an ill-conditioned system is not restarted often."""

GROWTH_SEEN = 4
"""Products of a round in which |A p| / |p| is looked at, for a lower bound of |A|."""


@dataclass(frozen=True, eq=False)
class RefinedResult(KrylovResult):
    """The answer of `refined_cg`; `products` are those with the exact operator.

    Attributes:
        coarse_products: Products with the coarse operator.
        rounds: Coarse solves.
        left_to_plain: For each column, why plain CG finished it; None where the coarse products
            did.
    """

    coarse_products: int
    rounds: int
    left_to_plain: tuple[str | None, ...]


@torch.no_grad()
def refined_cg(
    operator: RowProduct,
    coarse: RowProduct,
    b: Tensor,
    *,
    preconditioner: RowProduct | None = None,
    initial: Tensor | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iterations: int | None = None,
    recurrence_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> RefinedResult:
    """Solves A x = b for a positive-definite A with most products taken from a cheap copy of it.

    A round solves A~ d = r by CG on the coarse A~, to a tenth of r at best, adds d to x and takes
    the true residual r = b - A x from the exact operator. So errors of A~ cost iterations and
    never accuracy. A column whose round does not halve its true residual (or quarter it, if the
    coarse CG stagnated), or meets negative curvature, is finished by plain CG on A from the best
    iterate so far, and the status says so.

    Products: with A, one per round and one for `initial`, besides those of a plain finish; with
    A~, about twice as many as plain CG would take.

    Args:
        operator: A: a `LinearOperator`, or a function of rows (k, n) to (k, n).
        coarse: A~, likewise; same size, dtype and device.
        b: Right-hand sides; shape (n,) or columns (n, k).
        preconditioner: Approximates the inverse of A; positive definite.
        initial: First iterate; shape of b.
        rtol: A column stops when its true residual |r_j| <= max(rtol |b_j|, atol).
        atol: See `rtol`.
        max_iterations: Of the coarse rounds together, and again of a plain finish; None takes
            twice `default_iterations(n)` and `default_iterations(n)`.
        recurrence_dtype: Of x, r and a plain finish, as in `cg`. Rounds run in b's dtype.
        progress: Show a progress bar per round.

    Returns:
        The solution, how it was reached, and both counts of products.

    Raises:
        ValueError: An argument does not fit, or b is not finite.
    """
    system = System(
        operator,
        b,
        preconditioner=preconditioner,
        rtol=rtol,
        atol=atol,
        recurrence_dtype=recurrence_dtype,
    )
    # Shapes and dtypes of the coarse operator, before anything is computed.
    System(coarse, b, preconditioner=None, rtol=rtol, atol=atol, recurrence_dtype=None)
    rounds = _Rounds(system, _Coarse(coarse), preconditioner, progress)
    x, r = system.start(initial)
    started = initial is not None
    budget = 2 * default_iterations(len(b)) if max_iterations is None else max_iterations
    x, norm, codes, reasons = rounds.run(x, r, budget)
    kept = x.to(system.dtype)
    iterations, products = rounds.iterations, system.multiply.count
    left = [j for j, reason in enumerate(reasons) if reason is not None]
    if left:
        started = started or rounds.kept_any
        finish = cg(
            operator,
            system.b[left].mT,
            preconditioner=preconditioner,
            initial=kept[left].mT if started else None,
            rtol=rtol,
            atol=atol,
            max_iterations=max_iterations,
            recurrence_dtype=recurrence_dtype,
            progress=progress,
        )
        kept[left] = finish.x.mT
        norm[left] = finish.residual_norm * system.b_norm[left]
        for j, code in zip(left, finish.codes, strict=True):
            codes[j] = code
        iterations, products = iterations + finish.iterations, products + finish.products
    relative = system.relative(norm)
    return RefinedResult(
        x=system.columns_of(kept),
        iterations=iterations,
        residual_norm=relative.squeeze(0) if system.is_vector else relative,
        status=_status(tuple(codes), reasons),
        codes=tuple(codes),
        products=products,
        coarse_products=rounds.coarse.count,
        rounds=rounds.count,
        left_to_plain=tuple(reasons),
    )


class _Coarse:
    """The coarse operator on rows, counted, with a lower bound of its norm."""

    def __init__(self, operator: RowProduct) -> None:
        self.operator, self.count = operator, 0
        self.watched, self.norm_seen = 0, 0.0
        self.buffer: Tensor | None = None

    def __call__(self, v: Tensor) -> Tensor:
        self.count += 1
        if isinstance(self.operator, MatrixFreeOperator) and (
            self.buffer is None or self.buffer.shape != v.shape
        ):
            # Fresh memory costs as much as a GEMM.
            self.buffer = torch.empty_like(v)
        product = multiply(self.operator, v, self.buffer)
        if self.watched < GROWTH_SEEN:
            self.watched += 1
            growth = (row_norms(product) / row_norms(v)).nan_to_num(0.0, 0.0, 0.0)
            self.norm_seen = max(self.norm_seen, float(growth.max()))
        return product


class _Rounds:
    """The rounds of coarse CG, column by column until each is done, given up or out of budget."""

    def __init__(
        self,
        system: System,
        coarse: _Coarse,
        preconditioner: RowProduct | None,
        progress: bool,
    ) -> None:
        self.system, self.coarse, self.progress = system, coarse, progress
        self.preconditioner = preconditioner
        self.count = self.iterations = 0
        self.kept_any = False

    def run(
        self, x: Tensor, r: Tensor, budget: int
    ) -> tuple[Tensor, Tensor, list[Code], list[str | None]]:
        """x, its true residual norms, and each column's code and reason to be left to plain CG.

        Args:
            x: First iterate; shape (k, n). Overwritten.
            r: Its true residual. Overwritten.
            budget: Iterations of all rounds together.
        """
        system = self.system
        norm, goal = row_norms(r).tolist(), system.tolerance.tolist()
        codes = [Code.CONVERGED] * len(norm)
        reasons: list[str | None] = [None] * len(norm)
        todo = [j for j in range(len(norm)) if not norm[j] <= goal[j]]
        while todo:
            if self.iterations >= budget:
                for j in todo:
                    codes[j] = Code.MAX_ITERATIONS
                break
            step, ended = self._round(r[todo], todo, norm, goal, budget)
            x[todo] += step
            new = row_norms(system.residual(x, out=r)).tolist()
            floor = self._floor(x)
            again = []
            for place, j in enumerate(todo):
                before, after = norm[j], new[j]
                bends = ended[place] is Code.NEGATIVE_CURVATURE
                if after < before and not bends:
                    norm[j], self.kept_any = after, True
                else:
                    x[j] -= step[place]
                if bends:
                    reasons[j] = "met negative curvature"
                elif norm[j] <= goal[j]:
                    continue
                elif ended[place] is Code.INDEFINITE:
                    codes[j] = Code.INDEFINITE
                elif after <= before / (4 if ended[place] is Code.STAGNATED else 2):
                    again.append(j)
                elif norm[j] <= floor[j]:
                    codes[j] = Code.STAGNATED
                else:
                    reasons[j] = "stopped lowering the true residual"
            todo = again
        return x, torch.tensor(norm, dtype=torch.float64, device=x.device), codes, reasons

    def _round(
        self, r: Tensor, todo: list[int], norm: list[float], goal: list[float], budget: int
    ) -> tuple[Tensor, tuple[Code, ...]]:
        """One coarse solve for some residuals; rows of corrections, and how it ended."""
        # The last round need not do more than is left to do.
        rtol = max(ROUND_RTOL, min(0.5, min(goal[j] / norm[j] for j in todo) / 2))
        dtype = self.system.dtype
        self.coarse.watched = 0
        limit = min(FIRST_ROUND * 2**self.count, budget - self.iterations)
        inner = cg(
            self.coarse,
            r.to(dtype).mT,
            preconditioner=self.preconditioner,
            rtol=rtol,
            max_iterations=limit,
            recurrence_dtype=torch.promote_types(dtype, torch.float32),
            progress=self.progress,
        )
        self.count += 1
        self.iterations += inner.iterations
        return inner.x.mT.to(r.dtype), inner.codes

    def _floor(self, x: Tensor) -> list[float]:
        """A residual that rounding x and the exact product surely leaves; plain CG is no help."""
        eps = torch.finfo(self.system.dtype).eps
        floor: list[float] = (eps / 16 * self.coarse.norm_seen * row_norms(x)).tolist()
        return floor


def _status(codes: tuple[Code, ...], reasons: list[str | None]) -> Status:
    status = worst_status(codes)
    given = [reason for reason in reasons if reason is not None]
    if not given:
        return status
    where = f"in {len(given)} of {len(codes)} columns " if len(codes) > 1 else ""
    why = " or ".join(sorted(set(given)))
    note = f"The low-precision products {where}{why}: plain CG finished from there."
    return replace(status, message=f"{status.message} {note}")
