"""What an optimizer counts, times and holds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Counts:
    """What has happened so far.

    Args:
        steps: Calls of `step`, skipped ones included.
        skipped: Steps not taken, because a loss, gradient or step was NaN or infinite.
        taken_back: Subspace steps undone because they raised their own batch's loss.
        refreshes: Turns of refreshes that changed M (one a refresh, unless it is spread).
        refused: Turns that did not: something was not finite. They are due again at the next step.
        kept: Fits that the held-out batch refused; M then is what it was before the fit.
        reason: Why the last step was skipped, or the last refresh or fit refused.
    """

    steps: int = 0
    skipped: int = 0
    taken_back: int = 0
    refreshes: int = 0
    refused: int = 0
    kept: int = 0
    reason: str = ""


class Timings(dict[str, float]):
    """Seconds by phase, by the host's clock: a GPU may lag behind.

    Args:
        phases: Their names.
    """

    def __init__(self, *phases: str) -> None:
        super().__init__(dict.fromkeys(phases, 0.0))

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Adds the time spent inside to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self[phase] += time.perf_counter() - start


def tensors_in(held: Any) -> Iterator[Tensor]:
    """The tensors in nested mappings, lists and tuples."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Mapping):
        yield from tensors_in(list(held.values()))
    elif isinstance(held, list | tuple):
        for each in held:
            yield from tensors_in(each)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)
