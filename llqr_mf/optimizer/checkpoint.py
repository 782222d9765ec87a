"""An LLQR optimizer as plain tensors and numbers, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .subspace import SubspaceState

if TYPE_CHECKING:
    from .llqr import LLQR

VERSION = 1


def save(optimizer: LLQR) -> dict[str, Any]:
    """All that is not the base optimizer's, by parameter name; safe for `weights_only=True`."""
    state = optimizer._subspace.state
    return {
        "version": VERSION,
        "parameters": list(optimizer.structure.layout.names),
        "structure": optimizer.structure.state_dict(),
        "factors": dict(optimizer.refresher.factors),
        "refresh_count": optimizer.refresher.count,
        "next_refresh": optimizer._next_refresh,
        "spread_done": optimizer._spread_done,
        "counts": asdict(optimizer.counts),
        "generator": optimizer.generator.get_state(),
        "damping": state.rule.damping,
        "ratio": state.rule.ratio,
        "step_count": state.count,
        "steps": [_named(optimizer, step) for step in state.steps],
        "mean": None if state.mean is None else _named(optimizer, state.mean),
    }


def load(optimizer: LLQR, given: Mapping[str, Any], base: dict[str, Any]) -> None:
    """Restores `save` and the base optimizer's state.

    Raises:
        ValueError: It is of other parameters or another structure; nothing has been changed then.
    """
    if given.get("version") != VERSION:
        raise ValueError(f"the state has version {given.get('version')}, this is {VERSION}.")
    names = list(optimizer.structure.layout.names)
    if list(given["parameters"]) != names:
        differ = sorted(set(given["parameters"]) ^ set(names))[:4]
        raise ValueError(f"the state is of other parameters ({differ or 'another order'}).")
    old = optimizer.structure.clone()
    optimizer.structure.load_state_dict(given["structure"])
    try:
        optimizer.base.load_state_dict(base)
    except BaseException:
        optimizer.structure.assign_(old)
        raise
    proto = optimizer.structure._proto
    optimizer.refresher.factors = {n: t.to(proto) for n, t in given["factors"].items()}
    optimizer.refresher.count = given["refresh_count"]
    optimizer._next_refresh, optimizer._spread_done = given["next_refresh"], given["spread_done"]
    optimizer.counts = type(optimizer.counts)(**given["counts"])
    optimizer.generator.set_state(given["generator"].cpu())
    state = SubspaceState.start(optimizer._subspace.options)
    state.rule = replace(state.rule, damping=given["damping"], ratio=given["ratio"])
    state.count = given["step_count"]
    state.steps = [_flat(optimizer, step) for step in given["steps"]]
    state.mean = None if given["mean"] is None else _flat(optimizer, given["mean"])
    optimizer._subspace.state = state


def _named(optimizer: LLQR, flat: Tensor) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in optimizer.structure.layout.unflatten(flat).items()}


def _flat(optimizer: LLQR, parts: Mapping[str, Tensor]) -> Tensor:
    device = optimizer.structure.device
    return optimizer.structure.layout.flatten({n: t.to(device) for n, t in parts.items()})
