"""From what a user writes to a metric."""

from __future__ import annotations

from collections.abc import Callable

from .base import Metric
from .fisher import Fisher
from .gauss_newton import GaussNewton
from .kl import KL
from .newton import Newton
from .renyi import Renyi
from .reverse_kl import ReverseKL
from .squared_error import SquaredError

_NAMED: dict[str, Callable[[], Metric]] = {
    "gauss_newton": GaussNewton,
    "newton": Newton,
    "fisher": Fisher,
    "fisher_mc": lambda: Fisher("monte_carlo"),
    "empirical_fisher": lambda: Fisher("empirical"),
    "kl": KL,
    "reverse_kl": ReverseKL,
    "renyi": Renyi,
    "squared_error": SquaredError,
}


def metric_names() -> tuple[str, ...]:
    """The metrics known by name."""
    return tuple(_NAMED)


def get_metric(spec: str | Metric) -> Metric:
    """The metric that a name stands for, or the metric itself.

    "renyi" is of order alpha = 1/2 (`Renyi(alpha)` for another), "fisher_mc" takes one draw per
    sample with seed 0 (`Fisher("monte_carlo", samples=..., seed=...)` otherwise).

    Args:
        spec: One of `metric_names()`, or a `Metric`.

    Raises:
        ValueError: The name is unknown.
        TypeError: It is neither.
    """
    if isinstance(spec, Metric):
        return spec
    choices = ", ".join(map(repr, _NAMED))
    if not isinstance(spec, str):
        raise TypeError(
            f"metric is {spec!r}: give one of {choices}, or a Metric (Divergence(fn) makes one of "
            "a function)."
        )
    if spec not in _NAMED:
        raise ValueError(
            f"metric {spec!r} is unknown: choose one of {choices}, or give a Metric such as "
            "Divergence(fn) or StateCosts(costs)."
        )
    return _NAMED[spec]()
