"""B_t, the derivative of a layer in its parameters."""

from __future__ import annotations

from torch import Tensor

from .base import MatrixFreeOperator
from .stage import Stage
from .tangent import from_rows, size_of, to_rows


class ControlOperator(MatrixFreeOperator):
    """B_t: u_t to its share of dx_{t+1}, shape (n_{t+1}, m_t).

    Args:
        proto: Carries dtype and device.
        stage: The linearised layer.
        columns: Columns per pass.
    """

    def __init__(self, proto: Tensor, *, stage: Stage, columns: int | None = None) -> None:
        super().__init__(proto, columns=columns, stage=stage)
        self.stage = stage

    def _sizes(self) -> tuple[int, int]:
        return size_of(self.stage.next_state), size_of(self.stage.controls)

    def _rows(self, v: Tensor) -> Tensor:
        zero = tuple(None for _ in self.stage.state)
        out, _ = self.stage.forward(zero, from_rows(v, self.stage.controls))
        return to_rows(out, self.stage.next_state, v, len(v))

    def _rows_t(self, w: Tensor) -> Tensor:
        costate = from_rows(w, self.stage.next_state)
        _, out = self.stage.backward(costate, None, need_state=False)
        return to_rows(out, self.stage.controls, w, len(w))
