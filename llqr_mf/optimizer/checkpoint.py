"""An LLQR optimizer as plain tensors and numbers, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Adafactor, Optimizer

from .by_parameter import pack, unpack
from .restored import SCHEDULE, VERSION, read

if TYPE_CHECKING:
    from .llqr import LLQR

KEY = "llqr"
"""Under what a state holds all that is not the base optimizer's."""


def save(optimizer: LLQR) -> dict[str, Any]:
    """All that is not the base optimizer's, by parameter name; safe for `weights_only=True`.

    Like any optimizer's, a state shares the tensors that it names.
    """
    state = optimizer._subspace.state
    return {
        "version": VERSION,
        "base": type(optimizer.base).__name__,
        "parameters": list(optimizer.structure.layout.names),
        "structure": optimizer.structure.state_dict(),
        "factors": dict(optimizer._refresher.mean.factors),
        "schedule": {name: getattr(optimizer._schedule, name) for name in SCHEDULE},
        "counts": asdict(optimizer.counts),
        "generator": optimizer.generator.get_state(),
        "subspace": {
            "damping": state.rule.damping,
            "ratio": state.rule.ratio,
            "count": state.count,
            "steps": [_named(optimizer, step) for step in state.steps],
            "mean": None if state.mean is None else _named(optimizer, state.mean),
        },
    }


def save_by_parameter(optimizer: LLQR) -> dict[str, Any]:
    """The whole state as one of a plain optimizer, in `state` and `param_groups` alone.

    What is not the base optimizer's stands in the state of the first parameter. Every other that
    is trained has an entry too, since `torch.distributed.checkpoint` asks for all or none.
    """
    made = optimizer.base.state_dict()
    parameters = [p for group in optimizer.base.param_groups for p in group["params"]]
    numbers = [n for group in made["param_groups"] for n in group["params"]]
    trained = [n for n, p in zip(numbers, parameters, strict=True) if p.requires_grad]
    state = {number: dict(made["state"].get(number, {})) for number in trained}
    state[trained[0]][KEY] = pack(optimizer, save(optimizer))
    return {**made, "state": {**made["state"], **state}}


def load(optimizer: LLQR, given: Mapping[str, Any]) -> None:
    """Restores a state of either kind: all of it, or nothing.

    Raises:
        ValueError: Something about it is wrong, with its name; nothing has been changed then.
    """
    base = {key: value for key, value in given.items() if key != KEY}
    for key in ("state", "param_groups"):
        if key not in base:
            raise ValueError(f"the state has no '{key}': give all that state_dict() returned.")
    own = given.get(KEY)
    if own is None:
        own, base["state"] = _taken_out(optimizer, base["state"])
    restored = read(optimizer, own)
    _check_shapes(optimizer, base)
    read_by_base = [set(optimizer.base.defaults) & set(g) for g in optimizer.base.param_groups]
    with _all_or_nothing(optimizer.base):
        optimizer.base.load_state_dict(base)
        _check_groups(optimizer.base, read_by_base)
    # Nothing from here on can fail.
    with torch.no_grad():
        for name, tensor in optimizer.structure.tensors.items():
            tensor.copy_(own["structure"]["tensors"][name])
    optimizer._refresher.mean.factors = restored.factors
    for name, number in restored.schedule.items():
        setattr(optimizer._schedule, name, number)
    optimizer.counts = restored.counts
    optimizer.generator.set_state(restored.signs)
    optimizer._subspace.state = restored.subspace


def _taken_out(optimizer: LLQR, state: Mapping[Any, Any]) -> tuple[dict[str, Any], dict[Any, Any]]:
    """What `save_by_parameter` put into the base's state, and that state without it."""
    packed = [entry[KEY] for entry in state.values() if isinstance(entry, Mapping) and KEY in entry]
    if len(packed) != 1:
        raise ValueError(
            "this is no state of an LLQR optimizer: load it into its `base`, or give what "
            "LLQR.state_dict() returned, or torch.distributed.checkpoint's functions for it."
        )
    kept = {
        number: {key: value for key, value in entry.items() if key != KEY}
        for number, entry in state.items()
    }
    return unpack(optimizer, packed[0]), {number: entry for number, entry in kept.items() if entry}


# ---- the base optimizer's state, which torch loads without asking


def _check_shapes(optimizer: LLQR, given: Mapping[str, Any]) -> None:
    """Whether the tensors of torch's own optimizers have their parameters' shapes.

    Raises:
        ValueError: One has not.
    """
    base = optimizer.base
    known = type(base).__module__.startswith("torch.optim") and not isinstance(base, Adafactor)
    parameters = [p for group in base.param_groups for p in group["params"]]
    numbers = [n for group in given["param_groups"] for n in group.get("params", [])]
    if not known or len(numbers) != len(parameters):
        return
    for number, p in zip(numbers, parameters, strict=True):
        for key, value in given["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.ndim and value.shape != p.shape:
                name = optimizer._wrapped.names.get(id(p), str(number))
                raise ValueError(
                    f"'{key}' of '{name}' has shape {tuple(value.shape)} in the base optimizer's "
                    f"state and the parameter {tuple(p.shape)}: load a state of this model."
                )


def _check_groups(base: Optimizer, wanted: Sequence[set[str]]) -> None:
    """Whether the groups still have all that the base optimizer reads.

    Raises:
        ValueError: They have not.
    """
    for i, (group, keys) in enumerate(zip(base.param_groups, wanted, strict=True)):
        lacking = sorted(keys - set(group))
        if lacking:
            raise ValueError(
                f"param_groups[{i}] of the state lacks {lacking}, which {type(base).__name__} "
                "reads: it is of another base optimizer. Make LLQR over one of that kind."
            )


@contextmanager
def _all_or_nothing(base: Optimizer) -> Iterator[None]:
    """On an exception the base is as it was; torch replaces its state and groups by new ones."""
    held = dict(base.__dict__)
    try:
        yield
    except BaseException as error:
        base.__dict__.clear()
        base.__dict__.update(held)
        if isinstance(error, Exception) and not isinstance(error, ValueError):
            raise ValueError(
                f"the base optimizer, a {type(base).__name__}, cannot load its part of the state "
                f"({type(error).__name__}: {error}): give a state of the same kind of optimizer."
            ) from error
        raise


def _named(optimizer: LLQR, flat: Tensor) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in optimizer.structure.layout.unflatten(flat).items()}
