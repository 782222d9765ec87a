"""A layer's share of K = J R^{-1} J': costates are kept, and met again as controls."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..operators.control_cost import ControlCost
from ..operators.stage import respond_by_controls, squares_of_controls
from ..operators.tangent import Tangent, add

if TYPE_CHECKING:
    from .stage import NetworkStage

Arrived = dict[int, list[Tensor | None]]
"""Cotangents at the outputs of the calls that read a parameter, by the call's place."""


def keep_costates(
    stage: NetworkStage, costate: Tangent, inverse: ControlCost, *, need_state: bool
) -> tuple[Tangent, Any]:
    """A' p, and what arrived where parameters are read (or p itself, if that will not do)."""
    own = set(stage.control_ids)
    if not own:
        return _state_only(stage, costate, need_state), {}
    if inverse.block_values is None or not _read_once(stage):
        return _state_only(stage, costate, need_state), costate
    leads = stage._wanted(need_state, True)
    sums = {i: p for i, p in zip(stage.next_ids, costate, strict=True) if p is not None}
    arrived: Arrived = {}
    nodes = stage.linearized()
    for place in range(len(nodes) - 1, -1, -1):
        bound = nodes[place]
        cotangents = [sums.pop(i, None) for i in bound.outputs]
        if all(c is None for c in cotangents):
            continue
        if own & set(bound.inputs):
            arrived[place] = cotangents
        needed = [i in leads and i not in own for i in bound.inputs]
        if not any(needed):
            continue
        pulled = bound.node.pull_all(cotangents, needed, [None] * len(needed))
        for i, part in zip(bound.inputs, pulled, strict=True):
            if part is not None and i in leads and i not in own:
                total = add(sums.get(i), part)
                assert total is not None
                sums[i] = total
    return tuple(sums.get(i) if need_state else None for i in stage.state_ids), arrived


def respond(stage: NetworkStage, x: Tangent, record: Any, inverse: ControlCost) -> Tangent:
    """A x + B R^{-1} B' p, call by call."""
    if isinstance(record, tuple):
        return respond_by_controls(stage, x, record, inverse)
    values = inverse.block_values or ()
    scales = dict(zip(stage.control_ids, values, strict=True)) if record else {}
    moved = {i: v for i, v in zip(stage.state_ids, x, strict=True) if v is not None}
    for place, bound in enumerate(stage.linearized()):
        tangents = [moved.get(i) for i in bound.inputs]
        if place in record:
            mine = [scales.get(i) for i in bound.inputs]
            results = bound.node.respond_all(tangents, record[place], mine)
        elif any(t is not None for t in tangents):
            results = bound.node.push_all(tangents)
        else:
            continue
        for i, y in zip(bound.outputs, results, strict=True):
            if y is not None:
                moved[i] = y
    return tuple(moved.get(i) for i in stage.next_ids)


def control_squares(stage: NetworkStage, record: Any, inverse: ControlCost, k: int) -> Tensor:
    """|B' p|^2 and p'B R^{-1} B' p of each column, call by call; (2, k)."""
    if isinstance(record, tuple):
        return squares_of_controls(stage, record, inverse, k)
    scales = dict(zip(stage.control_ids, inverse.block_values or (), strict=True)) if record else {}
    nodes = stage.linearized() if record else ()
    made = [torch.zeros(2, k, dtype=torch.float64, device=stage.proto.device)]
    for place, cotangents in record.items():
        for index, i in enumerate(nodes[place].inputs):
            if i in scales:
                squares = nodes[place].node.pulled_squares(cotangents, index)
                made.append(torch.stack([squares, squares * scales[i]]))
    return torch.stack(made).sum(0)


def _state_only(stage: NetworkStage, costate: Tangent, need_state: bool) -> Tangent:
    if not need_state:
        return tuple(None for _ in stage.state_ids)
    return stage.backward(costate, None, need_control=False)[0]


def _read_once(stage: NetworkStage) -> bool:
    """Whether every control is read by one call alone, here and in later layers."""
    reads = Counter(i for bound in stage.nodes for i in bound.inputs)
    return all(reads[i] <= 1 and i not in stage.next_ids for i in stage.control_ids)
