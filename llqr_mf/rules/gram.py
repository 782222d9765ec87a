"""Gram matrices of per-sample gradients, never holding more than a chunk of them."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24
"""Elements of per-sample gradients held at a time."""


def row_gram(rows: Tensor) -> Tensor:
    """R R' for rows (m, p)."""
    return rows @ rows.mT


def outer_gram(x: Tensor, deltas: Tensor) -> Tensor:
    """Gram matrix of the per-sample gradients sum_s delta_s x_s' of a weight.

    With one position per sample it is (X X') o (D D') entry by entry, linear in the width. With
    several the gradients of a chunk of output rows are formed, multiplied and dropped.

    Args:
        x: Layer inputs (N, S, in).
        deltas: Cotangents of the layer's output (r, N, S, out).

    Returns:
        Tensor (r N, r N), index j N + n.
    """
    r, n, positions, width = deltas.shape
    if positions == 1:
        inner = (x[:, 0] @ x[:, 0].mT).expand(r, r, n, n)
        outer = row_gram(deltas.reshape(r * n, width))
        return outer * inner.permute(0, 2, 1, 3).reshape(r * n, r * n)
    if (r * n * positions) ** 2 <= CHUNK_ELEMENTS and positions < min(width, x.shape[-1]):
        inner = x.reshape(n * positions, -1) @ x.reshape(n * positions, -1).mT
        outer = row_gram(deltas.reshape(r * n * positions, width))
        outer = outer.reshape(r, n * positions, r, n * positions) * inner[None, :, None, :]
        return outer.reshape(r * n, positions, r * n, positions).sum((1, 3))
    gram = deltas.new_zeros(r * n, r * n)
    step = max(1, CHUNK_ELEMENTS // (r * n * x.shape[-1]))
    for part in deltas.split(step, dim=-1):
        gradients = torch.einsum("rnso,nsi->rnoi", part, x).reshape(r * n, -1)
        gram.addmm_(gradients, gradients.mT)
    return gram
