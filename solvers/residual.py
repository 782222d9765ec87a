"""The true residual of a step, layer by layer: no second vector of the controls' size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators.fresh import fresh_rows
from ..operators.system import System
from ..operators.tangent import Tangent, from_rows, size_of, to_rows
from .dots import row_dots


@dataclass(frozen=True)
class Measured:
    """What one rollout of a step and one costate sweep say of it.

    Args:
        residual: |H u + g| (less R times the anchor).
        decrease: -(g'u + 1/2 u'H u).
        state: x_T = J u, rows (1, n_T).
    """

    residual: float
    decrease: float
    state: Tensor


def can_measure(system: System) -> bool:
    """Whether the only cost beside R is the terminal one, and R is made of numbers."""
    return not system.curved and system.control_cost.block_values is not None


def measure(system: System, u: Tensor, q: Tensor, anchor: Tensor | None = None) -> Measured:
    """H u + g - R anchor = J'(Q J u + q) + R (u - anchor), norms only.

    Costs a rollout and a costate sweep; holds one layer's controls.

    Args:
        system: One for which `can_measure` holds.
        u: The step, rows (1, P).
        q: Gradient at the last state, rows (1, n_T); g = J'q.
        anchor: What R pulls to in place of zero, rows (1, P).
    """
    horizon = system.horizon
    shapes = system.state_shapes(horizon)
    state = to_rows(system.rollout(u).final, shapes, system.proto, 1)
    bent: Tangent = from_rows(state, shapes)
    for cost in system.state_costs[horizon]:
        bent = cost.product(bent, shapes)
    curved = to_rows(bent, shapes, system.proto, 1)
    largest = max(size_of(stage.controls) for stage in system.stages)
    scratch = fresh_rows(u, 1, largest)[0]
    views = system.split_control(u)
    anchors = None if anchor is None else system.split_control(anchor)
    values = system.control_cost.block_values
    assert values is not None
    left, slope = torch.zeros(2, 1, dtype=torch.float64, device=u.device).unbind()
    for owned, parts in _sweep(system, curved + q, scratch):
        for i, part in zip(owned, parts, strict=True):
            part.add_(views[i], alpha=values[i])
            slope = slope + _dot(views[i], part)
            if anchors is not None:
                part.add_(anchors[i], alpha=-values[i])
            left = left + _dot(part, part)
    rising = row_dots(state, q)
    # u'H u = u'(H u + g) - g'u, and g'u = q'J u.
    decrease = -(rising + (slope - rising) / 2)
    numbers = torch.cat([left.sqrt(), decrease]).tolist()
    return Measured(numbers[0], numbers[1], state)


def _sweep(
    system: System, final: Tensor, scratch: Tensor
) -> Iterator[tuple[tuple[int, ...], list[Tensor]]]:
    """Pairs (blocks, their B_t' p_{t+1}) from the last stage to the first, in one scratch."""
    p: Tangent = from_rows(final, system.state_shapes(system.horizon))
    for t in range(system.horizon - 1, -1, -1):
        stage, owned = system.stages[t], system.owned[t]
        sizes = [system.sizes[i] for i in owned]
        pieces = scratch[: sum(sizes)].split(sizes) if sizes else ()
        out = [piece.reshape(1, *system.blocks[i]) for i, piece in zip(owned, pieces, strict=True)]
        p, _ = stage.backward(p, None, need_state=t > 0, out=out)
        yield owned, out


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return row_dots(a.reshape(1, -1), b.reshape(1, -1))
