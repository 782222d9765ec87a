"""The curvature in an activation, with the controls held."""

from __future__ import annotations

from torch import Tensor

from .base import MatrixFreeOperator
from .system import System
from .tangent import from_rows, size_of, to_rows


class StateCurvatureOperator(MatrixFreeOperator):
    """C_t = Q_t + A_t' C_{t+1} A_t, shape (n_t, n_t): P_t if no later control could answer.

    For a network, the curvature of the mean divergence in the activations that enter layer t. A
    product is one rollout and one adjoint sweep of the layers from t on.

    Args:
        proto: Carries dtype and device.
        system: The tail from t on.
        columns: Columns per pass.
    """

    symmetric = True

    def __init__(self, proto: Tensor, *, system: System, columns: int | None = None) -> None:
        super().__init__(proto, columns=columns, system=system)
        self.system = system

    def _sizes(self) -> tuple[int, int]:
        n = size_of(self.system.state_shapes(0))
        return n, n

    def _rows(self, v: Tensor) -> Tensor:
        system, shapes = self.system, self.system.state_shapes(0)
        trajectory = system.rollout(None, from_rows(v, shapes))
        zero = tuple(None for _ in system.state_shapes(system.horizon))
        first, _ = system.adjoint(zero, trajectory, need_state=True, need_control=False)
        return to_rows(first, shapes, system.proto, len(v))
