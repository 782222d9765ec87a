"""Per-sample gradients of a call without a rule: the call again, on one sample or a few."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import gram
from .base import Call, Slot
from .gram import Deltas

ROWS = 4096
"""Pairs of a cotangent and a sample that are pulled back at a time."""

ROUNDINGS = 1e3
"""Roundings by which the gradients' sum may differ from that of the whole batch."""

WRITTEN = 600.0
"""Flops in whose time a number of a gradient is written, some times over."""

AT_ONCE = 3.0
"""Passes of the whole batch that samples under vmap take as long as."""

TOLD_APART = 100
"""Samples above which it pays to try the ways on one before the gradients are wanted."""

PullColumns: TypeAlias = Callable[
    [Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], list[Tensor | None]
]
"""The vjp of outputs in inputs for k seeds at once."""


class SampleGradients:
    """Gradients of a call's inputs for cotangents of every sample, one pass for all inputs.

    The call runs on one sample under vmap, or, where vmap cannot go through it, on a few samples
    at a time. What comes out is compared with a pull through the whole batch: the call may look
    across samples, draw numbers, or treat a batch of one in another way.

    Args:
        call: The call.
        values: Its active inputs.
        select: Picks the output that the cotangents are of from the call's result.
        pull_columns: How columns are pulled back through a graph.
        samples: N.
    """

    def __init__(
        self,
        call: Call,
        values: Sequence[Tensor],
        select: Callable[[Any], Tensor],
        pull_columns: PullColumns,
        samples: int,
    ) -> None:
        self.select, self.pull_columns = select, pull_columns
        self.within = call.within or nullcontext
        # A module is called as a copy, which may keep what it is shown.
        self.on_a_copy = getattr(call.function, "on_a_copy", lambda: call.function)
        leaves, self.spec = tree_flatten((call.args, dict(call.kwargs)))
        given = iter(values)
        self.leaves = [next(given).detach() if isinstance(leaf, Slot) else leaf for leaf in leaves]
        self.slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Slot)]
        cut = [
            i
            for i, (value, leaf) in enumerate(zip(self.leaves, leaves, strict=True))
            if isinstance(value, Tensor)
            and value.shape[:1] == (samples,)
            and not (isinstance(leaf, Slot) and leaf.is_parameter)
        ]
        # A frozen weight may have as many rows as there are samples.
        moving = [i for i in cut if i in self.slots]
        cuts = [cut] if moving == cut else [cut, moving]
        self.ways = [(way, c) for way in (self._at_once, self._in_turn) for c in cuts if c]

    def __call__(
        self, deltas: Deltas, needed: Sequence[bool], whole: Callable[[Tensor], list[Tensor | None]]
    ) -> list[Tensor | None] | None:
        """Gradients (r, n, *in) of the needed inputs, or None where the call can't be cut.

        Args:
            deltas: Cotangents.
            needed: Which inputs.
            whole: Pulls a column of cotangents (1, N, *out) back through the whole batch.
        """
        wanted = [i for i, need in zip(self.slots, needed, strict=True) if need]
        values = deltas.values
        devices = [values.device] if values.device.type == "cuda" else []
        while self.ways:
            way, cut = self.ways[0]
            self.function = self.on_a_copy()
            try:
                with torch.random.fork_rng(devices=devices), self.within():
                    found = way([i for i in cut if i not in wanted], wanted, deltas)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # whatever the user's code says to a part of the batch
                found = None
            finally:
                del self.function
            if found is not None:
                each = iter(found)
                made = [next(each) if need else None for need in needed]
                if _agree(made, deltas, whole):
                    return made
            del self.ways[0]
        return None

    def passes(self, rank: int, samples: int) -> float:
        """Passes of the whole batch in whose time a column of all samples is likely pulled back.

        Samples under vmap keep products of two vectors where the batch has those of matrices.
        """
        if not self.ways:
            return float(samples)
        if self.ways[0][0] == self._at_once:
            return AT_ONCE
        return 1.0 + math.isqrt(samples // rank)

    def _at_once(self, cut: list[int], wanted: list[int], deltas: Deltas) -> list[Tensor]:
        """The vjp of one sample, vmapped over cotangents and samples."""

        def one(cotangents: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
            def output(*parameters: Tensor) -> Tensor:
                result = self._evaluate(cut, [row.unsqueeze(0) for row in rows], wanted, parameters)
                return result.squeeze(0)

            pull = torch.func.vjp(output, *[self.leaves[i] for i in wanted])[1]
            pulled: tuple[Tensor, ...] = torch.vmap(pull)(cotangents)
            return pulled

        per_sample = torch.vmap(one, in_dims=(1, *[0] * len(cut)), out_dims=1)
        owners, parts = deltas.owners, list[Sequence[Tensor]]()
        for here in self._parts(wanted, deltas, ROWS // max(1, len(deltas.values))):
            rows = [self.leaves[i][owners[here]] for i in cut]
            parts.append(per_sample(deltas.values[:, here], *rows))
        return _joined(parts)

    def _in_turn(self, cut: list[int], wanted: list[int], deltas: Deltas) -> list[Tensor]:
        """A few samples at a time, each alone in a column of cotangents.

        With m of them, m times the work of one pass is done, by N / m calls.
        """
        owners, out = deltas.owners, deltas.values.shape[2:]
        r, n = deltas.values.shape[:2]
        parts: list[Sequence[Tensor]] = []
        for here in self._parts(wanted, deltas, math.isqrt(n // r)):
            m = here.stop - here.start
            with torch.enable_grad():
                inputs = [self.leaves[i].detach().requires_grad_() for i in wanted]
                rows = [self.leaves[i][owners[here]] for i in cut]
                y = self._evaluate(cut, rows, wanted, inputs)
            alone = deltas.values.new_zeros(r, m, m, *out)
            places = torch.arange(m, device=alone.device)
            alone[:, places, places] = deltas.values[:, here]
            pulled = self.pull_columns([y], inputs, [alone.flatten(0, 1)])
            parts.append(
                [
                    (x.new_zeros(1).expand(r, m, *x.shape) if g is None else g.unflatten(0, (r, m)))
                    for x, g in zip(inputs, pulled, strict=True)
                ]
            )
        return _joined(parts)

    def _parts(self, wanted: list[int], deltas: Deltas, most: int) -> list[slice]:
        """Samples whose gradients fit into a chunk, and at most so many."""
        r, n = deltas.values.shape[:2]
        width = sum(self.leaves[i].numel() for i in wanted)
        step = max(1, min(most, gram.CHUNK_ELEMENTS // max(1, r * width)))
        return [slice(start, min(start + step, n)) for start in range(0, n, step)]

    def _evaluate(
        self,
        cut: list[int],
        rows: Sequence[Tensor],
        wanted: list[int],
        parameters: Sequence[Tensor],
    ) -> Tensor:
        leaves = list(self.leaves)
        for i, value in [*zip(cut, rows, strict=True), *zip(wanted, parameters, strict=True)]:
            leaves[i] = value
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.select(self.function(*args, **kwargs))


def _joined(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Gradients of all samples, from those of some at a time."""
    return [part[0] if len(part) == 1 else torch.cat(part, 1) for part in zip(*parts, strict=True)]


def _agree(
    made: Sequence[Tensor | None], deltas: Deltas, whole: Callable[[Tensor], list[Tensor | None]]
) -> bool:
    """Whether a random sum of all gradients is what its cotangents pull back together.

    The numbers are random, so that an error of one sample is not made up for by another's.
    """
    values = deltas.values
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(values.shape[:2], generator=generator).to(values)
    mine = torch.einsum("rn,rn...->n...", weights, values)
    together = values.new_zeros(1, deltas.batch, *values.shape[2:])
    together[0].index_add_(0, deltas.owners, mine)
    tolerance = min(ROUNDINGS * torch.finfo(values.dtype).eps, 0.05)
    for g, pulled in zip(made, whole(together), strict=True):
        if g is None:
            continue
        share = weights.to(g.dtype)
        total = torch.tensordot(share, g, 2)
        expected = torch.zeros_like(total) if pulled is None else pulled[0]
        size = (torch.linalg.vector_norm(g.flatten(2), dim=-1) * share.abs()).sum()
        miss = torch.linalg.vector_norm(total - expected)
        if total.shape != expected.shape or not bool(miss <= tolerance * size):
            return False
    return True
