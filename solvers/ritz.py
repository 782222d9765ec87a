"""What the eigenvalue solvers share: long bases, kept orthonormal, and Ritz pairs of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .dots import row_dots, row_norms, update_rows
from .product import RowProduct, multiply

Which: TypeAlias = Literal["largest", "smallest", "both", "magnitude"]
"""Which eigenvalues: by value the largest, the smallest or k of each, or the largest |theta|."""

Draw: TypeAlias = Callable[[range], Tensor]
"""Random rows (len, n) by number, in the operator's dtype and on its device."""

State: TypeAlias = tuple[Tensor, ...]
"""All that a run needs to go on from where it stood."""

BREAKDOWN = 10
"""A row of less than this many roundings of |A| is rounding, and no direction."""

MARGIN = 0.9
"""Share of the tolerance at which a run stops, so that rounding does not undo it."""

CPU_PANEL = 2**20
"""Numbers of a basis in one GEMM."""

GPU_PANEL = 2**23
"""The same on an accelerator, where a panel is widened to float64."""


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Approximate eigenpairs, and how they were reached.

    Attributes:
        values: Rayleigh quotients of the rows, falling; float64, shape (k,).
        rows: Their vectors, orthonormal; shape (k, n), in the operator's dtype or float32 if that
            is narrower.
        residual_norm: |A x - theta x|, recomputed from the rows at the end; float64, shape (k,).
        tolerance: What it was to be at most; float64, shape (k,).
        products: Vectors multiplied, those of the last residual included.
        iterations: Blocks multiplied before that.
        restarts: How often the basis was cut down.
        out_of_products: Whether `max_products` ended the run.
    """

    values: Tensor
    rows: Tensor
    residual_norm: Tensor
    tolerance: Tensor
    products: int
    iterations: int
    restarts: int
    out_of_products: bool

    @property
    def converged(self) -> Tensor:
        """Which pairs meet the tolerance; shape (k,)."""
        return self.residual_norm <= self.tolerance


def check_wanted(k: int, n: int, which: str, rtol: float | None) -> int:
    """The number of pairs that are asked for.

    Raises:
        ValueError: k, `which` or `rtol` makes no sense.
    """
    if which not in get_args(Which):
        choices = ", ".join(map(repr, get_args(Which)))
        raise ValueError(f"which={which!r}: choose {choices}.")
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}: an operator of size {n} has 1 to {n} eigenvalues to give.")
    if rtol is not None and not rtol > 0:
        raise ValueError(f"rtol is {rtol}: give a positive number, or None.")
    return min(2 * k, n) if which == "both" else k


def default_rtol(dtype: torch.dtype) -> float:
    """The root of the rounding of the products, 1e-2 in half precisions.

    The error of an eigenvalue is at most the square of its residual over its distance from the
    others (Parlett 1998, section 11.7): smaller residuals improve the vectors only.
    """
    return min(float(torch.finfo(dtype).eps ** 0.5), 1e-2)


def check_products(max_products: int | None, least: int, default: int) -> int:
    """The budget of vectors multiplied.

    Raises:
        ValueError: It does not suffice for one basis of the size asked for and its residuals.
    """
    if max_products is None:
        return max(default, least)
    if max_products < least:
        raise ValueError(f"max_products is {max_products}: this k and block take {least} at least.")
    return max_products


def chosen(theta: Tensor, count: int, which: Which) -> Tensor:
    """Indices of `count` of the values, which rise; half of them at each end for "both"."""
    j = len(theta)
    places = torch.arange(j)
    if count >= j:
        return places
    if which == "largest":
        return places[j - count :]
    if which == "smallest":
        return places[:count]
    if which == "magnitude":
        return theta.abs().argsort(stable=True)[j - count :].sort().values
    low = count // 2
    return torch.cat([places[:low], places[j - (count - low) :]])


def project(w: Tensor, basis: Tensor) -> Tensor:
    """W Q' of rows (p, n) and (j, n); float64, shape (p, j).

    Partial sums are added up in float64. On the CPU those of a panel run in the rows' dtype, which
    is three times as fast; an accelerator would take TensorFloat-32 for them if it is allowed to.
    """
    total = torch.zeros(len(w), len(basis), dtype=torch.float64, device=w.device)
    for part in _panels(basis):
        total += _widened(w[:, part]) @ _widened(basis[:, part]).mT
    return total


def subtract_(w: Tensor, coefficients: Tensor, basis: Tensor) -> None:
    """W -= H Q, for H (p, j) and rows (p, n) and (j, n)."""
    for part in _panels(basis):
        q = _widened(basis[:, part])
        left = w[:, part]
        left -= coefficients.to(q.dtype) @ q


def rotate_(basis: Tensor, coefficients: Tensor) -> None:
    """Overwrites the first l of the rows (j, n) with C'Q, C (j, l), panel by panel."""
    j, l = coefficients.shape
    for part in _panels(basis):
        q = _widened(basis[:j, part])
        basis[:l, part] = coefficients.mT.to(q) @ q


def orthonormalize_(w: Tensor, basis: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Splits W = H Q + B V with V orthonormal and orthogonal to Q, and overwrites W with V.

    Everything is done twice, which leaves no more than rounding. A row that is below the floor,
    or is left with less than half of itself by the second pass, is rounding: it becomes zero.

    Args:
        w: Rows (p, n).
        basis: Q, orthonormal rows (j, n).
        floor: The norm up to which what is left of a row is rounding; shape ().

    Returns:
        H (p, j) and B (p, p), lower triangular, with a zero on the diagonal where V is zero.
    """
    first = project(w, basis)
    subtract_(w, first, basis)
    outer = _gram_schmidt_(w, floor)
    second = project(w, basis)
    subtract_(w, second, basis)
    inner = _gram_schmidt_(w, torch.full_like(floor, 0.5))
    return first + outer @ second, outer @ inner


def keep_rows_(w: Tensor, kept: list[int]) -> None:
    """Moves the rows that are kept to the front, in their order."""
    for place, i in enumerate(kept):
        if place != i:
            w[place] = w[i]


def randomize_(store: Tensor, known: int, count: int, draw: Draw, start: int) -> int:
    """Writes random directions behind the first `known` rows of an orthonormal basis (., n).

    Args:
        store: The rows; `count` of them are overwritten.
        known: How many are orthonormal.
        count: How many to add.
        draw: See `Draw`.
        start: The number of the first random vector.

    Returns:
        How many vectors were drawn.
    """
    drawn, floor = 0, torch.finfo(store.dtype).eps * 1e3
    for j in range(known, known + count):
        row, left = store[j : j + 1], torch.zeros(1)
        while not bool(left > 0):
            row.copy_(draw(range(start + drawn, start + drawn + 1)))
            row /= row_norms(row).to(row.dtype)
            left = orthonormalize_(row, store[:j], row_norms(row) * floor)[1]
            drawn += 1
    return drawn


def true_residuals(times: Times, rows: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Rayleigh quotients and residual norms of rows (k, n), len(room) of them at a time.

    Args:
        times: The product.
        rows: Of about unit norm.
        room: Overwritten; shape (p, n).
    """
    values, norms = [], []
    for x in rows.split(len(room)):
        ax = room[: len(x)].copy_(times(x))
        xx = row_dots(x, x)
        theta = row_dots(x, ax) / xx
        norms.append((update_rows(ax, x, step=-theta) / xx).sqrt())
        values.append(theta)
    return torch.cat(values), torch.cat(norms)


class Times:
    """Products with rows (p, n) in the operator's dtype, whatever that of the rows, counted.

    Args:
        operator: A.
        dtype: Its own.
    """

    def __init__(self, operator: RowProduct, dtype: torch.dtype) -> None:
        self.operator, self.dtype, self.count = operator, dtype, 0

    def __call__(self, rows: Tensor) -> Tensor:
        """The product, which may share memory with the rows."""
        self.count += len(rows)
        return multiply(self.operator, rows.to(self.dtype), None)


def start_rows(draw: Draw, count: int, initial: Tensor | None, noise: float) -> Tensor:
    """The first block (count, n): random, or sums of the initial rows with noise of that share.

    Raises:
        ValueError: A row of `initial` is zero or not finite.
    """
    random = draw(range(count))
    rows = random.to(torch.promote_types(random.dtype, torch.float32))
    rows /= row_norms(rows).to(rows.dtype).unsqueeze(-1)
    if initial is None:
        return rows
    norm = row_norms(initial)
    if not bool(((norm > 0) & norm.isfinite()).all()):
        raise ValueError("initial has a column that is zero or not finite: leave it out.")
    rows[: len(initial)] *= noise
    for i, row in enumerate(initial):
        rows[i % count].add_(row.to(rows.dtype) / norm[i].to(rows.dtype))
    return rows


def _gram_schmidt_(w: Tensor, floor: Tensor) -> Tensor:
    """Orthonormalises rows one after the other; W before = B W after, B lower triangular."""
    factor = torch.zeros(len(w), len(w), dtype=torch.float64, device=w.device)
    for i in range(len(w)):
        row = w[i : i + 1]
        factor[i, :i] = project(row, w[:i])[0]
        subtract_(row, factor[i : i + 1, :i], w[:i])
        norm = row_norms(row)
        # A NaN is kept, to be seen in the factor.
        rounding = norm <= floor
        factor[i, i] = torch.where(rounding, 0.0, norm)[0]
        row *= torch.where(rounding, 0.0, 1 / norm).to(row.dtype).unsqueeze(-1)
    return factor


def _panels(basis: Tensor) -> Iterator[slice]:
    j, n = basis.shape
    numbers = CPU_PANEL if basis.device.type == "cpu" else GPU_PANEL
    step = max(1, numbers // max(1, j))
    return (slice(start, start + step) for start in range(0, n if j else 0, step))


def _widened(panel: Tensor) -> Tensor:
    return panel if panel.device.type == "cpu" else panel.double()
