"""K = J R^{-1} J', the tangent kernel of the last state: what the controls can do to it."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import MatrixFreeOperator
from .control_cost import ControlCost
from .stage import dots_of_rows
from .system import System
from .tangent import Tangent, from_rows, to_rows


class TangentKernelOperator(MatrixFreeOperator):
    """K = J R^{-1} J', shape (n_T, n_T), symmetric and positive semi-definite.

    For a network with R = I this is the empirical neural tangent kernel (Jacot et al. 2018). A
    product is a costate sweep back and a state sweep forward under u_t = R_t^{-1} B_t' p_{t+1},
    and no more than one layer's u_t is ever there; where a layer has a closed form for B B' p,
    not even that.

    Args:
        proto: Carries dtype and device.
        system: Whose controls; R must be positive definite.
        columns: Columns per pass.
    """

    symmetric = True

    def __init__(self, proto: Tensor, *, system: System, columns: int | None = None) -> None:
        super().__init__(proto, columns=columns, system=system)
        self.system = system
        self._inverses = stage_inverses(system)

    def _sizes(self) -> tuple[int, int]:
        n = self.system.output_size
        return n, n

    def _rows(self, v: Tensor) -> Tensor:
        return self._sweep(v, squares=False)[0]

    def rows_and_squares(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """K v for rows v, and squares that cost next to nothing beside it.

        Args:
            v: Shape (k, n_T).

        Returns:
            K v, shape (k, n_T); |J' v|^2 and |R^{-1/2} J' v|^2 in float64, shape (2, k). (v'K v is
            the latter, too, but for the rounding of K v.)
        """
        rows, squares = self._sweep(v, squares=True)
        assert squares is not None
        return rows, squares

    def _sweep(self, v: Tensor, *, squares: bool) -> tuple[Tensor, Tensor | None]:
        system, k = self.system, len(v)
        shapes = system.state_shapes(system.horizon)
        p: Tangent = from_rows(v, shapes)
        total = v.new_zeros(2, k, dtype=torch.float64) if squares else None
        if self._inverses is None:
            # One R spans several layers: its inverse needs the whole control.
            controls = system.output_product_t(p, k)
            scaled = system.control_cost.inverse_product(controls)
            if total is not None:
                total += dots_of_rows(controls, scaled)
            return system.output_product(scaled), total
        records = []
        for t in range(system.horizon - 1, -1, -1):
            stage = system.stages[t]
            p, record = stage.costate(p, self._inverses[t], need_state=t > 0)
            if total is not None:
                total += stage.control_squares(record, self._inverses[t], k).to(total)
            records.append(record)
        x: Tangent = tuple(None for _ in system.state_shapes(0))
        for stage, record, inverse in zip(
            system.stages, reversed(records), self._inverses, strict=True
        ):
            x = stage.respond(x, record, inverse)
        return to_rows(x, shapes, system.proto, k), total


def stage_inverses(system: System) -> list[ControlCost] | None:
    """R_t^{-1} of every stage, or None where one operator spans several."""
    inverse = system.control_cost.inverse()
    try:
        return [inverse.restrict(owned) for owned in system.owned]
    except ValueError:
        return None
