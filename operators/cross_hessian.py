"""S_t, the cost that couples a layer's state and its control."""

from __future__ import annotations

from torch import Tensor

from .base import MatrixFreeOperator
from .stage import Stage
from .state_hessian import curvature_product
from .tangent import from_rows, size_of, to_rows


class CrossHessianOperator(MatrixFreeOperator):
    """S_t with the cost term u' S_t dx, shape (m_t, n_t).

    Args:
        proto: Carries dtype and device.
        stage: The linearised layer.
        columns: Columns per pass.
    """

    def __init__(self, proto: Tensor, *, stage: Stage, columns: int | None = None) -> None:
        super().__init__(proto, columns=columns, stage=stage)
        self.stage = stage

    def _sizes(self) -> tuple[int, int]:
        return size_of(self.stage.controls), size_of(self.stage.state)

    def _rows(self, v: Tensor) -> Tensor:
        zero = tuple(None for _ in self.stage.controls)
        _, out = curvature_product(self.stage, from_rows(v, self.stage.state), zero)
        return to_rows(out, self.stage.controls, v, len(v))

    def _rows_t(self, w: Tensor) -> Tensor:
        zero = tuple(None for _ in self.stage.state)
        out, _ = curvature_product(self.stage, zero, from_rows(w, self.stage.controls))
        return to_rows(out, self.stage.state, w, len(w))
