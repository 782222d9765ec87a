"""Inner products of per-sample gradients, never holding more than a chunk of them.

A parametrised call describes the gradients of its parameters by `Term`s, whose products add up to
a Gram matrix. Totals have shape (r, N, q, M): cotangent j of sample n on the left, k of m on the
right. A symmetric total is made for n >= m only, and mirrored once by `mirror` when all is in.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24
"""Elements of per-sample gradients held at a time."""

TILE_ROWS, TILE_COLUMNS = 128, 2048
"""Sides of the blocks in which a total is made; on an accelerator four times as long."""

PANEL_ELEMENTS = 2**20
"""Elements of an operand of a block that may have to be copied at a time."""

TOUCH = 16
"""Multiplications that one pass over an element of a block costs as much as."""

Product = Callable[[slice, slice], Tensor]
"""A block of cotangents js and ks, for samples fixed before: (|js|, |ns|, |ks|, |ms|)."""


@dataclass(frozen=True)
class Deltas:
    """Cotangents of a call's output, each of one sample.

    Args:
        values: Shape (r, n, *out).
        batch: Samples in the batch, N.
        samples: Which n samples, shape (n,); None for all, in order.
    """

    values: Tensor
    batch: int
    samples: Tensor | None = None

    @property
    def owners(self) -> Tensor:
        """The samples, shape (n,)."""
        if self.samples is not None:
            return self.samples
        return torch.arange(self.batch, device=self.values.device)

    def select(self, batched: Tensor, part: slice = slice(None)) -> Tensor:
        """Rows of something of shape (N, ...) for a part of these samples."""
        return batched[part] if self.samples is None else batched[self.samples[part]]


class Term(ABC):
    """Per-sample gradients of some parameters: one for each of r cotangents and N samples."""

    @abstractmethod
    def add(self, total: Tensor, other: Term, *, half: bool) -> None:
        """Adds the inner products with the same call's other gradients.

        Args:
            total: Shape (r, N, q, M).
            other: The same kind of term, of q cotangents and M samples.
            half: Whether `other` is this term, and only blocks with n >= m are wanted.
        """

    @abstractmethod
    def squares(self) -> Tensor:
        """Squared norms, (r, N)."""


def outer_flops(size: int, positions: int, out: int, width: int) -> float:
    """Flops of a Gram matrix (half of it) of `size` gradients of a weight (out, width)."""
    pairs = float(size) ** 2
    by_positions = pairs * positions**2 * out
    formed = 2.0 * size * positions * out * width + pairs * out * width
    return min(by_positions, formed)


def mirror(total: Tensor) -> None:
    """Copies the half n >= m of a symmetric total (r, N, r, N) over the other, in place.

    It is symmetric to the last bit then, also where n = m.
    """
    r, samples = total.shape[:2]
    step = max(1, _side(total, TILE_ROWS) // r)
    places = torch.arange(samples, device=total.device)
    columns = torch.arange(r, device=total.device)
    first = (columns[:, None] < columns)[:, None, :, None]
    for start in range(0, samples, step):
        ns, after = slice(start, start + step), slice(start + step, samples)
        total[:, ns, :, after] = total[:, after, :, ns].permute(2, 3, 0, 1)
        block, here = total[:, ns, :, ns], places[ns]
        above = (here[:, None, None] < here) | (first & (here[:, None, None] == here))
        block.copy_(torch.where(above, block.permute(2, 3, 0, 1), block))


@dataclass(frozen=True)
class Rows(Term):
    """Gradients that are written out.

    Args:
        values: Shape (r, N, p).
        scale: Factor of the inner products.
    """

    values: Tensor
    scale: float = 1.0

    def add(self, total: Tensor, other: Term, *, half: bool) -> None:
        """R R' in blocks."""
        assert isinstance(other, Rows)
        right = other.values

        def product_of(ns: slice, ms: slice) -> Product:
            def product(js: slice, ks: slice) -> Tensor:
                a, b = self.values[js, ns], right[ks, ms]
                return _inner(a, b).view(*a.shape[:2], *b.shape[:2])

            return product

        _accumulate(total, product_of, self.scale, half=half)

    def squares(self) -> Tensor:
        """Squared norms."""
        return torch.linalg.vector_norm(self.values, dim=-1).square() * self.scale


@dataclass(frozen=True)
class Pulled(Term):
    """Gradients that are made when they are needed, some samples at a time.

    Args:
        gradients: Those of samples ns in each input; None where there is none.
        like: A number in the dtype of the cotangents.
        columns: r.
        samples: N.
        step: Samples whose gradients may be held at a time.
    """

    gradients: Callable[[slice], list[Rows | None]]
    like: Tensor
    columns: int
    samples: int
    step: int

    def add(self, total: Tensor, other: Term, *, half: bool) -> None:
        """R R' block by block: those of one side are made again for each block of the other."""
        assert isinstance(other, Pulled)
        whole = half and self.step >= self.samples
        for ns in _parts(self.samples, self.step if whole else max(1, self.step // 2)):
            left = self.gradients(ns)
            if half:
                _add_each(total[:, ns, :, ns], left, left, half=True)
            others = ns.start if half else other.samples
            for ms in _parts(others, max(1, other.step // 2)):
                _add_each(total[:, ns, :, ms], left, other.gradients(ms), half=False)

    def squares(self) -> Tensor:
        """Squared norms."""
        made = self.like.new_zeros(self.columns, self.samples)
        for ns in _parts(self.samples, self.step):
            for rows in self.gradients(ns):
                if rows is not None:
                    made[:, ns] += rows.squares()
        return made


def _add_each(
    total: Tensor, left: Sequence[Rows | None], right: Sequence[Rows | None], *, half: bool
) -> None:
    for mine, other in zip(left, right, strict=True):
        if mine is not None and other is not None:
            mine.add(total, other, half=half)


@dataclass(frozen=True)
class Outer(Term):
    """Gradients sum_s delta_s x_s' of a weight in g groups, and sum_s delta_s of a bias.

    Args:
        deltas: Shape (r, N, g, S, out), with `out` those of one group.
        x: Inputs of some of the N samples, shape (n, g, S, in).
        width: in.
        weight: Factor of the weight's inner products.
        bias: That of the bias's; 0 for none.
    """

    deltas: Tensor
    x: Callable[[slice], Tensor]
    width: int
    weight: float
    bias: float = 0.0

    def add(self, total: Tensor, other: Term, *, half: bool) -> None:
        """By products of positions, or by gradients that are formed; whichever costs less."""
        assert isinstance(other, Outer)
        if self._positions_pay(other, half):
            self._by_positions(total, other, half)
        else:
            self._by_gradients(total, other, half)

    def _positions_pay(self, other: Outer, half: bool) -> bool:
        """Whether all pairs of positions take fewer multiplications than forming gradients."""
        r, n, groups, positions, out = self.deltas.shape
        q, m = other.deltas.shape[:2]
        share = 0.5 if half else 1.0
        pairs = share * groups * positions**2
        by_positions = pairs * (r * n * q * m * (out + TOUCH) + n * m * self.width)
        weight = groups * out * self.width
        formed = r * n if half else r * n + q * m
        return by_positions <= weight * (formed * positions + share * r * n * q * m)

    def _by_positions(self, total: Tensor, other: Outer, half: bool) -> None:
        """(X X') o (D D') summed over positions; the bias adds a constant to X X'."""
        groups, positions = self.deltas.shape[2:4]

        def product_of(ns: slice, ms: slice) -> Product:
            x, y = self.x(ns), other.x(ms)
            inner = [
                (x[:, g].flatten(0, 1) @ y[:, g].flatten(0, 1).mT)
                .mul_(self.weight)
                .add_(self.bias)
                .unsqueeze(1)
                for g in range(groups)
            ]

            def product(js: slice, ks: slice) -> Tensor:
                made: Tensor | None = None
                for g in range(groups):
                    a, b = self.deltas[js, ns, g], other.deltas[ks, ms, g]
                    outer = _inner(a, b)
                    outer.view(len(a), -1, len(b), outer.shape[1] // len(b)).mul_(inner[g])
                    outer = outer.view(*a.shape[:3], *b.shape[:3])
                    part = outer[:, :, 0, :, :, 0] if positions == 1 else outer.sum((2, 5))
                    made = part if made is None else made.add_(part)
                assert made is not None
                return made

            return product

        # A block has positions**2 times the elements of its share of the total.
        longest = max(1, math.isqrt(CHUNK_ELEMENTS) // positions) if positions > 1 else None
        _accumulate(total, product_of, 1.0, half=half, longest=longest)

    def _by_gradients(self, total: Tensor, other: Outer, half: bool) -> None:
        r, n = self.deltas.shape[:2]
        q, m = other.deltas.shape[:2]
        everyone = slice(0, m)
        for chunk in self._chunks(q * m):
            right = Rows(other.gradients(everyone, *chunk), self.weight)
            if half:
                right.add(total, right, half=True)
                continue
            for ns in _parts(n, max(1, q * m // r)):
                left = Rows(self.gradients(ns, *chunk), self.weight)
                left.add(total[:, ns], right, half=False)
        if self.bias:
            Rows(self._sums(), self.bias).add(total, Rows(other._sums(), self.bias), half=half)

    def _sums(self) -> Tensor:
        """Gradients of the bias, (r, N, g out)."""
        return self.deltas.sum(3).flatten(2)

    def _chunks(self, rows: int) -> Iterator[tuple[slice, slice, slice]]:
        """Groups, outputs and inputs of which this many gradients fit into a chunk."""
        groups, _, out = self.deltas.shape[2:]
        room = max(1, CHUNK_ELEMENTS // max(1, rows))
        for gs in _parts(groups, max(1, room // (out * self.width))):
            for outs in _parts(out, max(1, room // self.width)):
                for ins in _parts(self.width, room):
                    yield gs, outs, ins

    def gradients(self, ns: slice, gs: slice, outs: slice, ins: slice) -> Tensor:
        """Entries of the weight's gradients, (r, |ns|, |gs| |outs| |ins|)."""
        r, _, groups, positions, _ = self.deltas.shape
        sizes = [s.stop - s.start for s in (ns, gs, outs, ins)]
        made = self.deltas.new_empty(r, *sizes)
        for part in _parts(sizes[0], max(1, CHUNK_ELEMENTS // (groups * positions * self.width))):
            here = slice(ns.start + part.start, ns.start + part.stop)
            x = self.x(here)[:, gs, :, ins]
            for j in range(r):
                torch.matmul(self.deltas[j, here, gs, :, outs].mT, x, out=made[j, part])
        return made.flatten(2)

    def squares(self) -> Tensor:
        """Squared norms: |delta|^2 |x|^2 with one position."""
        r, n, _, positions, _ = self.deltas.shape
        if positions > 1:
            made = self.deltas.new_zeros(r, n)
            for chunk in self._chunks(r * n):
                made += Rows(self.gradients(slice(0, n), *chunk), self.weight).squares()
            return made + Rows(self._sums(), self.bias).squares() if self.bias else made
        step = max(1, CHUNK_ELEMENTS // max(1, self.width))
        norms = [torch.linalg.vector_norm(self.x(ns), dim=-1).square() for ns in _parts(n, step)]
        inner = torch.cat(norms) * self.weight + self.bias
        return (torch.linalg.vector_norm(self.deltas, dim=-1).square() * inner).sum((2, 3))


def _accumulate(
    total: Tensor,
    product_of: Callable[[slice, slice], Product],
    scale: float,
    *,
    half: bool,
    longest: int | None = None,
) -> None:
    """Adds blocks to a total: a few samples with all cotangents against many samples."""
    r, n, q, m = total.shape
    rows, columns = _side(total, TILE_ROWS), _side(total, TILE_COLUMNS)
    if longest is not None:
        rows, columns = min(rows, longest), min(columns, longest)
    for ns in _parts(n, max(1, rows // max(1, r))):
        limit = ns.stop if half else m
        for ms in _parts(limit, columns):
            product = product_of(ns, ms)
            for js in _parts(r, rows):
                for ks in _parts(q, max(1, columns // (ms.stop - ms.start))):
                    total[js, ns, ks, ms].add_(product(js, ks), alpha=scale)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """A B' for (..., p) and (..., p) with all but the last axis as rows; copies are of a panel."""
    rows, columns = math.prod(a.shape[:-1]), math.prod(b.shape[:-1])
    made = a.new_zeros(rows, columns)
    for part in _parts(a.shape[-1], max(1, PANEL_ELEMENTS // max(1, rows, columns))):
        # Not named, so that a panel is gone before the next is made.
        torch.addmm(
            made,
            a[..., part].reshape(rows, -1),
            b[..., part].reshape(columns, -1).mT,
            beta=1 if part.start else 0,
            out=made,
        )
    return made


def _parts(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _side(total: Tensor, side: int) -> int:
    return side if total.device.type == "cpu" else 4 * side
