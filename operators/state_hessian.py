"""Q_t, the cost of a state."""

from __future__ import annotations

from torch import Tensor

from .base import MatrixFreeOperator
from .stage import Stage, StateCost
from .tangent import Shape, Tangent, add_tangents, from_rows, size_of, to_rows


class StateHessianOperator(MatrixFreeOperator):
    """Q_t: the given costs on x_t and the layer's own curvature, shape (n_t, n_t).

    Args:
        proto: Carries dtype and device.
        stage: The layer that reads x_t, or None at the last time.
        costs: Costs given on x_t.
        shapes: Shapes of the components of x_t.
        columns: Columns per pass.
    """

    symmetric = True

    def __init__(
        self,
        proto: Tensor,
        *,
        stage: Stage | None,
        costs: tuple[StateCost, ...],
        shapes: tuple[Shape, ...],
        columns: int | None = None,
    ) -> None:
        super().__init__(proto, columns=columns, stage=stage, costs=costs, shapes=shapes)
        self.stage, self.costs, self.shapes = stage, costs, shapes

    def _sizes(self) -> tuple[int, int]:
        n = size_of(self.shapes)
        return n, n

    def _rows(self, v: Tensor) -> Tensor:
        x: Tangent = from_rows(v, self.shapes)
        out: Tangent = tuple(None for _ in self.shapes)
        if self.stage is not None and self.stage.curved:
            out, _ = curvature_product(self.stage, x, tuple(None for _ in self.stage.controls))
        for cost in self.costs:
            out = add_tangents(out, cost.product(x, self.shapes))
        return to_rows(out, self.shapes, v, len(v))


def curvature_product(stage: Stage, x: Tangent, u: Tangent) -> tuple[Tangent, Tangent]:
    """Q x + S' u and S x + R u, the stage's own curvature alone."""
    _, record = stage.forward(x, u)
    return stage.backward(tuple(None for _ in stage.next_state), record)
