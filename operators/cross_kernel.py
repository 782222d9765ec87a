"""K12 = J1 R^{-1} J2', the tangent kernel between two batches of one network."""

from __future__ import annotations

from torch import Tensor

from .base import MatrixFreeOperator
from .system import System
from .tangent import Tangent, from_rows, size_of, to_rows
from .tangent_kernel import stage_inverses

CONTROL_ELEMENTS = 2**26
"""Numbers of one layer's controls held at a time."""


class CrossKernelOperator(MatrixFreeOperator):
    """K12 = J1 R^{-1} J2', shape (n_T of batch 1, n_T of batch 2).

    A product is a costate sweep back through the network at batch 2 and a state sweep forward at
    batch 1, under u_t = R_t^{-1} B_t' p_{t+1}. The costates between the layers are kept, and no
    more than one layer's u_t is ever there. The transpose is the kernel the other way round.

    Args:
        proto: Carries dtype and device.
        first: The network linearised at batch 1.
        second: The same at batch 2; its R is the one that counts, and must be positive definite.
        columns: Columns per pass; fewer where u_t of so many would be large.

    Raises:
        ValueError: The two have other layers or controls.
    """

    def __init__(
        self, proto: Tensor, *, first: System, second: System, columns: int | None = None
    ) -> None:
        if first.blocks != second.blocks or first.owned != second.owned:
            raise ValueError(
                "the two systems have other controls: give two linearisations of one network, cut "
                "into the same layers."
            )
        largest = max((size_of(stage.controls) for stage in second.stages), default=1)
        room = max(1, CONTROL_ELEMENTS // max(1, largest))
        columns = room if columns is None else min(columns, room)
        super().__init__(proto, columns=columns, first=first, second=second)
        self.first, self.second = first, second
        self._inverses = stage_inverses(second)

    def _sizes(self) -> tuple[int, int]:
        return self.first.output_size, self.second.output_size

    def _rows(self, v: Tensor) -> Tensor:
        return self._sweep(v, self.second, self.first)

    def _rows_t(self, w: Tensor) -> Tensor:
        return self._sweep(w, self.first, self.second)

    def _sweep(self, v: Tensor, back: System, forth: System) -> Tensor:
        k, T = len(v), back.horizon
        p: Tangent = from_rows(v, back.state_shapes(T))
        if self._inverses is None:
            # One R spans several layers: its inverse needs the whole control.
            controls = back.output_product_t(p, k)
            return forth.output_product(self.second.control_cost.inverse_product(controls))
        arrived: list[Tangent] = []
        for t in range(T - 1, -1, -1):
            arrived.append(p)
            if t > 0:
                p, _ = back.stages[t].backward(p, None, need_control=False)
        x: Tangent = tuple(None for _ in forth.state_shapes(0))
        for t in range(T):
            # Popped, so that a costate is gone once its layer has moved.
            u = self._control(back, t, arrived.pop(), k)
            x, _ = forth.stages[t].forward(x, u)
        return to_rows(x, forth.state_shapes(T), forth.proto, k)

    def _control(self, back: System, t: int, costate: Tangent, k: int) -> Tangent:
        """R_t^{-1} B_t' p of one layer."""
        assert self._inverses is not None
        stage = back.stages[t]
        if not stage.controls:
            return ()
        inverse = self._inverses[t]
        values = inverse.block_values
        if values is not None and len(set(values)) == 1:
            # Costates are smaller than controls.
            costate = tuple(None if p is None else p * values[0] for p in costate)
            return stage.backward(costate, None, need_state=False)[1]
        _, controls = stage.backward(costate, None, need_state=False)
        if all(part is None for part in controls):
            return controls
        rows = inverse.product(to_rows(controls, stage.controls, back.proto, k))
        return from_rows(rows, stage.controls)
