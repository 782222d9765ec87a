"""Fresh memory of the parameters' size, without a page fault for every 4 KiB of it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

from torch import Tensor

HUGE = 2**22
"""Bytes from which huge pages are asked for."""

_PAGE = 4096
_MADV_HUGEPAGE = 14


def fresh_rows(proto: Tensor, k: int, n: int) -> Tensor:
    """An uninitialised tensor (k, n) of the dtype and device of `proto`.

    Linux gives large blocks back to the system when they are freed, so every product's result
    would fault its pages in again: 34 ms for 64 MiB, against 4 ms with huge pages (measured on the
    machine of the committed benchmarks). Elsewhere, and where the advice is refused, this is
    `torch.empty`.
    """
    out = proto.new_empty(k, n)
    if out.device.type == "cpu" and out.nbytes >= HUGE and sys.platform == "linux":
        start = -(-out.data_ptr() // _PAGE) * _PAGE
        length = (out.data_ptr() + out.nbytes - start) // _PAGE * _PAGE
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return out


def into(product: Callable[[Tensor], Tensor], v: Tensor, out: Tensor) -> Tensor | None:
    """The product of rows copied into `out` where that lies on v's memory; None where it doesn't.

    Writing row by row, or layer by layer, would overwrite what is still to be read.

    Raises:
        ValueError: `out` doesn't fit v.
    """
    if out.shape != v.shape or out.dtype != v.dtype or out.device != v.device:
        raise ValueError(
            f"out is {out.dtype} of shape {tuple(out.shape)} on {out.device}: give {v.dtype} of "
            f"shape {tuple(v.shape)} on {v.device}."
        )
    if v.untyped_storage().data_ptr() != out.untyped_storage().data_ptr() or not v.numel():
        return None
    (start, end), (begin, stop) = _extent(v), _extent(out)
    return out.copy_(product(v)) if start < stop and begin < end else None


def _extent(rows: Tensor) -> tuple[int, int]:
    """The addresses between which a tensor lies."""
    pairs = zip(rows.shape, rows.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in pairs)
    return rows.data_ptr(), rows.data_ptr() + length * rows.element_size()
