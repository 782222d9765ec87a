"""When the preconditioner is learned anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

RefreshEvery: TypeAlias = int | Callable[[int], int]
"""Steps from one refresh to the next: a number, or a function of the step."""


def annealed(*, first: int, last: int, steps: int) -> Callable[[int], int]:
    """A period that grows geometrically from `first` to `last` over the first `steps` steps.

    Curvature changes fastest early in training.
    """
    if not (1 <= first <= last and steps >= 1):
        raise ValueError("need 1 <= first <= last and steps >= 1.")

    def period(step: int) -> int:
        return round(first * (last / first) ** min(1.0, step / steps))

    return period


def burn_in(steps: int, *, every: int, then: RefreshEvery) -> Callable[[int], int]:
    """One refresh every `every` steps for the first `steps` steps, `then` after."""

    def period(step: int) -> int:
        return every if step < steps else period_at(then, step)

    return period


def period_at(refresh_every: RefreshEvery, step: int) -> int:
    """The period that holds at a step.

    Raises:
        ValueError: It is less than 1.
    """
    period = refresh_every(step) if callable(refresh_every) else refresh_every
    if period < 1:
        raise ValueError(f"refresh_every gives {period} at step {step}: give at least 1.")
    return int(period)
