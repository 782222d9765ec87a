"""The dual's Gram matrix in closed form: one backward pass per output, and products of samples."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .network.linearize import BoundNode
from .operators.output_curvature import OutputCurvature
from .operators.tangent import add
from .problem import LQRProblem

PASS = 16
"""Output columns per backward pass."""


def closed_form_gram(problem: LQRProblem) -> Tensor | None:
    """G = L'J R^{-1} J'L of a network, or None where it has no closed form.

    Column j of every sample's factor is pulled back for all samples at once, which is right when
    samples do not interact. Each parametrised call then gives the Gram matrix of its per-sample
    gradients; a Linear layer's costs N r (N r + width) and never sees its weight.

    Args:
        problem: From a network, with a terminal cost that has a factor, and numbers as damping.

    Returns:
        Tensor (r N, r N), index j N + n; None if samples interact (train-mode BatchNorm), a
        parameter is read twice, damping is an operator, or a call's gradients are too large.
    """
    origin, damping = problem.origin, problem.system.control_cost.block_values
    curvature = terminal_factor(problem)
    if origin is None or damping is None or curvature is None:
        return None
    if min(damping) <= 0 or not samples_are_apart(problem):
        return None
    rank, samples = curvature.rank, curvature.samples
    assert rank is not None
    shape = origin.outputs.shape
    with torch.no_grad():
        columns = [
            curvature.factor_columns(a, min(a + PASS, rank)).reshape(-1, *shape)
            for a in range(0, rank, PASS)
        ]
        deltas = torch.cat(columns)
        gram = deltas.new_zeros(rank * samples, rank * samples)
        sums: dict[int, Tensor] = {origin.linearization.output: deltas}
        moving = _moving(problem)
        for bound in reversed(list(_nodes(problem))):
            cotangents = [sums.pop(i, None) for i in bound.outputs]
            if all(c is None for c in cotangents):
                continue
            for index, i in enumerate(bound.inputs):
                if i >= len(damping):
                    continue
                part = _parameter_gram(bound, cotangents, index)
                if part is None:
                    return None
                gram.add_(part, alpha=1 / damping[i])
            needed = [i >= len(damping) and i in moving for i in bound.inputs]
            pulled = bound.node.pull_all(cotangents, needed, [None] * len(needed))
            for i, piece in zip(bound.inputs, pulled, strict=True):
                total = add(sums.get(i), piece)
                if total is not None:
                    sums[i] = total
    return gram


def terminal_factor(problem: LQRProblem) -> OutputCurvature | None:
    """Q_T where it is the only cost and has a factor."""
    system = problem.system
    costs = system.state_costs[-1]
    if system.curved or len(costs) != 1 or costs[0].component is not None:
        return None
    curvature = costs[0].operator
    if not isinstance(curvature, OutputCurvature) or curvature.rank is None:
        return None
    return curvature


def samples_are_apart(problem: LQRProblem) -> bool:
    """Whether no call mixes samples, so that a column can be pulled back for all at once.

    Rules say so of themselves; any other call is probed: even samples move and odd ones must not.
    A parameter read by two calls, or changed before it meets the batch, also counts as mixing.
    """
    origin = problem.origin
    assert origin is not None
    samples, parameters = len(origin.outputs), len(problem.system.blocks)
    batched = set(origin.linearization.inputs)
    read: set[int] = set()
    for bound in _nodes(problem):
        mine = [i for i in bound.inputs if i < parameters]
        others = [i for i in bound.inputs if i >= parameters]
        if read & set(mine) or len(set(mine)) < len(mine):
            return False
        read.update(mine)
        reads_tokens = not others and bound.node.per_sample
        if not others and not reads_tokens:
            continue
        if not set(others) <= batched or not _apart(problem, bound, samples):
            return False
        batched.update(bound.outputs)
    return origin.linearization.output in batched


def _nodes(problem: LQRProblem) -> Iterator[BoundNode]:
    assert problem.origin is not None
    return (bound for nodes in problem.origin.linearization.layers for bound in nodes)


def _apart(problem: LQRProblem, bound: BoundNode, samples: int) -> bool:
    assert problem.origin is not None
    shapes = problem.origin.linearization.shapes
    parameters = len(problem.system.blocks)
    leading = [shapes[i][:1] for i in (*bound.inputs, *bound.outputs) if i >= parameters]
    if any(size != (samples,) for size in leading):
        return False
    if bound.node.couples_batch is not None:
        return not bound.node.couples_batch
    proto = problem.system.proto
    tangents: list[Tensor | None] = []
    for i in bound.inputs:
        if i < parameters:
            tangents.append(None)
            continue
        moved = torch.arange(1, 1 + math.prod(shapes[i]), device=proto.device).to(proto.dtype)
        moved = (1.5 + moved.sin()).reshape(1, *shapes[i])
        moved[:, 1::2] = 0
        tangents.append(moved)
    with torch.no_grad():
        outputs = bound.node.push_all(tangents)
    return all(y is None or not bool(y[:, 1::2].any()) for y in outputs)


def _moving(problem: LQRProblem) -> set[int]:
    """Values that depend on a parameter, to which cotangents must be pulled."""
    moving = set(range(len(problem.system.blocks)))
    for bound in _nodes(problem):
        if moving & set(bound.inputs):
            moving.update(bound.outputs)
    return moving


def _parameter_gram(bound: BoundNode, cotangents: list[Tensor | None], index: int) -> Tensor | None:
    """The share of one input that is a parameter, without its damping."""
    if len(cotangents) != 1 or cotangents[0] is None:
        return None
    return bound.node.gram(cotangents[0], index)
