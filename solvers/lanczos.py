"""Extreme eigenpairs by block Lanczos with thick restarts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from .dots import row_norms
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
    randomize_,
    rotate_,
    start_rows,
    true_residuals,
)

NOISE = 1e-2
"""Share of random vectors in a start that is given, so that nothing is out of its reach."""

PROOF = 10
"""Blocks for which the wanted values are to stand after an invariant subspace was met."""


@torch.no_grad()
def lanczos(
    operator: RowProduct,
    draw: Draw,
    k: int,
    *,
    which: Which = "largest",
    block: int = 1,
    basis: int | None = None,
    initial: Tensor | None = None,
    rtol: float | None = None,
    relative_to_each: bool = False,
    max_products: int | None = None,
    state: State | None = None,
    on_restart: Callable[[State], None] | None = None,
    progress: bool = False,
) -> RitzPairs:
    """Eigenpairs at the ends of the spectrum of a symmetric A.

    Block Lanczos with thick restarts (Wu and Simon 2000): when the basis is full it is cut down
    to the Ritz vectors nearest to the wanted end, wanted and some more, which keeps all that
    matters of the Krylov space. Every new block is made orthogonal to the whole basis, twice.

    A run stops when all wanted pairs have |A x - theta x| <= rtol max |theta|, the largest Ritz
    value met, by the residuals that the process knows. The true ones are computed at the end.

    What the start has no part in is not found. So a block of b vectors finds b copies of a
    multiple eigenvalue, and a single vector may find one copy only. Where the Krylov space ends
    early (low rank, few distinct eigenvalues), random directions are added, and the wanted values
    have to stand until that ends too, or for 10 blocks.

    Products: those of the process, and one for each pair at the end. The device is read once per
    block.

    Memory: the basis, m + b rows of length n, and the product of a block. At the end the wanted
    rows once more. Restarts take no more: they overwrite the basis.

    Args:
        operator: A: an operator, or a function of rows (p, n).
        draw: Random rows by number. Their size, dtype and device are those of the products; the
            basis is in that dtype, or float32 if it is narrower.
        k: How many pairs; at each end for "both".
        which: Which end.
        block: b, vectors multiplied together.
        basis: m, the rows of a full basis; n if larger. None takes `default_basis`.
        initial: Rows (j, n) near the wanted vectors, to start from their sums with 1 % noise.
        rtol: See above. None takes the root of the rounding of the dtype.
        relative_to_each: Take rtol |theta| of each pair instead, but not less than the rounding
            of the largest.
        max_products: Most vectors to multiply, those at the end included. None takes 1000, or
            20 m if that is more.
        state: What `on_restart` was given: go on from there. All else has to be the same.
        on_restart: Called at every restart. What it is given must be copied to be kept.
        progress: Show a progress bar.

    Returns:
        The pairs, with falling values; fewer than 2 k for "both" if n is.

    Raises:
        ValueError: An argument does not fit, or a product is not finite.
    """
    proto = draw(range(1))
    n = proto.shape[-1]
    wanted = check_wanted(k, n, which, rtol)
    if block < 1:
        raise ValueError(f"block is {block}: give at least 1.")
    b = min(block, n)
    m = min(default_basis(wanted, b) if basis is None else basis, n)
    if m < min(wanted + b, n):
        raise ValueError(
            f"basis is {basis}: {wanted} pairs and a block of {b} take {wanted + b} at least, and "
            f"{default_basis(wanted, b)} converge better."
        )
    run = _Lanczos(
        Times(operator, proto.dtype),
        draw,
        proto,
        which=which,
        wanted=wanted,
        width=b,
        most=m,
        rtol=default_rtol(proto.dtype) if rtol is None else rtol,
        relative_to_each=relative_to_each,
    )
    budget = check_products(max_products, 2 * wanted + b - 1, max(1000, 20 * m)) - wanted
    if state is None:
        run.start(initial)
    else:
        run.load(state)
    with tqdm(total=budget, desc="lanczos", disable=not progress) as bar:
        bar.update(run.times.count)
        while True:
            if run.times.count + run.ahead > budget:
                out_of_products = True
                break
            if run.done + run.ahead > m:
                run.restart()
                if on_restart is not None:
                    on_restart(run.state())
            before = run.times.count
            run.step()
            bar.update(run.times.count - before)
            bar.set_postfix(converged=f"{run.met}/{wanted}")
            if run.finished:
                out_of_products = False
                break
    return run.finish(out_of_products)


def default_basis(wanted: int, block: int) -> int:
    """Rows of a full basis for that many pairs."""
    return max(2 * wanted + 10 * block, 30)


class _Lanczos:
    """The basis Q, T = Q A Q' of its first `done` rows, and the block of `ahead` that comes next.

    A Q' = Q'T, but for the last `len(coupling)` columns, to which V'coupling' is added, V the next
    block. T and what is made of it are on the CPU, where small eigenproblems are quickest.
    """

    def __init__(
        self,
        times: Times,
        draw: Draw,
        proto: Tensor,
        *,
        which: Which,
        wanted: int,
        width: int,
        most: int,
        rtol: float,
        relative_to_each: bool,
    ) -> None:
        self.times, self.draw = times, draw
        self.which, self.wanted, self.width, self.most = which, wanted, width, most
        self.rtol, self.relative_to_each = rtol, relative_to_each
        self.size, self.rounding = proto.shape[-1], torch.finfo(proto.dtype).eps
        dtype = torch.promote_types(proto.dtype, torch.float32)
        self.eps = torch.finfo(dtype).eps
        self.basis = torch.empty(most + width, self.size, dtype=dtype, device=proto.device)
        self.t = torch.zeros(most, most, dtype=torch.float64)
        self.done = self.ahead = self.drawn = self.restarts = self.iterations = self.met = 0
        self.held, self.ended, self.finished, self.age = torch.zeros(0), False, False, 0
        self.scale = 0.0

    def start(self, initial: Tensor | None) -> None:
        """Fills the first block."""
        block = self.basis[: self.width]
        block.copy_(start_rows(self.draw, self.width, initial, NOISE))
        self.drawn = self.width
        self._orthonormalize(block)

    def step(self) -> None:
        """Multiplies the block ahead, and looks at the Ritz pairs."""
        done, end = self.done, self.done + self.ahead
        w = self.basis[end : end + self.ahead]
        w.copy_(self.times(self.basis[done:end]))
        self.done = end
        h, coupling = self._orthonormalize(w)
        self.t[done:end, :end] = h
        self.t[:end, done:end] = h.mT
        self.t[done:end, done:end] = (h[:, done:] + h[:, done:].mT) / 2
        self.iterations += 1
        self.theta, self.vectors = torch.linalg.eigh(self.t[:end, :end])
        self.scale = max(self.scale, float(self.theta.abs().max()))
        last = self.vectors[end - len(h) :]
        estimate = torch.linalg.vector_norm(coupling.mT @ last, dim=0)
        self._look(estimate <= MARGIN * self._tolerance(self.theta))

    def _look(self, small: Tensor) -> None:
        """Whether the run is at its end, given which Ritz pairs have a small residual; (done,)."""
        pairs = chosen(self.theta, self.wanted, self.which)
        values, ended = self.theta[pairs], bool(small.all())
        self.met = int(small[pairs].sum())
        stands = len(values) == len(self.held) and bool(
            ((values - self.held).abs() <= self._tolerance(values)).all()
        )
        self.age = self.age + 1 if stands else 0
        if not stands:
            self.held = values
        # Where all is converged, wanted or not, the space is invariant and knows of no other.
        proven = not (ended or self.ended) or (ended and stands) or self.age >= PROOF
        self.finished = self.met == self.wanted and (proven or self.done == self.size)
        self.ended |= ended

    def restart(self) -> None:
        """Keeps the wanted Ritz vectors and half of the others, and the block ahead."""
        kept = self.wanted + (self.done - self.wanted) // 2
        kept = min(kept, self.most - self.ahead)
        pairs = chosen(self.theta, kept, self.which)
        rotate_(self.basis, self.vectors[:, pairs].to(self.basis.device))
        ahead = self.basis[self.done : self.done + self.ahead]
        self.basis[kept : kept + self.ahead] = ahead.clone()
        self._diagonalized(self.theta[pairs])
        self.restarts += 1

    def state(self) -> State:
        """What `load` takes: views, which a restart changes."""
        counts = (self.times.count, self.ahead, self.drawn, self.restarts, self.iterations)
        numbers = torch.tensor([*counts, self.ended, self.age, self.scale], dtype=torch.float64)
        return self.basis[: self.done + self.ahead], self.theta, self.held, numbers

    def load(self, state: State) -> None:
        """Goes on from what `state` gave."""
        rows, theta, self.held, numbers = state
        self.basis[: len(rows)] = rows.to(self.basis)
        self._diagonalized(theta)
        *counts, ended, age, self.scale = numbers.tolist()
        self.times.count, self.ahead, self.drawn, self.restarts, self.iterations = map(int, counts)
        self.ended, self.age = bool(ended), int(age)

    def finish(self, out_of_products: bool) -> RitzPairs:
        """The wanted pairs."""
        pairs = chosen(self.theta, self.wanted, self.which)
        rotate_(self.basis, self.vectors[:, pairs].to(self.basis.device))
        rows, room = self.basis[: self.wanted], self.basis[self.wanted :][: self.width]
        values, residuals = true_residuals(self.times, rows, room)
        order = values.argsort(descending=True, stable=True)
        return RitzPairs(
            values=values[order],
            rows=rows[order],
            residual_norm=residuals[order],
            tolerance=self._tolerance(values[order]),
            products=self.times.count,
            iterations=self.iterations,
            restarts=self.restarts,
            out_of_products=out_of_products,
        )

    def _orthonormalize(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Makes the block ahead of rows W behind the basis: its part in the basis, and coupling.

        Rows that are rounding make room for random ones, which nothing couples with.
        """
        known = self.basis[: self.done]
        largest = row_norms(w).max()
        h, factor = orthonormalize_(w, known, BREAKDOWN * self.eps * largest.clamp(min=self.scale))
        # The one time in an iteration that the device is read.
        both = torch.cat([h, factor], 1).cpu()
        if not bool(both.isfinite().all()):
            raise ValueError("a product with the operator gave NaN or infinity.")
        h, factor = both.split([self.done, len(w)], 1)
        self.ahead = min(self.width, self.size - self.done)
        kept = factor.diagonal().nonzero().flatten().tolist()[: self.ahead]
        keep_rows_(w, kept)
        missing = self.ahead - len(kept)
        if missing:
            start = self.done + len(kept)
            self.drawn += randomize_(self.basis, start, missing, self.draw, self.drawn)
        return h, factor[:, kept]

    def _diagonalized(self, theta: Tensor) -> None:
        """The basis is of Ritz vectors now."""
        self.done = len(theta)
        self.theta, self.vectors = theta, torch.eye(len(theta), dtype=torch.float64)
        self.t.zero_()
        self.t.diagonal()[: len(theta)] = theta

    def _tolerance(self, theta: Tensor) -> Tensor:
        if self.relative_to_each:
            return (self.rtol * theta.abs()).clamp(min=BREAKDOWN * self.rounding * self.scale)
        return torch.full_like(theta, self.rtol * self.scale)
