"""What is wrong with the arguments of `LLQR`, said before anything is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from .halves import Batch
from .recipe import Recipe
from .schedule import check_period
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


_WHICH = "give inputs and targets, or None and batches=[(x, y), ...]."


def check_base(base: Any) -> None:
    """A torch optimizer that takes one gradient a step.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(base, Optimizer):
        raise ValueError(f"base is a {type(base).__name__}: give a torch optimizer.")
    if isinstance(getattr(base, "base", None), Optimizer):
        raise ValueError(f"base is an {type(base).__name__}: give a torch optimizer.")
    if isinstance(base, LBFGS):
        raise ValueError("base is LBFGS, which runs its closure many times: give another.")


def check_closure(closure: Any) -> None:
    """A function.

    Raises:
        ValueError: It is none.
    """
    if not callable(closure):
        raise ValueError(
            f"closure is a {type(closure).__name__}: give a function that runs forward and "
            "backward, or nothing. (A batch goes with LLQR(..., step='subspace').)"
        )


def batches_of(inputs: Any, targets: Any, batches: Any) -> Sequence[Batch]:
    """The batches that `refresh` was given.

    Raises:
        ValueError: They are none, given twice, or no pairs.
    """
    if batches is None and targets is not None:
        return [(inputs, targets)]
    if batches is None or inputs is not None or targets is not None:
        raise ValueError(_WHICH)
    if not isinstance(batches, Iterable) or isinstance(batches, str | Mapping | Tensor):
        raise ValueError(f"batches is a {type(batches).__name__}: {_WHICH}")
    given = list(batches)
    if not given:
        raise ValueError(f"batches is empty: {_WHICH}")
    for i, pair in enumerate(given):
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise ValueError(f"batches[{i}] is no pair (inputs, targets) but {_told(pair)}.")
    return [(x, y) for x, y in given]


def _told(x: Any) -> str:
    return f"a {type(x).__name__}" + (f" of {len(x)}" if isinstance(x, tuple | list) else "")


def check_options(
    model: Any,
    base: Any,
    *,
    process_group: Any,
    recipe: Any,
    subspace: Any,
    refresh_every: Any,
    spread: Any,
    kl_limit: Any,
    seed: Any,
    **chosen: str,
) -> None:
    """The arguments of `LLQR` that can be judged one by one.

    Raises:
        ValueError: One does not fit, with its name.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: give a torch.nn.Module.")
    check_base(base)
    check_process_group(process_group)
    for name, value in chosen.items():
        if value not in _CHOICES[name]:
            raise ValueError(f"{name}={value!r}: choose one of {_CHOICES[name]}.")
    for name, given, kind in (("recipe", recipe, Recipe), ("subspace", subspace, Subspace)):
        if given is not None and not isinstance(given, kind):
            raise ValueError(
                f"{name} is a {type(given).__name__}: give lq.optimizer.{kind.__name__}(...)."
            )
    _check_used(subspace, chosen)
    if not isinstance(spread, Integral) or spread < 1:
        raise ValueError(f"spread is {spread!r}: give a whole number of steps, at least 1.")
    if not (isinstance(kl_limit, Real) and float(kl_limit) > 0):
        raise ValueError(f"kl_limit is {kl_limit!r}: give a number > 0.")
    if not isinstance(seed, Integral):
        raise ValueError(f"seed is {seed!r}: give a whole number.")
    if not (callable(refresh_every) or isinstance(refresh_every, Integral)):
        raise ValueError(
            f"refresh_every is {refresh_every!r}: give a whole number of steps, or a function of "
            "the step such as lq.optimizer.annealed(...)."
        )
    check_period(refresh_every)


def _check_used(subspace: Any, chosen: Mapping[str, str]) -> None:
    """Nothing was asked for that a step of this kind has no use for."""
    if chosen["step"] == "base" and subspace is not None:
        raise ValueError("subspace goes with step='subspace': give both or neither.")
    if chosen["step"] == "subspace":
        for name, only in (("graft", "layer"), ("precondition", "gradient")):
            if chosen[name] != only:
                raise ValueError(
                    f"{name}={chosen[name]!r} goes with step='base': a subspace step has its "
                    f"length from the model. Leave {name} out."
                )
