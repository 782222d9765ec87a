"""The state of an LLQR optimizer in the form that `torch.distributed.checkpoint` carries.

Its functions keep of a `state_dict` nothing but `state` and `param_groups`, take only tensors and
numbers where they flatten it, and load in place into the state of a fresh optimizer. So here all is
tensors, as many and as large from the first step on, and one of bytes that spell out the rest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .restored import factor_places

if TYPE_CHECKING:
    from .llqr import LLQR


def asked_by_torch() -> bool:
    """Whether the caller's caller is one of those functions.

    They have no other way to be told apart, and everyone else is better served by a base
    optimizer's state as it is, with the rest beside it.
    """
    return sys._getframe(2).f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict"


def only_asks_for_state(base: Optimizer) -> bool:
    """Whether a step is one by which those functions have an optimizer make its state.

    They take it where there is none, with gradients of zero and rates of zero.
    """
    if base.state or any(float(group.get("lr", 1)) != 0 for group in base.param_groups):
        return False
    trained = [p for group in base.param_groups for p in group["params"] if p.requires_grad]
    return all(p.grad is not None and not bool(p.grad.any()) for p in trained)


ROOM = 2**14
"""Bytes for what changes in training: counts, and why the last step was skipped."""


class SeenState(dict[Any, dict[str, Any]]):
    """What a base optimizer holds for every parameter, and the name of what LLQR adds.

    Unflattening looks up what to expect here. As false as the state itself is.
    """

    def __init__(self, optimizer: LLQR, key: str) -> None:
        held = optimizer.base.state
        parameters = [p for group in optimizer.base.param_groups for p in group["params"]]
        super().__init__({p: dict(held.get(p, {})) for p in parameters})
        self._any = len(held) > 0
        first = next(p for p in parameters if p.requires_grad)
        self[first][key] = None

    def __bool__(self) -> bool:
        """Whether the base optimizer has a state."""
        return self._any


def pack(optimizer: LLQR, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A state of `save` as {"tensors": {"0": ..., ...}, "rest": bytes}."""
    subspace = saved["subspace"]
    lasting = {
        **{name: saved[name] for name in ("version", "base", "parameters")},
        "structure": {k: v for k, v in saved["structure"].items() if k != "tensors"},
        "names": list(saved["structure"]["tensors"]),
        "generator": saved["generator"].cpu().numpy().tobytes().hex(),
    }
    passing = {
        **{name: saved[name] for name in ("schedule", "counts")},
        "factors": bool(saved["factors"]),
        "subspace": {k: subspace[k] for k in ("damping", "ratio", "count")},
        "steps": len(subspace["steps"]),
        "mean": subspace["mean"] is not None,
    }
    size = len(json.dumps(lasting)) + ROOM
    spelled = json.dumps({**lasting, **passing}).encode().ljust(size)
    tensors = {str(i): tensor for i, tensor in enumerate(_tensors(optimizer, saved))}
    return {"tensors": tensors, "rest": _bytes(spelled).to(optimizer.structure.device)}


def unpack(optimizer: LLQR, packed: Any) -> dict[str, Any]:
    """What `pack` was given.

    Raises:
        ValueError: It is no such thing, or tensors are missing.
    """
    try:
        rest, tensors = json.loads(packed["rest"].cpu().numpy().tobytes()), packed["tensors"]
        names, parameters = rest.pop("names"), rest["parameters"]
        factors, steps, mean = rest.pop("factors"), rest.pop("steps"), rest.pop("mean")
        found = iter([tensors[str(i)] for i in range(len(tensors))])
        rest["structure"]["tensors"] = {name: next(found) for name in names}
        held = {name: next(found) for name in factor_places(optimizer.structure)}
        rest["factors"] = held if factors else {}
        rest["subspace"]["steps"] = [{n: next(found) for n in parameters} for _ in range(steps)]
        # Places without a step come before the mean.
        left = list(found)
        own = left[len(left) - len(parameters) :] if mean else []
        rest["subspace"]["mean"] = dict(zip(parameters, own, strict=True)) if mean else None
        rest["generator"] = _bytes(bytes.fromhex(rest["generator"]))
    except (AttributeError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise ValueError(
            f"the state of LLQR in the base's state is incomplete ({type(error).__name__}: "
            f"{error}): save and load it with a model, structure and options that are the same."
        ) from error
    return rest


def _bytes(spelled: bytes) -> Tensor:
    return torch.frombuffer(bytearray(spelled), dtype=torch.uint8)


def _tensors(optimizer: LLQR, saved: Mapping[str, Any]) -> Iterator[Tensor]:
    """M, mean factors, last steps and their mean; zeros for what there is not yet."""
    yield from saved["structure"]["tensors"].values()
    for name, place in factor_places(optimizer.structure).items():
        yield saved["factors"].get(name, torch.zeros_like(place))
    subspace, options = saved["subspace"], optimizer._subspace.options
    used = optimizer._mode == "subspace"
    steps = max(options.remembered if used else 0, len(subspace["steps"]))
    mean = subspace["mean"] is not None or (used and options.averaging > 0)
    layout, proto = optimizer.structure.layout, optimizer.structure._proto

    def empty() -> dict[str, Tensor]:
        """Memory of its own, since a checkpoint is read into it."""
        return layout.unflatten(proto.new_zeros(sum(layout.sizes)))

    held = subspace["steps"]
    for i in range(steps):
        yield from (held[i] if i < len(held) else empty()).values()
    if mean:
        yield from (subspace["mean"] or empty()).values()
