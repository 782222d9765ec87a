"""H, the Hessian of the objective in the controls alone."""

from __future__ import annotations

from torch import Tensor

from .base import MatrixFreeOperator
from .fresh import into
from .system import System
from .tangent import is_plain


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

    def multiply_rows(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """H times k vectors kept as rows, shape (k, P), written into `out` if it is given.

        `out` may be v. `H @ V` takes columns and returns fresh memory each time; at millions of
        parameters the page faults of that memory cost as much as a GEMM, which a loop can save.
        """
        if out is None:
            return self._rows(v)
        copied = into(self.times_rows, v, out) if is_plain(v) and is_plain(out) else None
        if copied is not None:
            return copied
        if self._columns is None:
            return self.system.condensed_product(v, out)
        for part, target in zip(v.split(self._columns), out.split(self._columns), strict=True):
            self.system.condensed_product(part, target)
        return out

    def _rows_into(self, v: Tensor, out: Tensor) -> Tensor:
        return self.multiply_rows(v, out)
