"""Inner products of per-sample gradients of a table: two samples meet where they share a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import gram
from .gram import Rows, Term


@dataclass(frozen=True)
class Picked(Term):
    """Gradients of a table's rows that were read: zero but at the tokens that a sample has.

    Args:
        values: Of P pairs of a sample and a token, shape (r, P, p).
        owners: Their samples, (P,).
        keys: Their tokens, (P,).
        samples: N.
        scale: Factor of the inner products.
    """

    values: Tensor
    owners: Tensor
    keys: Tensor
    samples: int
    scale: float

    @classmethod
    def of(cls, deltas: Tensor, tokens: Tensor, learned: Tensor | None, scale: float) -> Picked:
        """Adds up the positions of a sample that hold the same token.

        Args:
            deltas: Shape (r, N, S, p).
            tokens: Shape (N, S).
            learned: Which positions count, (N, S); None for all.
            scale: Factor of the inner products.
        """
        r, samples, _, width = deltas.shape
        owners = torch.arange(samples, device=tokens.device).unsqueeze(1).expand_as(tokens)
        pairs, flat = torch.stack([owners, tokens], -1).flatten(0, 1), deltas.flatten(1, 2)
        if learned is not None:
            counted = learned.flatten()
            pairs, flat = pairs[counted], flat[:, counted]
        distinct, place = pairs.unique(dim=0, return_inverse=True)
        values = deltas.new_zeros(r, len(distinct), width).index_add_(1, place, flat)
        return cls(values, distinct[:, 0], distinct[:, 1], samples, scale)

    def add(self, total: Tensor, other: Term, *, half: bool) -> None:
        """Tokens of the same number of samples together; those of most samples as `Rows`."""
        assert isinstance(other, Picked)
        size = 1 + int(torch.cat([self.keys, other.keys, self.keys.new_zeros(1)]).max())
        left, right = _Sorted(self, size), _Sorted(other, size)
        shared = (left.counts > 0) & (right.counts > 0)
        frequent = shared & (4 * left.counts * right.counts >= self.samples * other.samples)
        width = self.values.shape[-1]
        rows = len(self.values) * self.samples + len(other.values) * other.samples
        for keys in frequent.nonzero()[:, 0].split(max(1, gram.CHUNK_ELEMENTS // (rows * width))):
            a = Rows(self._dense(keys, size), self.scale)
            a.add(total, a if half else Rows(other._dense(keys, size), self.scale), half=half)
        rare = (shared & ~frequent).nonzero()[:, 0]
        kinds = torch.stack([left.counts[rare], right.counts[rare]], 1)
        distinct, kind = kinds.unique(dim=0, return_inverse=True)
        for i, (a_count, b_count) in enumerate(distinct.tolist()):
            a_rows, b_rows = len(self.values) * a_count, len(other.values) * b_count
            # The places of the products are as many 8-byte numbers as the products, twice.
            room = (a_rows + b_rows) * width + 3 * a_rows * b_rows
            for keys in rare[kind == i].split(max(1, gram.CHUNK_ELEMENTS // room)):
                self._add_rare(total, other, left.pairs(keys, a_count), right.pairs(keys, b_count))

    def _add_rare(self, total: Tensor, other: Picked, a: Tensor, b: Tensor) -> None:
        """Products of the pairs of each token, (V, c) and (V, d)."""
        x, y = (t.values[:, at].movedim(0, 1) for t, at in ((self, a), (other, b)))
        r, q, tokens = len(self.values), len(other.values), len(a)
        made = torch.bmm(x.flatten(1, 2), y.flatten(1, 2).mT).mul_(self.scale)
        places = (
            torch.arange(r, device=a.device).view(1, r, 1, 1, 1),
            self.owners[a].view(tokens, 1, -1, 1, 1),
            torch.arange(q, device=a.device).view(1, 1, 1, q, 1),
            other.owners[b].view(tokens, 1, 1, 1, -1),
        )
        shape = (tokens, r, a.shape[1], q, b.shape[1])
        total.index_put_(places, made.view(shape).to(total.dtype), accumulate=True)

    def _dense(self, keys: Tensor, size: int) -> Tensor:
        """The rows of some tokens with their zeros, (r, N, V p)."""
        r, _, width = self.values.shape
        place = torch.full((size,), -1, device=keys.device)
        place[keys] = torch.arange(len(keys), device=keys.device)
        at = place[self.keys]
        found = (at >= 0).nonzero()[:, 0]
        made = self.values.new_zeros(r, self.samples, len(keys), width)
        made[:, self.owners[found], at[found]] = self.values[:, found]
        return made.flatten(2)

    def squares(self) -> Tensor:
        """Squared norms."""
        each = torch.linalg.vector_norm(self.values, dim=-1).square() * self.scale
        made = each.new_zeros(len(each), self.samples)
        return made.index_add_(1, self.owners, each)


class _Sorted:
    """Pairs in the order of their tokens."""

    def __init__(self, term: Picked, size: int) -> None:
        self.order = term.keys.argsort()
        self.counts = term.keys.bincount(minlength=size)
        self.starts = self.counts.cumsum(0) - self.counts

    def pairs(self, keys: Tensor, count: int) -> Tensor:
        """The pairs of tokens that have `count` each, (V, count)."""
        steps = torch.arange(count, device=keys.device)
        return self.order[self.starts[keys].unsqueeze(1) + steps]
