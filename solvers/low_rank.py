"""P_t = L_t L_t' for every t by one backward sweep: all values and gains at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..operators.base import MatrixFreeOperator
from ..operators.stage import Stage
from ..operators.system import System
from ..operators.tangent import Shape, Tangent, from_rows, size_of, to_rows
from .dual import safe_cholesky

COLUMNS = 64
"""Columns of L_t that pass through a stage at a time."""


@dataclass(frozen=True)
class LowRankStep:
    """What the recursion keeps of one stage.

    Args:
        stage: The stage.
        factor: L_{t+1}' as rows (rank, n_{t+1}).
        cholesky: Factor of I + W with W = L'B R^{-1} B'L, float64.
        system: The stage's controls alone, for R^{-1}.
    """

    stage: Stage
    factor: Tensor
    cholesky: Tensor
    system: System = field(repr=False)

    def control_product_t(self, rows: Tensor) -> Tensor:
        """R^{-1} B' p for rows (k, n_{t+1}), to rows (k, m_t)."""
        costate = from_rows(rows, self.stage.next_state)
        _, controls = self.stage.backward(costate, None, need_state=False)
        flat = to_rows(controls, self.stage.controls, rows, len(rows))
        return self.system.control_cost.inverse_product(flat)

    def control_product(self, rows: Tensor) -> Tensor:
        """B u for rows (k, m_t), to rows (k, n_{t+1})."""
        zero: Tangent = tuple(None for _ in self.stage.state)
        out, _ = self.stage.forward(zero, from_rows(rows, self.stage.controls))
        return to_rows(out, self.stage.next_state, rows, len(rows))

    def gain(self, p: Tensor) -> Tensor:
        """-(R + B'LL'B)^{-1} B'L z = -R^{-1} B'L (I + W)^{-1} z for rows z = p, (k, rank)."""
        inner = torch.cholesky_solve(p.double().mT, self.cholesky).mT.to(self.factor.dtype)
        return -self.control_product_t(inner @ self.factor)


class LowRankValueOperator(MatrixFreeOperator):
    """P_t = L_t L_t'.

    Args:
        proto: Carries dtype and device.
        rows: L_t' as (rank, n_t), in a tuple.
        columns: Columns per pass.
    """

    symmetric = True

    def __init__(self, proto: Tensor, *, rows: tuple[Tensor], columns: int | None = None) -> None:
        super().__init__(proto, columns=columns, rows=rows)
        self.factor = rows[0]

    def _sizes(self) -> tuple[int, int]:
        n = self.factor.shape[1]
        return n, n

    def _rows(self, v: Tensor) -> Tensor:
        return (v @ self.factor.mT) @ self.factor


class LowRankGainOperator(MatrixFreeOperator):
    """K_t v = -R^{-1} B'L (I + W)^{-1} L'A v, with L of time t + 1.

    Args:
        proto: Carries dtype and device.
        step: What the sweep kept of stage t.
        columns: Columns per pass.
    """

    def __init__(self, proto: Tensor, *, step: LowRankStep, columns: int | None = None) -> None:
        super().__init__(proto, columns=columns, step=step)
        self.step = step

    def _sizes(self) -> tuple[int, int]:
        return size_of(self.step.stage.controls), size_of(self.step.stage.state)

    def _rows(self, v: Tensor) -> Tensor:
        stage = self.step.stage
        zero: Tangent = tuple(None for _ in stage.controls)
        ahead, _ = stage.forward(from_rows(v, stage.state), zero)
        rows = to_rows(ahead, stage.next_state, v, len(v))
        return self.step.gain(rows @ self.step.factor.mT)

    def _rows_t(self, w: Tensor) -> Tensor:
        step, stage = self.step, self.step.stage
        seen = step.control_product(step.system.control_cost.inverse_product(w))
        inner = torch.cholesky_solve((seen @ step.factor.mT).double().mT, step.cholesky).mT
        costate = from_rows(-inner.to(w.dtype) @ step.factor, stage.next_state)
        back, _ = stage.backward(costate, None, need_control=False)
        return to_rows(back, stage.state, w, len(w))


@dataclass(frozen=True)
class LowRankResult:
    """All values and gains of a problem whose costs have low rank.

    Args:
        steps: What the sweep kept of each stage.
        factors: L_t' as rows (rank_t, n_t), t = 0..T.
        proto: Carries dtype and device.
    """

    steps: tuple[LowRankStep, ...]
    factors: tuple[Tensor, ...]
    proto: Tensor

    def value(self, t: int) -> LowRankValueOperator:
        """P_t."""
        return LowRankValueOperator(self.proto, rows=(self.factors[t],))

    def gain(self, t: int) -> LowRankGainOperator:
        """K_t."""
        return LowRankGainOperator(self.proto, step=self.steps[t])

    def solve(self, b: Tensor, system: System) -> Tensor:
        """H u = b for rows (k, P): the backward sweep of linear terms, then the closed loop."""
        k = len(b)
        views = system.split_control(b)
        slope: Tangent = tuple(None for _ in system.state_shapes(system.horizon))
        offsets: list[Tensor] = []
        for t in range(system.horizon - 1, -1, -1):
            step, stage = self.steps[t], self.steps[t].stage
            mine = to_rows(tuple(views[i] for i in system.owned[t]), stage.controls, b, k)
            _, pulled = stage.backward(slope, None, need_state=False)
            h = to_rows(pulled, stage.controls, b, k) - mine
            # k_t = -(R + B'LL'B)^{-1} h by the Woodbury identity.
            direct = -step.system.control_cost.inverse_product(h)
            seen = step.control_product(direct) @ step.factor.mT
            offset = direct + step.gain(seen)
            offsets.append(offset)
            ahead = step.control_product(offset) @ step.factor.mT
            costate = from_rows(ahead @ step.factor, stage.next_state)
            total = tuple(c if s is None else c + s for c, s in zip(costate, slope, strict=True))
            slope, _ = stage.backward(total, None, need_control=False)
        offsets.reverse()
        x: Tangent = tuple(None for _ in system.state_shapes(0))
        out = torch.zeros_like(b, memory_format=torch.contiguous_format)
        targets = system.split_control(out)
        for t in range(system.horizon):
            step, stage = self.steps[t], self.steps[t].stage
            zero: Tangent = tuple(None for _ in stage.controls)
            free, _ = stage.forward(x, zero)
            u = offsets[t]
            if any(part is not None for part in free):
                u = u + step.gain(to_rows(free, stage.next_state, b, k) @ step.factor.mT)
            parts = from_rows(u, stage.controls)
            for i, part in zip(system.owned[t], parts, strict=True):
                targets[i].copy_(part)
            x, _ = stage.forward(x, parts)
        return out


def low_rank(
    system: System, terminal: Tensor, state_factors: Sequence[Tensor | None] | None = None
) -> LowRankResult:
    """L_t = A' L_{t+1} (I + L'B R^{-1} B'L)^{-1/2}; design.md section 2, fact 4.

    Costs on other states append their factor's columns. L_t has N r columns of length n_t, so
    this is for N r up to a few thousand; B' L_t is never kept, only passed through in blocks of
    `COLUMNS`.

    Args:
        system: No second-order terms.
        terminal: L_T' as rows (rank, n_T).
        state_factors: Factors of Q_t as rows (rank, n_t), t = 0..T-1, or None.

    Raises:
        ValueError: A stage has second-order terms.
    """
    if any(stage.curved for stage in system.stages):
        raise ValueError(
            "the low-rank sweep needs positive costs with known factors: this problem has cross "
            "terms S (a Newton-like metric has them); use method='cg'."
        )
    factors = [terminal]
    steps: list[LowRankStep] = []
    for t in range(system.horizon - 1, -1, -1):
        stage, L = system.stages[t], factors[-1]
        alone = _one_stage(system, t)
        step = LowRankStep(stage, L, L.new_zeros(0, 0), alone)
        W = torch.cat(
            [
                L.new_zeros(0, len(L)),
                *(step.control_product(step.control_product_t(p)) @ L.mT for p in _passes(L)),
            ]
        ).double()
        step = LowRankStep(stage, L, safe_cholesky((W + W.mT) / 2), alone)
        steps.append(step)
        # (I + W)^{-1/2} may be any factor of (I + W)^{-1}: the triangular one is cheapest.
        turned = torch.linalg.solve_triangular(step.cholesky, L.double(), upper=False).to(L.dtype)
        parts = [L.new_zeros(0, size_of(stage.state))]
        for part in _passes(turned):
            back, _ = stage.backward(from_rows(part, stage.next_state), None, need_control=False)
            parts.append(to_rows(back, stage.state, part, len(part)))
        rows = torch.cat(parts)
        extra = None if state_factors is None else state_factors[t]
        factors.append(rows if extra is None else _compress(torch.cat([rows, extra])))
    return LowRankResult(tuple(reversed(steps)), tuple(reversed(factors)), system.proto)


def _one_stage(system: System, t: int) -> System:
    owned = system.owned[t]
    blocks: tuple[Shape, ...] = tuple(system.blocks[i] for i in owned)
    return replace(
        system,
        stages=(system.stages[t],),
        state_costs=((), ()),
        control_cost=system.control_cost.restrict(owned),
        blocks=blocks,
        owned=(tuple(range(len(owned))),),
        affine=(),
    )


def _passes(rows: Tensor) -> list[Tensor]:
    """At most `COLUMNS` rows at a time; nothing where the rank is zero."""
    return [part for part in rows.split(COLUMNS) if len(part)]


def _compress(rows: Tensor) -> Tensor:
    """Rows with the same R'R and no more of them than columns."""
    if len(rows) <= rows.shape[1]:
        return rows
    return torch.linalg.qr(rows.double(), mode="r").R.to(rows.dtype)
