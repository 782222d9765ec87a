"""Dot products of long vectors in float64, and updates that return one on the way.

A vector in the tens of millions is read from memory once per function here: it goes through the
cache in pieces, and a piece is updated, widened and multiplied while it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CPU_CHUNK = 2**17
"""Numbers in a piece, for each thread: one megabyte in float64, which the cache of a core holds."""

GPU_CHUNK = 2**22
"""The same on an accelerator, where a launch costs more than the memory."""


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Dot product of each row of a with the same row of b; shapes (k, n), (k, n) to (k,) float64.

    A product of two float32 numbers is exact in float64, so the only error left is the
    accumulation's: 3e-13 of |a||b| measured on 2^26 equal numbers, whose errors add up. No
    temporary is longer than a piece.
    """
    return _sweep(_square_of_piece if b is a else _dots_of_piece, a, b)[0]


def row_norms(a: Tensor) -> Tensor:
    """Euclidean norm of each row; shape (k, n) to (k,) float64."""
    return row_dots(a, a).sqrt_()


def cross_dots(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The dot products a'b and b'b of each row; shapes (k, n), (k, n) to (k,), (k,) float64."""
    across, square = _sweep(_cross_dots_of_piece, a, b)
    return across, square


def update_rows(
    a: Tensor, b: Tensor, *, decay: Tensor | None = None, step: Tensor | None = None
) -> Tensor:
    """Writes a = decay a + step b, and gives a'a of the new rows.

    Args:
        a: Overwritten; shape (k, n).
        b: The same shape.
        decay: A factor per row; shape (k,). None is one.
        step: The same for b.

    Returns:
        The square of every row; shape (k,), float64.
    """
    decay, step = _column(decay, a), _column(step, a)

    def update(wide: _Wide, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        if decay is not None and step is None:
            torch.addcmul(b, a, decay, out=a)
        else:
            if decay is not None:
                a.mul_(decay)
            if step is not None:
                a.addcmul_(b, step)
            else:
                a.add_(b)
        return _square_of_piece(wide, a, a)

    if not _goes_by_rows(a):
        return _sweep(update, a, b)[0]
    return torch.cat(
        [
            update_rows(
                a[j : j + 1],
                b[j : j + 1],
                decay=None if decay is None else decay[j],
                step=None if step is None else step[j],
            )
            for j in range(len(a))
        ]
    )


def pieces(*blocks: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of the same shape (k, n) in pieces that a cache holds, cut along n."""
    chunk = max(1, _chunk(blocks[0]) // max(1, len(blocks[0])))
    return zip(*(torch.split(block, chunk, -1) for block in blocks), strict=True)


def _chunk(block: Tensor) -> int:
    if block.device.type != "cpu":
        return GPU_CHUNK
    return CPU_CHUNK * torch.get_num_threads()


def _goes_by_rows(block: Tensor) -> bool:
    """Whether a row alone fills a piece, so that rows need not share one."""
    return len(block) > 1 and block.shape[-1] >= _chunk(block)


class _Wide:
    """Float64 copies of pieces, in memory that is used again for the next piece."""

    def __init__(self) -> None:
        self.buffers: dict[int, Tensor] = {}

    def __call__(self, piece: Tensor, place: int) -> Tensor:
        if piece.dtype == torch.float64:
            return piece
        buffer = self.buffers.get(place)
        if buffer is None:
            buffer = torch.empty(piece.shape, dtype=torch.float64, device=piece.device)
            self.buffers[place] = buffer
        return buffer[:, : piece.shape[-1]].copy_(piece)


_OnPiece = Callable[[_Wide, Tensor, Tensor], tuple[Tensor, ...]]


def _sweep(on_piece: _OnPiece, a: Tensor, b: Tensor) -> list[Tensor]:
    """The sums over all pieces of what a function gives for one; shapes (k,).

    Raises:
        ValueError: The vectors are complex, which float64 would halve without a word.
    """
    if a.is_complex() or b.is_complex():
        raise ValueError(
            "the solvers take real vectors, and these are complex: give real and imaginary parts "
            "as a vector of twice the length (torch.view_as_real)."
        )
    if _goes_by_rows(a):
        rows = [_sweep(on_piece, a[j : j + 1], b[j : j + 1]) for j in range(len(a))]
        return [torch.cat(parts) for parts in zip(*rows, strict=True)]
    wide = _Wide()
    found = [on_piece(wide, x, y) for x, y in pieces(a, b)]
    if len(found) == 1:
        return list(found[0])
    return [torch.stack(parts).sum(0) for parts in zip(*found, strict=True)]


def _dots_of_piece(wide: _Wide, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return (_dots(wide(a, 0), wide(b, 1)),)


def _square_of_piece(wide: _Wide, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    x = wide(a, 0)
    return (_dots(x, x),)


def _cross_dots_of_piece(wide: _Wide, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    x, y = wide(a, 0), wide(b, 1)
    return _dots(x, y), _dots(y, y)


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """The same of float64 pieces, a single row without the temporary of its products."""
    return torch.dot(x[0], y[0]).unsqueeze(0) if len(x) == 1 else (x * y).sum(dim=-1)


def _column(factor: Tensor | None, block: Tensor) -> Tensor | None:
    return None if factor is None else factor.to(block.dtype).unsqueeze(-1)
