"""Eigenpairs at one end of the spectrum by preconditioned conjugate gradients on blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from .dots import row_norms, update_rows
from .product import RowProduct
from .ritz import (
    BREAKDOWN,
    MARGIN,
    Draw,
    RitzPairs,
    State,
    Times,
    Which,
    check_products,
    check_wanted,
    chosen,
    default_rtol,
    keep_rows_,
    orthonormalize_,
    project,
    randomize_,
    rotate_,
    start_rows,
    true_residuals,
)

STATE_EVERY = 10
"""Iterations from one state that is handed out to the next."""


@torch.no_grad()
def lobpcg(
    operator: RowProduct,
    draw: Draw,
    k: int,
    *,
    which: Which = "smallest",
    preconditioner: RowProduct | None = None,
    iterated: int | None = None,
    initial: Tensor | None = None,
    rtol: float | None = None,
    max_products: int | None = None,
    state: State | None = None,
    on_state: Callable[[State], None] | None = None,
    progress: bool = False,
) -> RitzPairs:
    """Eigenpairs at one end of the spectrum of a symmetric A.

    LOBPCG (Knyazev 2001): the best vectors X in the span of X, of the residuals W, multiplied by
    the preconditioner, and of the directions P of the last step. The three are kept orthonormal,
    P by its coefficients (Hetmaniuk and Lehoucq 2006). Vectors that have converged stay in X and
    get no more directions (soft locking).

    A run stops when all wanted pairs have |A x - theta x| <= rtol max |theta|, the largest Ritz
    value met. The residuals are recomputed from products at the end.

    Products: one for each vector that has not converged in each iteration, and one for each pair
    at the end. The device is read twice per iteration.

    Memory: X, W, P and their products, six blocks of `iterated` rows, and one that the operator
    makes.

    Args:
        operator: A: an operator, or a function of rows (p, n).
        draw: Random rows by number. Their size, dtype and device are those of the products; the
            vectors are in that dtype, or float32 if it is narrower.
        k: How many pairs.
        which: "smallest" or "largest".
        preconditioner: M, approximates the inverse of A, and so helps the smallest end only.
            Positive definite; an operator in its own dtype, or a function of rows.
        iterated: Vectors in X. A few more than k speed up the last ones. None takes k and a
            quarter of it, rounded up.
        initial: Rows (j, n) near the wanted vectors.
        rtol: See above. None takes the root of the rounding of the dtype.
        max_products: Most vectors to multiply, those at the end included. None takes 1000, or
            100 for every iterated one if that is more.
        state: What `on_state` was given: go on from there. All else has to be the same.
        on_state: Called every 10 iterations. What it is given must be copied to be kept.
        progress: Show a progress bar.

    Returns:
        The pairs, with falling values.

    Raises:
        ValueError: An argument does not fit, or a product is not finite.
    """
    proto = draw(range(1))
    n = proto.shape[-1]
    check_wanted(k, n, which, rtol)
    if which not in ("smallest", "largest"):
        raise ValueError(f"which={which!r}: LOBPCG takes 'smallest' or 'largest'; see lanczos.")
    if preconditioner is not None and which == "largest":
        raise ValueError(
            "a preconditioner is close to the inverse of A, and helps the smallest end only: leave "
            "it out for which='largest'."
        )
    if iterated is not None and iterated < k:
        raise ValueError(f"{iterated} iterated vectors are too few for k={k}: give k at least.")
    size = min(k + (k + 3) // 4 if iterated is None else iterated, n)
    budget = check_products(max_products, size + k, max(1000, 100 * size)) - k
    run = _LOBPCG(
        Times(operator, proto.dtype),
        draw,
        proto,
        which=which,
        wanted=k,
        size=size,
        preconditioner=preconditioner,
        rtol=default_rtol(proto.dtype) if rtol is None else rtol,
    )
    if state is None:
        run.start(initial)
    else:
        run.load(state)
    with tqdm(total=budget, desc="lobpcg", disable=not progress) as bar:
        bar.update(run.times.count)
        while True:
            active = run.look()
            bar.set_postfix(converged=f"{run.met}/{k}")
            if run.met == k or not active:
                out_of_products = False
                break
            if run.times.count + len(active) > budget:
                out_of_products = True
                break
            before = run.times.count
            if not run.step(active):
                out_of_products = False
                break
            bar.update(run.times.count - before)
            if on_state is not None and run.iterations % STATE_EVERY == 0:
                on_state(run.state())
    return run.finish(out_of_products)


class _LOBPCG:
    """Rows S = [X, P, W] and their products A S, each in one piece of memory."""

    def __init__(
        self,
        times: Times,
        draw: Draw,
        proto: Tensor,
        *,
        which: Which,
        wanted: int,
        size: int,
        preconditioner: RowProduct | None,
        rtol: float,
    ) -> None:
        self.times, self.draw, self.which = times, draw, which
        self.wanted, self.size, self.rtol = wanted, size, rtol
        self.n, dtype = proto.shape[-1], torch.promote_types(proto.dtype, torch.float32)
        self.eps = torch.finfo(dtype).eps
        self.precondition: Times | None = None
        if preconditioner is not None:
            own = getattr(preconditioner, "dtype", proto.dtype)
            self.precondition = Times(preconditioner, own)
        self.s = torch.empty(3 * size, self.n, dtype=dtype, device=proto.device)
        self.products = torch.empty_like(self.s)
        self.directions = self.iterations = self.met = 0
        self.theta = torch.zeros(size, dtype=torch.float64)
        self.scale = 0.0

    def start(self, initial: Tensor | None) -> None:
        """Fills X, and takes its Ritz vectors."""
        x = self.s[: self.size]
        x.copy_(start_rows(self.draw, self.size, initial, self.eps**0.5))
        kept = self._independent(x, 0)
        self._add(kept)
        missing = self.size - kept
        if missing:
            randomize_(self.s, kept, missing, self.draw, self.size)
            self._add(missing, kept)
        self._project(self.size)

    def look(self) -> list[int]:
        """Writes the residuals behind X and P; the vectors that have not converged."""
        start = self.size + self.directions
        w = self.s[start : start + self.size]
        w.copy_(self.products[: self.size])
        theta = self.theta.to(w.device)
        residual = update_rows(w, self.s[: self.size], step=-theta).sqrt().cpu()
        open_ = residual > MARGIN * self.rtol * self.scale
        # The wanted are the first.
        self.met = self.wanted - int(open_[: self.wanted].sum())
        return list(open_.nonzero().flatten().tolist())

    def step(self, active: list[int]) -> bool:
        """One iteration with the residuals of the active vectors; False if S is the whole space."""
        start = self.size + self.directions
        w = self.s[start : start + self.size]
        keep_rows_(w, active)
        w = w[: len(active)]
        if self.precondition is not None:
            w.copy_(self.precondition(w))
        w /= row_norms(w).to(w.dtype).unsqueeze(-1)
        kept = min(self._independent(w, start), self.n - start)
        if not kept:
            if start == self.n:
                return False
            kept = 1
            randomize_(self.s, start, kept, self.draw, self.size + self.iterations)
        self._add(kept, start)
        self.iterations += 1
        self._project(start + kept, active)
        return True

    def state(self) -> State:
        """What `load` takes: views, which an iteration changes."""
        counts = (self.times.count, self.iterations, self.directions, self.scale)
        held = self.size + self.directions
        numbers = torch.tensor(counts, dtype=torch.float64)
        return self.s[:held], self.products[:held], self.theta, numbers

    def load(self, state: State) -> None:
        """Goes on from what `state` gave."""
        s, products, self.theta, numbers = state
        self.s[: len(s)] = s.to(self.s)
        self.products[: len(s)] = products.to(self.s)
        *counts, self.scale = numbers.tolist()
        self.times.count, self.iterations, self.directions = map(int, counts)

    def finish(self, out_of_products: bool) -> RitzPairs:
        """The wanted pairs."""
        rows, room = self.s[: self.wanted], self.products[: self.wanted]
        values, residuals = true_residuals(self.times, rows, room)
        order = values.argsort(descending=True, stable=True)
        return RitzPairs(
            values=values[order],
            rows=rows[order],
            residual_norm=residuals[order],
            tolerance=torch.full_like(values, self.rtol * self.scale),
            products=self.times.count,
            iterations=self.iterations,
            restarts=0,
            out_of_products=out_of_products,
        )

    def _independent(self, w: Tensor, known: int) -> int:
        """Makes unit rows orthonormal, behind the first `known`; how many are left."""
        floor = torch.full((), BREAKDOWN * self.eps, dtype=torch.float64, device=w.device)
        factor = orthonormalize_(w, self.s[:known], floor)[1].cpu()
        if not bool(factor.isfinite().all()):
            raise ValueError("a residual, or its product with the preconditioner, is not finite.")
        kept = factor.diagonal().nonzero().flatten().tolist()
        keep_rows_(w, kept)
        return len(kept)

    def _add(self, count: int, start: int = 0) -> None:
        """Multiplies `count` rows of S."""
        rows = slice(start, start + count)
        self.products[rows] = self.times(self.s[rows])

    def _project(self, held: int, active: list[int] | None = None) -> None:
        """The Ritz vectors of the first rows of S become X, and the steps towards them P."""
        s, products = self.s[:held], self.products[:held]
        gram, a = torch.stack([project(s, s), project(s, products)]).cpu()
        if not bool(a.isfinite().all()):
            raise ValueError("a product with the operator gave NaN or infinity.")
        # S is orthonormal but for rounding, which this keeps from adding up.
        lower = torch.linalg.cholesky(gram)
        a = torch.linalg.solve_triangular(lower, (a + a.mT) / 2, upper=False)
        a = torch.linalg.solve_triangular(lower, a.mT, upper=False)
        theta, vectors = torch.linalg.eigh((a + a.mT) / 2)
        pairs = chosen(theta, self.size, self.which)
        # From the wanted end on.
        pairs = pairs.flip(0) if self.which == "largest" else pairs
        self.theta, x = theta[pairs], vectors[:, pairs]
        self.scale = max(self.scale, float(theta.abs().max()))
        p = self._steps(x, lower, active)
        both = torch.linalg.solve_triangular(lower.mT, torch.cat([x, p], 1), upper=True)
        both = both.to(s.device)
        rotate_(self.s, both)
        rotate_(self.products, both)
        self.directions = p.shape[1]

    def _steps(self, x: Tensor, lower: Tensor, active: list[int] | None) -> Tensor:
        """What is not of the old X in the new one, orthonormal beside it; columns."""
        if active is None:
            return x[:, :0]
        inner = torch.linalg.solve_triangular(lower.mT, x[:, active], upper=True)
        inner[: self.size] = 0
        p = lower.mT @ inner
        p /= torch.linalg.vector_norm(p, dim=0).clamp(min=1e-300)
        for _ in range(2):
            p -= x @ (x.mT @ p)
        left, size, _ = torch.linalg.svd(p, full_matrices=False)
        left = left[:, size > 1e3 * self.eps]
        # Nothing but rounding is left of x in it.
        return left - x @ (x.mT @ left)
