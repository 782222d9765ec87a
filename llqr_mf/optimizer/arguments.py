"""What is wrong with the arguments of `LLQR`, said before anything is made of them."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch.distributed as dist
from torch.optim import LBFGS, Optimizer

from .recipe import Recipe
from .schedule import period_at
from .subspace import Subspace

_CHOICES = {
    "graft": ("layer", "kl", "none"),
    "precondition": ("gradient", "update"),
    "step": ("base", "subspace"),
}


ASK: Any = object()
"""No process group was named, and none was declined."""


def check_process_group(given: Any) -> None:
    """Whether LLQR can keep to it.

    Raises:
        ValueError: It cannot.
    """
    if given is not ASK and given is not None:
        raise ValueError(
            f"process_group is a {type(given).__name__}: LLQR does not average over processes yet. "
            "Give None if every process trains a model of its own."
        )


def check_alone(given: Any) -> None:
    """Whether this process's curvature is all there is.

    Raises:
        RuntimeError: There are other processes, and nobody said that they are no replicas.
    """
    if given is None or not (dist.is_available() and dist.is_initialized()):
        return
    size = dist.get_world_size()
    if size > 1:
        raise RuntimeError(
            f"torch.distributed runs {size} processes, and LLQR learns M from this one's batches "
            "only: replicas would drift apart. Train in one process, or use LLQR(..., "
            "process_group=None) if every process trains a model of its own."
        )


def check_base(base: Any) -> None:
    """A torch optimizer that takes one gradient a step.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(base, Optimizer):
        raise ValueError(f"base is a {type(base).__name__}: give a torch optimizer.")
    if isinstance(base, LBFGS):
        raise ValueError("base is LBFGS, which runs its closure many times: give another.")


def check_options(
    *, recipe: Any, subspace: Any, refresh_every: Any, spread: Any, kl_limit: float, **chosen: str
) -> None:
    """The options of `LLQR` that need no model.

    Raises:
        ValueError: One does not fit, with its name.
    """
    for name, value in chosen.items():
        if value not in _CHOICES[name]:
            raise ValueError(f"{name}={value!r}: choose one of {_CHOICES[name]}.")
    for name, given, kind in (("recipe", recipe, Recipe), ("subspace", subspace, Subspace)):
        if given is not None and not isinstance(given, kind):
            raise ValueError(
                f"{name} is a {type(given).__name__}: give lq.optimizer.{kind.__name__}(...)."
            )
    if not isinstance(spread, Integral) or spread < 1:
        raise ValueError(f"spread is {spread!r}: give a whole number of steps, at least 1.")
    if not kl_limit > 0:
        raise ValueError(f"kl_limit is {kl_limit}: give a number > 0.")
    if not (callable(refresh_every) or isinstance(refresh_every, Integral)):
        raise ValueError(
            f"refresh_every is {refresh_every!r}: give a whole number of steps, or a function of "
            "the step such as lq.optimizer.annealed(...)."
        )
    period_at(refresh_every, 0)
