"""The layers' operators of a problem: dynamics, costs, cost-to-go and gains."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from linear_operator import LinearOperator

from .operators import (
    ControlCostOperator,
    ControlHessianOperator,
    ControlOperator,
    CrossHessianOperator,
    GainOperator,
    StateCurvatureOperator,
    StateHessianOperator,
    System,
    TransitionOperator,
    ValueOperator,
    ZeroOperator,
)
from .operators.tangent import size_of
from .tail import TailSolver


class LayerOperators:
    """A_t, B_t, Q_t, R_t, S_t, P_t and K_t of a linear-quadratic system, all lazy."""

    system: System
    _columns: int

    @property
    def horizon(self) -> int:
        """T, the number of layers."""
        return self.system.horizon

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of steps and products."""
        return self.system.proto.dtype

    @property
    def device(self) -> torch.device:
        """Device of steps and products."""
        return self.system.proto.device

    @cached_property
    def A(self) -> tuple[LinearOperator, ...]:
        """A_t, the layers' derivatives in their state; shape (n_{t+1}, n_t)."""
        return tuple(
            TransitionOperator(self.system.proto, stage=stage, columns=self._columns)
            for stage in self.system.stages
        )

    @cached_property
    def B(self) -> tuple[LinearOperator, ...]:
        """B_t, the layers' derivatives in their parameters; shape (n_{t+1}, m_t)."""
        return tuple(
            ControlOperator(self.system.proto, stage=stage, columns=self._columns)
            for stage in self.system.stages
        )

    @cached_property
    def Q(self) -> tuple[LinearOperator, ...]:
        """Q_0..Q_T, the costs of the states; shape (n_t, n_t)."""
        return tuple(self._state_hessian(t) for t in range(self.horizon + 1))

    @cached_property
    def R(self) -> tuple[LinearOperator, ...]:
        """R_t, the costs of the controls, damping included; shape (m_t, m_t)."""
        system = self.system
        made = []
        for stage, owned in zip(system.stages, system.owned, strict=True):
            cost = system.control_cost.restrict(owned)
            if stage.curved:
                made.append(
                    ControlHessianOperator(
                        system.proto, stage=stage, cost=cost, columns=self._columns
                    )
                )
            else:
                made.append(ControlCostOperator(system.proto, cost=cost))
        return tuple(made)

    @cached_property
    def S(self) -> tuple[LinearOperator, ...]:
        """S_t with the cost u'S_t x; shape (m_t, n_t)."""
        proto = self.system.proto
        return tuple(
            CrossHessianOperator(proto, stage=stage, columns=self._columns)
            if stage.curved
            else ZeroOperator(proto, sizes=(size_of(stage.controls), size_of(stage.state)))
            for stage in self.system.stages
        )

    def value(
        self, t: int, *, rtol: float | None = None, max_iterations: int | None = None
    ) -> LinearOperator:
        """P_t, the matrix of the least cost from layer t on; shape (n_t, n_t), lazy.

        A product is one CG on the tail problem and one adjoint sweep.

        Args:
            t: 0..T.
            rtol: Tolerance of that CG. Default: 1e-12 in float64, 1e-6 otherwise.
            max_iterations: Its limit, 1000 by default; a product that reaches it warns.

        Raises:
            ValueError: From a product, where the tail problem is unbounded below.
        """
        if not 0 <= t <= self.horizon:
            raise ValueError(f"time {t} is outside of 0..{self.horizon}.")
        if t == self.horizon:
            return self.Q[t]
        return ValueOperator(self.system.proto, **self._tail(t, rtol, max_iterations))

    def state_curvature(self, t: int) -> LinearOperator:
        """C_t = Q_t + A_t' C_{t+1} A_t, the curvature in x_t with the controls held; (n_t, n_t).

        P_t has been lowered by the controls' answer: P_t <= C_t.

        Args:
            t: 0..T.
        """
        if not 0 <= t <= self.horizon:
            raise ValueError(f"time {t} is outside of 0..{self.horizon}.")
        if t == self.horizon:
            return self.Q[t]
        tail = self.system.tail(t)[0]
        return StateCurvatureOperator(self.system.proto, system=tail, columns=self._columns)

    def gain(
        self, t: int, *, rtol: float | None = None, max_iterations: int | None = None
    ) -> LinearOperator:
        """K_t in u_t = K_t x_t + k_t; shape (m_t, n_t), lazy.

        Args:
            t: 0..T-1.
            rtol: Tolerance of the tail CG. Default: 1e-12 in float64, 1e-6 otherwise.
            max_iterations: Its limit, as for `value`.
        """
        if not 0 <= t < self.horizon:
            raise ValueError(f"time {t} is outside of 0..{self.horizon - 1}.")
        return GainOperator(self.system.proto, **self._tail(t, rtol, max_iterations))

    def _state_hessian(self, t: int) -> LinearOperator:
        system = self.system
        stage = system.stages[t] if t < self.horizon else None
        costs, shapes = system.state_costs[t], system.state_shapes(t)
        if (stage is None or not stage.curved) and not costs:
            return ZeroOperator(system.proto, sizes=(size_of(shapes), size_of(shapes)))
        if (stage is None or not stage.curved) and len(costs) == 1 and costs[0].component is None:
            return costs[0].operator
        return StateHessianOperator(
            system.proto, stage=stage, costs=costs, shapes=shapes, columns=self._columns
        )

    def _tail(self, t: int, rtol: float | None, max_iterations: int | None) -> dict[str, Any]:
        system, _ = self.system.tail(t)
        tolerance = rtol or (1e-12 if self.dtype == torch.float64 else 1e-6)
        solve = TailSolver(tolerance, max_iterations or 1000)
        return {"system": system, "solve": solve, "columns": self._columns}
