"""Fresh memory of the parameters' size, without a page fault for every 4 KiB of it."""

from __future__ import annotations

import ctypes
import sys

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
