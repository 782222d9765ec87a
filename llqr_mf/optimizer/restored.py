"""A state that was read and checked, and not yet put anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..preconditioners.base import Structure
from ..preconditioners.direct_sum import leaves
from ..preconditioners.kronecker import Kronecker, factor_name
from ..preconditioners.saved import check_definite, check_tensor
from .bookkeeping import Counts
from .subspace import SubspaceState

if TYPE_CHECKING:
    from .llqr import LLQR

VERSION = 2
"""Of what `LLQR.state_dict` holds under "llqr"."""

SCHEDULE = ("due", "start", "turn", "done")
_PARTS = ("base", "parameters", "structure", "factors", "schedule", "counts", "generator")


@dataclass(frozen=True, eq=False)
class Restored:
    """What `read` found beside M.

    Args:
        factors: Mean Kronecker factors.
        schedule: Numbers of the schedule.
        counts: Counts.
        signs: The generator's state.
        subspace: What subspace steps remember.
    """

    factors: dict[str, Tensor]
    schedule: dict[str, int]
    counts: Counts
    signs: Tensor
    subspace: SubspaceState


@torch.no_grad()
def read(optimizer: LLQR, given: Any) -> Restored:
    """Checks a state and makes what loading it takes; changes nothing.

    Raises:
        ValueError: Something about it is wrong, with its name.
    """
    if not isinstance(given, Mapping) or given.get("version") != VERSION:
        found = given.get("version") if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(
            f"the state has version {found}, this is {VERSION}: go on with the version of this "
            "library that saved it, or start M anew and load the rest into the `base`."
        )
    lacking = [name for name in (*_PARTS, "subspace") if name not in given]
    if lacking:
        raise ValueError(f"the state lacks {lacking}: give all that state_dict() returned.")
    base = type(optimizer.base).__name__
    if given["base"] != base:
        raise ValueError(
            f"the state is of LLQR over another base optimizer, {given['base']}, and this one is "
            f"over {base}: make LLQR over the same kind."
        )
    names = list(optimizer.structure.layout.names)
    if list(given["parameters"]) != names:
        differ = sorted(set(given["parameters"]) ^ set(names))[:4]
        raise ValueError(f"the state is of other parameters ({differ or 'another order'}).")
    known = {field.name for field in fields(Counts)}
    if set(given["counts"]) != known or set(given["schedule"]) != set(SCHEDULE):
        raise ValueError("the state's counts are of another version of this library.")
    counts = {name: n for name, n in given["counts"].items() if name != "reason"}
    for name, number in (*counts.items(), *given["schedule"].items()):
        _check_count(name, number)
    spread, turn = optimizer._schedule.spread, given["schedule"]["turn"]
    if turn >= spread:
        raise ValueError(
            f"the state is {turn} turns into a refresh and spread is {spread}: make LLQR with the "
            "spread that it was saved with."
        )
    optimizer.structure.check_state(given["structure"])
    return Restored(
        _factors(optimizer, given["factors"], given["schedule"]),
        {name: int(given["schedule"][name]) for name in SCHEDULE},
        Counts(**counts, reason=str(given["counts"]["reason"])),
        _signs(optimizer, given["generator"]),
        _subspace(optimizer, given["subspace"]),
    )


def factor_places(structure: Structure) -> dict[str, Tensor]:
    """Those tensors of M whose mean factors a running mean keeps, by name."""
    return {
        factor_name(site, side): part.tensors[factor_name(site, side)]
        for part in leaves(structure)
        if isinstance(part, Kronecker)
        for site in part.sites
        if len(site.sides) > 1
        for side in range(len(site.sides))
    }


def _check_count(name: str, number: Any) -> None:
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"'{name}' is {number!r} in the state, and no count: load another state.")


def _factors(optimizer: LLQR, given: Any, schedule: Mapping[str, int]) -> dict[str, Tensor]:
    places = factor_places(optimizer.structure)
    learned = optimizer._refresher.recipe.learn != "momentum" and any(schedule.values())
    none_yet = not given and not (learned and schedule["done"] + schedule["turn"])
    wanted = {} if none_yet else places
    if set(given) != set(wanted):
        raise ValueError(
            f"the factors of the state differ from this optimizer's "
            f"({sorted(set(given) ^ set(wanted))[:4]}): use the structure and recipe that it was "
            "saved with."
        )
    for name, held in wanted.items():
        check_tensor(name, given[name], held)
        # Sums in their own dtype leave semidefinite matrices with eigenvalues below zero.
        check_definite(name, given[name], torch.finfo(held.dtype).eps ** 0.5)
    proto = optimizer.structure._proto
    return {name: given[name].detach().to(proto).clone() for name in wanted}


def _signs(optimizer: LLQR, given: Any) -> Tensor:
    """The generator's state, tried on another generator."""
    try:
        signs: Tensor = given.cpu()
        torch.Generator(device=optimizer.generator.device).set_state(signs)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"'generator' is no state of a generator on {optimizer.generator.device} ({error}): "
            "load a state that was saved on the same kind of device."
        ) from error
    return signs


def _subspace(optimizer: LLQR, given: Mapping[str, Any]) -> SubspaceState:
    lacking = {"damping", "ratio", "count", "steps", "mean"} - set(given)
    if lacking:
        raise ValueError(f"'subspace' lacks {sorted(lacking)} in the state: give all of it.")
    damping, ratio = given["damping"], given["ratio"]
    numbers = isinstance(damping, Real) and isinstance(ratio, Real)
    if not (numbers and 0 < damping < math.inf):
        raise ValueError(
            f"the damping of the subspace is {damping!r} and its ratio {ratio!r} in the state: "
            "give a finite damping > 0 and a number."
        )
    _check_count("subspace count", given["count"])
    if given["mean"] is not None and not given["steps"]:
        raise ValueError("the subspace has a mean and no steps in the state: give all of it.")
    state = SubspaceState.start(optimizer._subspace.options)
    state.rule = replace(state.rule, damping=float(damping), ratio=float(ratio))
    state.count = int(given["count"])
    steps = enumerate(given["steps"])
    state.steps = [_flat(optimizer, step, f"subspace step {i}") for i, step in steps]
    if given["mean"] is not None:
        state.mean = _flat(optimizer, given["mean"], "subspace mean")
    return state


def _flat(optimizer: LLQR, parts: Mapping[str, Tensor], what: str) -> Tensor:
    M = optimizer.structure
    if set(parts) != set(M.layout.names):
        names = sorted(set(parts) ^ set(M.layout.names))[:4]
        raise ValueError(f"the {what} in the state is of other parameters ({names}).")
    for name, shape in zip(M.layout.names, M.layout.shapes, strict=True):
        check_tensor(f"{what}, {name}", parts[name], M._proto.new_empty(shape, device="meta"))
    return M.layout.flatten({n: parts[n].to(M._proto) for n in M.layout.names})
