"""J, the derivative of the last state in all controls."""

from __future__ import annotations

from torch import Tensor

from .base import MatrixFreeOperator
from .system import System
from .tangent import from_rows, size_of


class OutputJacobianOperator(MatrixFreeOperator):
    """J: flat control to the last state, shape (n_T, P).

    Args:
        proto: Carries dtype and device.
        system: The linear-quadratic system.
        columns: Columns per pass.
    """

    def __init__(self, proto: Tensor, *, system: System, columns: int | None = None) -> None:
        super().__init__(proto, columns=columns, system=system)
        self.system = system

    def _sizes(self) -> tuple[int, int]:
        system = self.system
        return size_of(system.state_shapes(system.horizon)), system.control_size

    def _rows(self, v: Tensor) -> Tensor:
        return self.system.output_product(v)

    def _rows_t(self, w: Tensor) -> Tensor:
        shapes = self.system.state_shapes(self.system.horizon)
        return self.system.output_product_t(from_rows(w, shapes), len(w))
