"""The linear-quadratic system: the two sweeps that every product is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .control_cost import ControlCost
from .fresh import fresh_rows
from .stage import Look, Stage, StateCost
from .tangent import Shape, Tangent, add_tangents, is_plain, size_of, to_rows

CPU_PASS_BYTES = 2**24
"""Bytes of the largest tangent of one pass."""

GPU_PASS_BYTES = 2**29
"""The same on an accelerator, where folding pays longer."""


@dataclass(frozen=True)
class Trajectory:
    """What a rollout leaves for the adjoint sweep.

    Args:
        columns: k.
        states: x_t where a state cost needs it, else None; the last is always kept.
        records: Each stage's record.
    """

    columns: int
    states: tuple[Tangent | None, ...]
    records: tuple[Any, ...]

    @property
    def final(self) -> Tangent:
        """x_T."""
        assert self.states[-1] is not None
        return self.states[-1]


@dataclass(frozen=True)
class System:
    """Stages, costs and the layout of the flat control.

    Args:
        stages: T stages.
        state_costs: T + 1 tuples of costs on the states.
        control_cost: R.
        blocks: Shape of each control block, in flat order.
        owned: For every stage, the ids of the blocks that enter there.
        proto: Carries dtype and device.
        affine: f_t of every stage (no column axis) or empty.
    """

    stages: tuple[Stage, ...]
    state_costs: tuple[tuple[StateCost, ...], ...]
    control_cost: ControlCost
    blocks: tuple[Shape, ...]
    owned: tuple[tuple[int, ...], ...]
    proto: Tensor
    affine: tuple[Tensor | None, ...] = ()

    @property
    def horizon(self) -> int:
        """T."""
        return len(self.stages)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Length of every block."""
        return tuple(math.prod(shape) for shape in self.blocks)

    @property
    def control_size(self) -> int:
        """P, the length of the flat control."""
        return sum(self.sizes)

    @property
    def output_size(self) -> int:
        """n_T, the length of the last state."""
        return size_of(self.state_shapes(self.horizon))

    @property
    def largest_block(self) -> int:
        """The largest side of a dense A_t or B_t."""
        return max(
            max(size_of(s.state), size_of(s.next_state), size_of(s.controls)) for s in self.stages
        )

    def state_shapes(self, t: int) -> tuple[Shape, ...]:
        """Shapes of the components of x_t, t = 0..T."""
        return self.stages[t].state if t < self.horizon else self.stages[-1].next_state

    @property
    def columns_per_pass(self) -> int:
        """Columns whose largest tangent stays within `PASS_BYTES`.

        More in one pass no longer saves time: on a CPU larger tangents leave the cache and the
        allocator's reach.
        """
        largest = max(size_of(self.state_shapes(t)) for t in range(self.horizon + 1))
        budget = CPU_PASS_BYTES if self.proto.device.type == "cpu" else GPU_PASS_BYTES
        return max(1, budget // max(1, largest * self.proto.element_size()))

    @property
    def curved(self) -> bool:
        """Whether any cost beside the terminal one and R is present."""
        return any(stage.curved for stage in self.stages) or any(self.state_costs[:-1])

    def split_control(self, u: Tensor) -> list[Tensor]:
        """Views of the blocks of the rows (k, P)."""
        offset, views = 0, []
        for shape, size in zip(self.blocks, self.sizes, strict=True):
            views.append(u[:, offset : offset + size].reshape(len(u), *shape))
            offset += size
        return views

    def rollout(
        self,
        u: Tensor | None,
        x0: Tangent | None = None,
        *,
        with_affine: bool = False,
        columns: int = 1,
    ) -> Trajectory:
        """x_{t+1} = A_t x_t + B_t u_t (+ f_t), for k columns at once.

        Args:
            u: Controls, shape (k, P), or None for zero.
            x0: First state, or None for zero.
            with_affine: Whether f_t is added.
            columns: k, used when u and x0 do not tell.
        """
        views = None if u is None else self.split_control(u)
        columns = _columns(u, x0, columns)
        return self._roll(views, x0, with_affine=with_affine, columns=columns)

    def _roll(
        self,
        views: Sequence[Tensor | None] | None,
        x0: Tangent | None,
        *,
        with_affine: bool,
        columns: int,
    ) -> Trajectory:
        x = tuple(None for _ in self.state_shapes(0)) if x0 is None else x0
        states: list[Tangent | None] = []
        records = []
        for t, stage in enumerate(self.stages):
            states.append(x if self.state_costs[t] else None)
            controls = tuple(None if views is None else views[i] for i in self.owned[t])
            x, record = stage.forward(x, controls)
            if with_affine and self.affine and self.affine[t] is not None:
                shift: Tangent = (self.affine[t].expand(columns, -1),)  # type: ignore[union-attr]
                x = add_tangents(x, shift)
            records.append(record)
        return Trajectory(columns, (*states, x), tuple(records))

    def adjoint(
        self,
        final: Tangent,
        trajectory: Trajectory | None = None,
        *,
        linear: Sequence[Tangent] | None = None,
        need_state: bool = False,
        need_control: bool = True,
        wanted: Sequence[int] | None = None,
        out: Tensor | None = None,
        columns: int = 1,
    ) -> tuple[Tangent, Tensor | None]:
        """The costate sweep: p_t = A_t' p_{t+1} + Q_t x_t + S_t' u_t (+ q_t), and all B_t' p + ...

        Args:
            final: p_T, to which the terminal costs' Q x_T are added if there is a trajectory.
            trajectory: Whose curvature is added; None for the plain transposed products.
            linear: q_0..q_T, added when given.
            need_state: Whether p_0 is wanted.
            need_control: Whether the control part is wanted.
            wanted: Ids of the blocks that make up the control part, None for all. Without
                `need_state` the sweep ends where the last of them is known. Takes no `out`.
            out: Rows (k, P) to be overwritten with the control part, without R u.
            columns: k, used when everything is zero.

        Returns:
            p_0 (or Nones) and the control part, shape (k, P).
        """
        p = final
        T = self.horizon
        chosen = range(len(self.blocks)) if wanted is None else wanted
        there = [bool(set(chosen) & set(owned)) for owned in self.owned]
        end = there.index(True) if wanted and not need_state else 0
        k = columns if trajectory is None else trajectory.columns
        views = None if out is None else self.split_control(out)
        parts: list[Tensor | None] = [None] * len(self.blocks)
        for t in range(T, end - 1, -1):
            if t < T:
                record = None if trajectory is None else trajectory.records[t]
                stage, owned = self.stages[t], self.owned[t]
                p, controls = stage.backward(
                    p,
                    record,
                    need_state=need_state or t > end,
                    need_control=need_control and (wanted is None or there[t]),
                    out=None if views is None else [views[i] for i in owned],
                )
                for i, part in zip(owned, controls, strict=True):
                    parts[i] = part
            if t > end or need_state:
                p = self._add_costs(p, t, trajectory)
                if linear is not None:
                    p = add_tangents(p, linear[t])
        if not need_control:
            return p, None
        if out is not None:
            return p, out
        shapes = tuple(self.blocks[i] for i in chosen)
        return p, to_rows(tuple(parts[i] for i in chosen), shapes, self.proto, k)

    def condensed_product(self, u: Tensor, out: Tensor | None = None) -> Tensor:
        """H u: one rollout, one adjoint sweep, and R u; shape (k, P) to (k, P).

        Args:
            u: Rows.
            out: A buffer for the result. A fresh one of the parameters' size costs as much time
                in page faults as a GEMM, so whoever multiplies often should give one.
        """
        if torch.compiler.is_compiling():
            product = self.traceable_product(u)
            return product if out is None else out.copy_(product)
        in_place = is_plain(u)
        if out is None and in_place:
            out = fresh_rows(u, *u.shape)
        return self._condensed(u, out, in_place=in_place)

    def traceable_product(self, u: Tensor) -> Tensor:
        """`condensed_product` that writes into no buffers: torch.compile takes no strided ones."""
        return self._condensed(u, None, in_place=False)

    def block_product(self, u: Tensor, columns: Sequence[int], rows: Sequence[int]) -> Tensor:
        """The part of (H - R) u at some blocks for a u that is zero but for some.

        Nothing of the length of all controls is made, and no stage before the first of either.

        Args:
            u: Rows (k, length of `columns` together).
            columns: Ids of the blocks that u consists of.
            rows: Ids of the blocks that the result consists of.
        """
        views: list[Tensor | None] = [None] * len(self.blocks)
        parts = u.split([self.sizes[i] for i in columns], dim=1)
        for i, part in zip(columns, parts, strict=True):
            views[i] = part.reshape(len(u), *self.blocks[i])
        zero: Tangent = tuple(None for _ in self.state_shapes(self.horizon))
        trajectory = self._roll(views, None, with_affine=False, columns=len(u))
        product = self.adjoint(zero, trajectory, wanted=tuple(rows))[1]
        assert product is not None
        return product

    def check(self, *, look: Look = "count") -> None:
        """Raises if a stage's weights or batch are no longer what was linearised.

        Every product does this for itself, but for one that runs as a compiled or captured graph.

        Args:
            look: How closely.
        """
        for stage in self.stages:
            check = getattr(stage, "check", None)
            if check is not None:
                check(look=look)

    def _condensed(self, u: Tensor, out: Tensor | None, *, in_place: bool) -> Tensor:
        zero: Tangent = tuple(None for _ in self.state_shapes(self.horizon))
        _, product = self.adjoint(zero, self.rollout(u), out=out)
        assert product is not None
        return self.control_cost.add_product(u, product, in_place=in_place)

    def output_product(self, u: Tensor) -> Tensor:
        """J u, flat at the last state; shape (k, P) to (k, n_T)."""
        final = self.rollout(u).final
        return to_rows(final, self.state_shapes(self.horizon), self.proto, len(u))

    def output_product_t(self, costate: Tangent, columns: int) -> Tensor:
        """J' p; tangent at the last state to rows (k, P)."""
        some = next((part for part in costate if part is not None), None)
        out = None
        if some is not None and is_plain(some):
            out = fresh_rows(self.proto, columns, self.control_size)
        product = self.adjoint(costate, out=out, columns=columns)[1]
        assert product is not None
        return product

    def tail(self, t: int) -> tuple[System, tuple[int, ...]]:
        """The system from time t on, and the ids of its control blocks."""
        kept = tuple(sorted(i for owned in self.owned[t:] for i in owned))
        place = {block: i for i, block in enumerate(kept)}
        return (
            replace(
                self,
                stages=self.stages[t:],
                state_costs=self.state_costs[t:],
                control_cost=self.control_cost.restrict(kept),
                blocks=tuple(self.blocks[i] for i in kept),
                owned=tuple(tuple(place[i] for i in owned) for owned in self.owned[t:]),
                affine=self.affine[t:],
            ),
            kept,
        )

    def _add_costs(self, p: Tangent, t: int, trajectory: Trajectory | None) -> Tangent:
        if trajectory is not None:
            for cost in self.state_costs[t]:
                state = trajectory.states[t]
                assert state is not None
                p = add_tangents(p, cost.product(state, self.state_shapes(t)))
        return p


def _columns(u: Tensor | None, x0: Tangent | None, otherwise: int) -> int:
    if u is not None:
        return len(u)
    return next((len(part) for part in x0 or () if part is not None), otherwise)
