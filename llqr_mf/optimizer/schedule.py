"""When the preconditioner is learned anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypeAlias

RefreshEvery: TypeAlias = int | Callable[[int], int]
"""Steps from one refresh to the next: a number, or a function of the step."""


def annealed(*, first: int, last: int, steps: int) -> Callable[[int], int]:
    """A period that grows geometrically from `first` to `last` over the first `steps` steps.

    Curvature changes fastest early in training.

    Raises:
        ValueError: Not 1 <= first <= last, or steps is less than 1.
    """
    real = all(isinstance(n, Real) for n in (first, last, steps))
    if not (real and 1 <= first <= last < math.inf and 1 <= steps < math.inf):
        raise ValueError(
            f"first is {first!r}, last {last!r} and steps {steps!r}: need 1 <= first <= last and "
            "steps >= 1."
        )

    def period(step: int) -> int:
        return round(first * (last / first) ** min(1.0, step / steps))

    return period


def burn_in(steps: int, *, every: int, then: RefreshEvery) -> Callable[[int], int]:
    """One refresh every `every` steps for the first `steps` steps, `then` after."""
    return _BurnIn(steps, every, then)


@dataclass(frozen=True)
class _BurnIn:
    steps: int
    every: int
    then: RefreshEvery

    def __call__(self, step: int) -> int:
        return self.every if step < self.steps else period_at(self.then, step)


def check_period(refresh_every: RefreshEvery) -> None:
    """Whether it is a period at the first step, and after a burn-in.

    Raises:
        ValueError: It is none.
    """
    period_at(refresh_every, 0)
    if isinstance(refresh_every, _BurnIn):
        if not (isinstance(refresh_every.steps, Integral) and refresh_every.steps >= 0):
            raise ValueError(f"steps of burn_in is {refresh_every.steps!r}: give a whole number.")
        period_at(refresh_every.every, 0)
        period_at(refresh_every.then, refresh_every.steps)


def period_at(refresh_every: RefreshEvery, step: int) -> int:
    """The period that holds at a step.

    Raises:
        ValueError: It is less than 1.
    """
    period = refresh_every(step) if callable(refresh_every) else refresh_every
    if not (isinstance(period, Real) and 1 <= period < math.inf):
        raise ValueError(
            f"refresh_every gives {period!r} at step {step}: give a whole number of steps, at "
            "least 1."
        )
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

    def period(self, step: int) -> int:
        """Of the refresh whose turn is taken at a step; a function of the user's may raise."""
        return period_at(self.every, self.start if self.turn else step)

    def advance(self, step: int, period: int) -> None:
        """A turn was taken at a step."""
        if self.turn == 0:
            self.start = step
        self.turn, self.due = self.turn + 1, step + 1
        if self.turn == self.spread:
            self.turn, self.done = 0, self.done + 1
            self.due = max(self.due, self.start + period)

    def retry(self, step: int) -> None:
        """The turn of a step came to nothing: it is due again at the next."""
        self.due = step + 1
