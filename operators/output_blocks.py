"""A factor for curvature that is known by products: the blocks of its samples, written out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from .closure_curvature import ClosureCurvature
from .diagonal_curvature import DiagonalCurvature
from .outer_curvature import OuterCurvature
from .output_curvature import OutputCurvature, at_least_float32

BLOCK_WIDTH = 128
"""Largest D whose blocks are written out, where outputs are coupled."""

BLOCK_ENTRIES = 2**24
"""Most entries of all blocks, N D^2."""

PASS_ENTRIES = 2**22
"""Entries of the rows that are multiplied in one pass, k N D."""


@torch.no_grad()
def positive_part(curvature: ClosureCurvature, what: str, *, clip: bool = True) -> OutputCurvature:
    """The same curvature with a factor, eigenvalues below zero set to zero.

    Products tell whether two samples, and two outputs of one, are coupled: entries whose numbers
    have a bit in common are moved, bit by bit, and the others must not answer. Then columns of the
    blocks of all samples come from one product each, D of them; one for all where nothing couples.

    Args:
        curvature: Known by products.
        what: What it is called in messages.
        clip: Whether eigenvalues may be clipped; without, indefinite curvature has no factor.

    Returns:
        Curvature with a factor. The given one, with `unfactored` saying why, if samples are
        coupled or the blocks are too large.

    Raises:
        ValueError: It has entries that are NaN or infinite.
    """
    n, d = curvature.samples, curvature.width
    if not bool(_product(curvature, _moves(curvature).unsqueeze(0), what).any()):
        return _zero(curvature, what)
    if _couples(curvature, torch.arange(n).repeat_interleave(d), what):
        return _unfactored(curvature, f"{what} couples samples")
    if not _couples(curvature, torch.arange(d).repeat(n), what):
        diagonal = _product(curvature, _wide(curvature).new_ones(1, n * d), what)[0]
        if not _may_be_clipped(diagonal, what, clip=clip):
            return _unfactored(curvature, f"{what} is indefinite")
        return DiagonalCurvature(curvature._proto, diagonal=diagonal.clamp(min=0).reshape(n, d))
    if d > BLOCK_WIDTH or n * d**2 > BLOCK_ENTRIES:
        return _unfactored(
            curvature,
            f"{what} couples the D = {d} outputs of a sample, and blocks are factored up to "
            f"D = {BLOCK_WIDTH} and N D^2 = {BLOCK_ENTRIES}",
        )
    eigenvalues, vectors = torch.linalg.eigh(_blocks(curvature, what).double())
    if not _may_be_clipped(eigenvalues, what, clip=clip):
        return _unfactored(curvature, f"{what} is indefinite")
    kept = eigenvalues > _rounding(eigenvalues, curvature)
    rank = max(1, int(kept.sum(1).max()))
    columns = vectors * (eigenvalues * kept).sqrt().unsqueeze(1)
    wide = at_least_float32(curvature.dtype)
    return OuterCurvature(curvature._proto, vectors=columns[:, :, d - rank :].to(wide))


def _zero(curvature: ClosureCurvature, what: str) -> DiagonalCurvature:
    h = _wide(curvature).new_zeros(()).expand(curvature.samples, curvature.width)
    zero = DiagonalCurvature(curvature._proto, diagonal=h)
    zero.flat = what
    return zero


def _moves(curvature: ClosureCurvature) -> Tensor:
    """A vector of no pattern without zeros."""
    n = curvature.samples * curvature.width
    places = torch.arange(1, 1 + n, dtype=_wide(curvature).dtype, device=curvature.device)
    return 1.5 + places.sin()


def _unfactored(curvature: ClosureCurvature, reason: str) -> ClosureCurvature:
    curvature.unfactored = reason
    return curvature


def _may_be_clipped(eigenvalues: Tensor, what: str, *, clip: bool) -> bool:
    """Whether what is negative is rounding, or is clipped, which is said."""
    top, least = float(eigenvalues.abs().max()), float(eigenvalues.min())
    # Products are of float32 at least, of a double backward's few terms.
    if least >= -1e2 * torch.finfo(torch.float32).eps * top:
        return True
    if clip:
        warnings.warn(
            f"{what} is indefinite: its least eigenvalue is {least:.3g}, its largest in size "
            f"{top:.3g}. Gauss-Newton takes its positive part; metric='newton' keeps all of it.",
            UserWarning,
            stacklevel=2,
        )
    return clip


def _rounding(eigenvalues: Tensor, curvature: OutputCurvature) -> Tensor:
    """Per sample: what an eigenvalue of zero may come out as."""
    eps = torch.finfo(at_least_float32(curvature.dtype)).eps
    return curvature.width * eps * eigenvalues.abs().amax(1, keepdim=True)


def _couples(curvature: ClosureCurvature, numbers: Tensor, what: str) -> bool:
    """Whether the product couples entries of different numbers."""
    numbers, moves = numbers.to(curvature.device), _moves(curvature)
    for bit in range(int(numbers.max()).bit_length()):
        moved = (numbers >> bit) & 1 == 1
        answer = _product(curvature, (moves * moved).unsqueeze(0), what)[0].abs()
        # Autograd leaves exact zeros; what is left of terms that cancel is rounding.
        rounding = 1e2 * torch.finfo(answer.dtype).eps * answer.max()
        if bool((answer[~moved] > rounding).any()):
            return True
    return False


def _blocks(curvature: ClosureCurvature, what: str) -> Tensor:
    """The blocks, shape (N, D, D)."""
    n, d = curvature.samples, curvature.width
    made = _wide(curvature).new_empty(n, d, d)
    for units in _units(curvature):
        columns = _product(curvature, units.repeat(1, n), what).reshape(len(units), n, d)
        first = int(units[0].argmax())
        made[:, first : first + len(units)] = columns.transpose(0, 1)
    return (made + made.mT) / 2


def _units(curvature: ClosureCurvature) -> Iterator[Tensor]:
    """Rows of the unit matrix of size D, a few at a time."""
    n, d = curvature.samples, curvature.width
    unit = torch.eye(d, dtype=_wide(curvature).dtype, device=curvature.device)
    yield from unit.split(max(1, PASS_ENTRIES // (n * d)))


def _product(curvature: ClosureCurvature, rows: Tensor, what: str) -> Tensor:
    product = curvature.product(rows)
    if not bool(product.isfinite().all()):
        raise ValueError(
            f"{what} has entries that are NaN or infinite: write it without roots, norms or "
            "divisions that vanish at these outputs, or use metric='empirical_fisher'."
        )
    return product


def _wide(curvature: OutputCurvature) -> Tensor:
    """An empty tensor of the dtype that products are made in."""
    return curvature._proto.new_empty(0, dtype=at_least_float32(curvature.dtype))
