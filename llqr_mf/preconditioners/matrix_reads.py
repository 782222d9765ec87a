"""Calls whose gradient in a weight is a sum of outer products, delta a', over positions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..output_sweep import Read
from ..rules.conv import ConvNode
from ..rules.embedding import EmbeddingNode
from ..rules.linear import LinearNode
from .sites import Site

ELEMENTS = 2**24
"""Most elements of layer inputs, or of per-sample gradients, that are held at a time."""


@dataclass(frozen=True)
class MatrixRead:
    """A weight (out, in) that maps inputs a to outputs at every position of every row.

    Rows are those of the call's first axis (samples, as a rule), n of them; a row has S positions.

    Args:
        read: Where.
        site: The weight.
        joined: Whether the site's bias is added in the same call: a then ends with a one.
    """

    read: Read
    site: Site
    joined: bool

    @property
    def node(self) -> LinearNode | ConvNode | EmbeddingNode:
        """The call."""
        node = self.read.bound.node
        assert isinstance(node, LinearNode | ConvNode | EmbeddingNode)
        return node

    @property
    def tokens(self) -> Tensor | None:
        """Of an embedding, the rows of the weight that were read: (n, S)."""
        if not isinstance(self.node, EmbeddingNode):
            return None
        tokens = self.node.tokens
        return tokens.reshape(tokens.shape[0] if tokens.ndim else 1, -1)

    def token_counts(self) -> Tensor:
        """Of an embedding, how often each row of the weight was read; never for the padding."""
        node = self.node
        assert isinstance(node, EmbeddingNode)
        learned = node.tokens if node.learned is None else node.tokens[node.learned.squeeze(-1)]
        return torch.bincount(learned.reshape(-1), minlength=self.site.shape[0])

    @property
    def rows(self) -> int:
        """Length of the call's first axis."""
        return self._positions[0] if self._positions else 1

    @property
    def positions(self) -> int:
        """S, positions of a row."""
        return math.prod(self._positions[1:])

    @property
    def _positions(self) -> tuple[int, ...]:
        node = self.node
        if isinstance(node, LinearNode):
            return tuple(node.lead)
        if isinstance(node, ConvNode):
            return (node.shape[0], *node.shape[2:])
        return tuple(node.tokens.shape)

    @property
    def width(self) -> int:
        """Length of a: the inputs of a position, and one for a joined bias."""
        return math.prod(self.site.shape[1:]) + int(self.site.bias is not None)

    def parts(self, per_row: int) -> Iterator[slice]:
        """The rows, as many at a time as hold `ELEMENTS` elements at `per_row` each."""
        step = max(1, ELEMENTS // max(1, per_row))
        return (slice(start, start + step) for start in range(0, self.rows, step))

    def inputs(self, part: slice, dtype: torch.dtype) -> Tensor:
        """A of some rows, shape (n, S, in); not for an embedding."""
        node = self.node
        if isinstance(node, LinearNode):
            assert node.x is not None
            a = node.x.reshape(self.rows, self.positions, -1)[part]
        else:
            assert isinstance(node, ConvNode)
            patches = node.patches(part)
            assert patches is not None
            a = patches
        a = a.to(dtype)
        return a if self.site.bias is None else F.pad(a, (0, 1), value=float(self.joined))

    def deltas(self, cotangent: Tensor, dtype: torch.dtype) -> Tensor:
        """Cotangents of the output, position by position: (c, n, S, out)."""
        node = self.node
        if isinstance(node, ConvNode):
            cotangent = cotangent.flatten(3).mT
        elif isinstance(node, EmbeddingNode) and node.learned is not None:
            cotangent = cotangent * node.learned
        shape = (len(cotangent), self.rows, self.positions, cotangent.shape[-1])
        return cotangent.reshape(shape).to(dtype)


def matrix_reads(site: Site, reads: dict[str, list[Read]]) -> list[MatrixRead]:
    """All reads of a site's weight; none if any of them, or of its bias, is of another kind.

    Args:
        site: A weight, with its bias if that is joined.
        reads: `output_sweep.parameter_reads`.
    """
    found = reads[site.name]
    if not all(map(_is_matrix, found)):
        return []
    nodes = {id(read.bound.node) for read in found}
    biases = [] if site.bias is None else reads[site.bias]
    if site.bias is not None and any(isinstance(r.bound.node, EmbeddingNode) for r in found):
        return []
    if any(read.role != "bias" or id(read.bound.node) not in nodes for read in biases):
        return []
    with_bias = {id(read.bound.node) for read in biases}
    return [MatrixRead(read, site, id(read.bound.node) in with_bias) for read in found]


def _is_matrix(read: Read) -> bool:
    node = read.bound.node
    if isinstance(node, EmbeddingNode):
        return True
    usable = isinstance(node, LinearNode) or (isinstance(node, ConvNode) and node.is_matrix)
    return usable and read.role == "weight"
