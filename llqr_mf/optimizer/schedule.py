"""When the preconditioner is learned anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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


def equal_parts(share: float, parts: int) -> list[float]:
    """Weights w_1, w_2, ... of m <- (1 - w_j) m + w_j x_j that give every x_j share / parts."""
    each = share / parts
    return [each / (1 - share + j * each) for j in range(1, parts + 1)]


@dataclass
class Schedule:
    """When M is learned. A refresh has `spread` turns, one a step.

    Args:
        every: Steps from the start of one refresh to that of the next.
        spread: Turns of a refresh.
        due: The step at which the next turn is due.
        start: The step at which the present refresh began.
        turn: Its turns so far.
        done: Refreshes finished.
    """

    every: RefreshEvery
    spread: int = 1
    due: int = 0
    start: int = 0
    turn: int = 0
    done: int = 0

    def share(self, ema: float) -> float:
        """What the present turn's curvature weighs in the running mean.

        All turns of a refresh count alike, and so do all refreshes until a new one's part is down
        to 1 - ema.
        """
        return equal_parts(max(1 - ema, 1 / (self.done + 1)), self.spread)[self.turn]

    def advance(self, step: int) -> None:
        """A turn was taken at a step."""
        if self.turn == 0:
            self.start = step
        self.turn, self.due = self.turn + 1, step + 1
        if self.turn == self.spread:
            self.turn, self.done = 0, self.done + 1
            self.due = max(self.due, self.start + period_at(self.every, self.start))

    def retry(self, step: int) -> None:
        """The turn of a step came to nothing: it is due again at the next."""
        self.due = step + 1
