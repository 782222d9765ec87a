"""R_t, the cost of a control."""

from __future__ import annotations

from torch import Tensor

from .base import MatrixFreeOperator
from .control_cost import ControlCost
from .stage import Stage
from .state_hessian import curvature_product
from .tangent import from_rows, size_of, to_rows


class ControlHessianOperator(MatrixFreeOperator):
    """R_t: damping and the layer's second derivative in its parameters, shape (m_t, m_t).

    Args:
        proto: Carries dtype and device.
        stage: The linearised layer.
        cost: Damping, on this layer's blocks.
        columns: Columns per pass.
    """

    symmetric = True

    def __init__(
        self, proto: Tensor, *, stage: Stage, cost: ControlCost, columns: int | None = None
    ) -> None:
        super().__init__(proto, columns=columns, stage=stage, cost=cost)
        self.stage, self.cost = stage, cost

    def _sizes(self) -> tuple[int, int]:
        m = size_of(self.stage.controls)
        return m, m

    def _rows(self, v: Tensor) -> Tensor:
        if not self.stage.curved:
            return self.cost.product(v)
        zero = tuple(None for _ in self.stage.state)
        _, out = curvature_product(self.stage, zero, from_rows(v, self.stage.controls))
        rows = to_rows(out, self.stage.controls, v, len(v))
        return self.cost.add_product(v, rows, in_place=False)


class ControlCostOperator(MatrixFreeOperator):
    """A `ControlCost` over all blocks as one operator, shape (P, P)."""

    symmetric = True

    def __init__(self, proto: Tensor, *, cost: ControlCost, columns: int | None = None) -> None:
        super().__init__(proto, columns=columns, cost=cost)
        self.cost = cost

    def _sizes(self) -> tuple[int, int]:
        return sum(self.cost.sizes), sum(self.cost.sizes)

    def _rows(self, v: Tensor) -> Tensor:
        return self.cost.product(v)

    def _diagonal(self) -> Tensor:
        return self.cost.diagonal(self._proto)

    def inverse(self) -> ControlCostOperator:
        """R^{-1}, where every part of it has an inverse."""
        return ControlCostOperator(self._proto, cost=self.cost.inverse())
