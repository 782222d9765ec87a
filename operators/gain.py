"""K_t, the feedback gain."""

from __future__ import annotations

from torch import Tensor

from .base import MatrixFreeOperator
from .system import System
from .tangent import from_rows, size_of, to_rows
from .value import TailSolve, differentiable_solve, tail_controls


class GainOperator(MatrixFreeOperator):
    """K_t in u_t = K_t dx_t + k_t, shape (m_t, n_t).

    K_t = -(R_t + B_t' P_{t+1} B_t)^{-1} (S_t + B_t' P_{t+1} A_t). K_t v is the first control of
    the tail problem started at v. The transpose reads the same solve backwards.

    Args:
        proto: Carries dtype and device.
        system: The tail system, from time t.
        solve: Solver of the tail system's condensed equations.
        columns: Columns per pass.
    """

    def __init__(
        self, proto: Tensor, *, system: System, solve: TailSolve, columns: int | None = None
    ) -> None:
        super().__init__(proto, columns=columns, system=system, solve=solve)
        self.system, self.solve = system, solve

    def _sizes(self) -> tuple[int, int]:
        return size_of(self.system.stages[0].controls), size_of(self.system.state_shapes(0))

    def _rows(self, v: Tensor) -> Tensor:
        views = self.system.split_control(tail_controls(self.system, self.solve, v))
        first = tuple(views[i] for i in self.system.owned[0])
        return to_rows(first, self.system.stages[0].controls, v, len(v))

    def _rows_t(self, w: Tensor) -> Tensor:
        # K = -E' H^{-1} G with E' picking the first control and G dx the gradient at u = 0.
        system = self.system
        parts: list[Tensor | None] = [None] * len(system.blocks)
        for i, part in zip(system.owned[0], from_rows(w, system.stages[0].controls), strict=True):
            parts[i] = part
        picked = to_rows(tuple(parts), system.blocks, w, len(w))
        u = differentiable_solve(system, self.solve, -picked)
        zero = tuple(None for _ in system.state_shapes(system.horizon))
        p0, _ = system.adjoint(zero, system.rollout(u), need_state=True, need_control=False)
        return to_rows(p0, system.state_shapes(0), w, len(w))
