"""Nodes that torch.compile calls without looking inside: products through a kept autograd graph.

Dynamo cannot enter a graph that was built outside of what it compiles, and to build it anew would
draw other dropout masks. As custom operators these products stay single calls of the compiled
graph, which run as they do without a compiler.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_PRODUCT = "(int handle, Tensor?[] given, bool[] wanted) -> Tensor[]"


class Opaque(Protocol):
    """What a node must have to be called by its handle."""

    @property
    def sides(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Tensors like the inputs, and like the outputs."""

    def push_all(self, tangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """`Node.push_all`."""

    def pull_all(
        self,
        cotangents: Sequence[Tensor | None],
        needed: Sequence[bool],
        out: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """`Node.pull_all`."""


_NODES: WeakValueDictionary[int, Opaque] = WeakValueDictionary()
_HANDLES = itertools.count()


def handle_of(node: Opaque) -> int:
    """A number by which a compiled graph finds the node as long as it lives."""
    handle = next(_HANDLES)
    _NODES[handle] = node
    return handle


@torch.library.custom_op("llqr_mf::push", mutates_args=(), schema=_PRODUCT)
def _push(handle: int, given: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor]:
    node = _NODES[handle]
    return _owned(node.push_all(given), node.sides[1], wanted, given)


@torch.library.custom_op("llqr_mf::pull", mutates_args=(), schema=_PRODUCT)
def _pull(handle: int, given: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor]:
    node = _NODES[handle]
    pulled = node.pull_all(given, wanted, [None] * len(wanted))
    return _owned(pulled, node.sides[0], wanted, given)


@_push.register_fake
def _(handle: int, given: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor]:
    return _empty(_NODES[handle].sides[1], wanted, given)


@_pull.register_fake
def _(handle: int, given: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor]:
    return _empty(_NODES[handle].sides[0], wanted, given)


def push_opaquely(
    handle: int, tangents: Sequence[Tensor | None], outputs: int
) -> tuple[Tensor | None, ...]:
    """`push_all` as one call of a compiled graph; exact zeros come as zeros."""
    result = torch.ops.llqr_mf.push(handle, list(tangents), [True] * outputs)
    return tuple(result)


def pull_opaquely(
    handle: int, cotangents: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """`pull_all` likewise."""
    result = iter(torch.ops.llqr_mf.pull(handle, list(cotangents), list(needed)))
    return [next(result) if wanted else None for wanted in needed]


def _columns(given: Sequence[Tensor | None]) -> int:
    return next(len(t) for t in given if t is not None)


def _owned(
    made: Sequence[Tensor | None],
    like: Sequence[Tensor],
    wanted: Sequence[bool],
    given: Sequence[Tensor | None],
) -> list[Tensor]:
    """What was made, contiguous and in memory of its own, as a custom operator must return it."""
    results = []
    for part, proto, is_wanted in zip(made, like, wanted, strict=True):
        if is_wanted:
            result = proto.new_empty(_columns(given), *proto.shape)
            results.append(result.zero_() if part is None else result.copy_(part))
    return results


def _empty(
    like: Sequence[Tensor], wanted: Sequence[bool], given: Sequence[Tensor | None]
) -> list[Tensor]:
    some = next(t for t in given if t is not None)
    return [
        some.new_empty(len(some), *proto.shape, dtype=proto.dtype)
        for proto, is_wanted in zip(like, wanted, strict=True)
        if is_wanted
    ]
