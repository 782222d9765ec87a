"""Dot products of long vectors, accumulated in float64."""

from __future__ import annotations

import torch
from torch import Tensor

CPU_CHUNK = 2**16
"""Numbers converted to float64 at a time: half a megabyte stays in the cache of a core."""

GPU_CHUNK = 2**22
"""The same on an accelerator, where a launch costs more than the memory."""


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Dot product of each row of a with the same row of b; shapes (k, n), (k, n) to (k,) float64.

    A product of two float32 numbers is exact in float64, so the only error left is the
    accumulation's. No temporary is longer than a chunk.
    """
    chunk = max(1, (CPU_CHUNK if a.device.type == "cpu" else GPU_CHUNK) // max(1, len(a)))
    total = torch.zeros(len(a), dtype=torch.float64, device=a.device)
    for x, y in zip(torch.split(a, chunk, -1), torch.split(b, chunk, -1), strict=True):
        total += (x.double() * y.double()).sum(dim=-1)
    return total


def row_norms(a: Tensor) -> Tensor:
    """Euclidean norm of each row; shape (k, n) to (k,) float64."""
    return row_dots(a, a).sqrt_()
