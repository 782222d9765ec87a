"""An LLQR optimizer as plain tensors and numbers, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .bookkeeping import Counts
from .subspace import SubspaceState

if TYPE_CHECKING:
    from .llqr import LLQR

VERSION = 1
_SCHEDULE = ("due", "start", "turn", "done")


def save(optimizer: LLQR) -> dict[str, Any]:
    """All that is not the base optimizer's, by parameter name; safe for `weights_only=True`.

    Like any optimizer's, a state shares the tensors that it names.
    """
    state = optimizer._subspace.state
    return {
        "version": VERSION,
        "parameters": list(optimizer.structure.layout.names),
        "structure": optimizer.structure.state_dict(),
        "factors": dict(optimizer._refresher.mean.factors),
        "schedule": {name: getattr(optimizer._schedule, name) for name in _SCHEDULE},
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


def load(optimizer: LLQR, given: Mapping[str, Any], base: dict[str, Any]) -> None:
    """Restores `save` and the base optimizer's state.

    Raises:
        ValueError: It is of other parameters, another structure or another base optimizer;
            nothing has been changed then.
    """
    if given.get("version") != VERSION:
        raise ValueError(f"the state has version {given.get('version')}, this is {VERSION}.")
    names = list(optimizer.structure.layout.names)
    if list(given["parameters"]) != names:
        differ = sorted(set(given["parameters"]) ^ set(names))[:4]
        raise ValueError(f"the state is of other parameters ({differ or 'another order'}).")
    known = {field.name for field in fields(Counts)}
    if set(given["counts"]) != known or set(given["schedule"]) != set(_SCHEDULE):
        raise ValueError("the state's counts are of another version of this library.")
    counts = Counts(**given["counts"])
    subspace = _subspace(optimizer, given["subspace"])
    proto = optimizer.structure._proto
    factors = {name: t.detach().to(proto).clone() for name, t in given["factors"].items()}
    signs = given["generator"].cpu()
    old = optimizer.structure.clone()
    optimizer.structure.load_state_dict(given["structure"])
    try:
        optimizer.base.load_state_dict(base)
    except BaseException:
        optimizer.structure.assign_(old)
        raise
    optimizer._refresher.mean.factors = factors
    for name in _SCHEDULE:
        setattr(optimizer._schedule, name, given["schedule"][name])
    optimizer.counts = counts
    optimizer.generator.set_state(signs)
    optimizer._subspace.state = subspace


def _subspace(optimizer: LLQR, given: Mapping[str, Any]) -> SubspaceState:
    state = SubspaceState.start(optimizer._subspace.options)
    state.rule = replace(state.rule, damping=given["damping"], ratio=given["ratio"])
    state.count = given["count"]
    state.steps = [_flat(optimizer, step) for step in given["steps"]]
    state.mean = None if given["mean"] is None else _flat(optimizer, given["mean"])
    return state


def _named(optimizer: LLQR, flat: Tensor) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in optimizer.structure.layout.unflatten(flat).items()}


def _flat(optimizer: LLQR, parts: Mapping[str, Tensor]) -> Tensor:
    device = optimizer.structure.device
    return optimizer.structure.layout.flatten({n: t.to(device) for n, t in parts.items()})
