"""From what a user writes as damping to the control cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from linear_operator import LinearOperator
from linear_operator.operators import ConstantDiagLinearOperator, DiagLinearOperator
from torch import Tensor

from .operators import ControlCost, System
from .operators.apply import checked_operator


def control_cost(damping: Any, system: System, names: Sequence[str] | None) -> ControlCost:
    """R from a number, one number or operator per layer, or one operator (P, P).

    Args:
        damping: The user's.
        system: For its blocks and which layer owns them.
        names: Layer names, for a mapping.

    Raises:
        ValueError: A number is negative or not finite, a size does not fit, a layer is missing
            or unknown.
    """
    sizes = system.sizes
    if isinstance(damping, Real):
        return ControlCost.scalar(_number(float(damping), "damping"), sizes)
    if isinstance(damping, LinearOperator | Tensor):
        if isinstance(damping, Tensor) and damping.numel() == 1:
            return ControlCost.scalar(_number(float(damping), "damping"), sizes)
        whole = _operator(damping, sum(sizes), "damping", system.proto)
        if isinstance(whole, DiagLinearOperator | ConstantDiagLinearOperator):
            # A diagonal couples no layers.
            parts = whole.diagonal().split(list(sizes))
            return ControlCost(
                tuple(((i,), DiagLinearOperator(part)) for i, part in enumerate(parts)), sizes
            )
        return ControlCost(((tuple(range(len(sizes))), whole),), sizes)
    if isinstance(damping, Mapping):
        damping = _by_layer(damping, system, names)
    if not isinstance(damping, Sequence) or isinstance(damping, str):
        damping = ()
    if len(damping) != system.horizon:
        raise ValueError(
            f"damping must be a number, an operator of shape ({sum(sizes)}, {sum(sizes)}), or one "
            f"number or operator for each of the {system.horizon} layers."
        )
    groups: list[tuple[tuple[int, ...], float | LinearOperator]] = []
    for t, (value, owned) in enumerate(zip(damping, system.owned, strict=True)):
        if not owned:
            continue
        what = f"damping of layer {t}"
        if isinstance(value, Real) or (isinstance(value, Tensor) and value.ndim == 0):
            groups.append((owned, _number(float(value), what)))
        else:
            size = sum(sizes[i] for i in owned)
            groups.append((owned, _operator(value, size, what, system.proto)))
    return ControlCost(tuple(groups), sizes)


def _by_layer(damping: Mapping[Any, Any], system: System, names: Sequence[str] | None) -> list[Any]:
    if names is None:
        raise ValueError("damping by layer name goes with a network: give a sequence instead.")
    unknown = [name for name in damping if name not in names]
    needed = [name for name, owned in zip(names, system.owned, strict=True) if owned]
    missing = [name for name in needed if name not in damping]
    if unknown or missing:
        what = f"'{unknown[0]}' is no layer" if unknown else f"layer '{missing[0]}' is missing"
        raise ValueError(f"in damping, {what}: the layers with parameters are {needed}.")
    return [damping.get(name, 0.0) for name in names]


def _number(value: float, what: str) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(
            f"{what} is {value}: give a finite number >= 0 (for a concave direction, use "
            "method='cg' with a trust-region radius instead)."
        )
    return float(value)


def _operator(value: Any, size: int, what: str, proto: Tensor) -> LinearOperator:
    operator = checked_operator(value, (size, size), what, proto, symmetric=True)
    if isinstance(operator, DiagLinearOperator | ConstantDiagLinearOperator):
        diagonal = operator.diagonal()
        if not bool((diagonal.isfinite() & (diagonal >= 0)).all()):
            raise ValueError(f"{what} has a diagonal entry that is negative, NaN or infinite.")
    return operator
