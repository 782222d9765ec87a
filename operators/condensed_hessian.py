"""H, the Hessian of the objective in the controls alone."""

from __future__ import annotations

from torch import Tensor

from .base import MatrixFreeOperator
from .system import System


class CondensedHessianOperator(MatrixFreeOperator):
    """H u = adjoint(Q rollout(u)) + R u, shape (P, P); design.md section 2, fact 1.

    One product is a linear rollout and an adjoint sweep on the linearisation that A, B and the
    costs share. Its memory beyond the linearisation is one tangent of every activation per
    column, and the result.

    Args:
        proto: Carries dtype and device.
        system: The linear-quadratic system.
        columns: Columns per pass.
    """

    symmetric = True

    def __init__(self, proto: Tensor, *, system: System, columns: int | None = None) -> None:
        super().__init__(proto, columns=columns, system=system)
        self.system = system

    def _sizes(self) -> tuple[int, int]:
        return self.system.control_size, self.system.control_size

    def _rows(self, v: Tensor) -> Tensor:
        return self.system.condensed_product(v)
