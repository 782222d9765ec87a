"""H_st: a block of the condensed Hessian, without vectors of the whole control's length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from linear_operator import LinearOperator
from torch import Tensor

from .base import MatrixFreeOperator
from .control_cost import ControlCost
from .system import System


class HessianBlockOperator(MatrixFreeOperator):
    """The rows and columns of H that belong to some control blocks; shape (m_s, m_t).

    A product is a rollout from the first of the columns' layers on and an adjoint sweep down to
    the first of the rows'. Symmetric where rows and columns are the same blocks.

    Args:
        proto: Carries dtype and device.
        system: The linear-quadratic system.
        rows: Ids of the blocks of the result, in flat order.
        cols: Ids of the blocks of what is multiplied, in flat order.
        damped: Whether R is included. An operator of R that reaches into both takes vectors of its
            own length.
        columns: Columns per pass.
    """

    def __init__(
        self,
        proto: Tensor,
        *,
        system: System,
        rows: Sequence[int],
        cols: Sequence[int],
        damped: bool = True,
        columns: int | None = None,
    ) -> None:
        rows, cols = tuple(rows), tuple(cols)
        super().__init__(proto, columns=columns, system=system, rows=rows, cols=cols, damped=damped)
        self.system, self.rows, self.cols = system, rows, cols
        self.symmetric = rows == cols
        self._shared = _shared(system.control_cost, rows, cols) if damped else ()
        self._cost = system.control_cost.restrict(self._shared)

    def _sizes(self) -> tuple[int, int]:
        sizes = self.system.sizes
        return sum(sizes[i] for i in self.rows), sum(sizes[i] for i in self.cols)

    def _rows(self, v: Tensor) -> Tensor:
        return self._product(v, self.cols, self.rows)

    def _rows_t(self, w: Tensor) -> Tensor:
        return self._product(w, self.rows, self.cols)

    def _product(self, v: Tensor, columns: Sequence[int], rows: Sequence[int]) -> Tensor:
        product = self.system.block_product(v, columns, rows)
        if not self._shared:
            return product
        if columns == rows == self._shared:
            return self._cost.add_product(v, product, in_place=False)
        given = dict(zip(columns, self._split(v, columns), strict=True))
        sizes = self.system.sizes
        padded = [given[i] if i in given else v.new_zeros(len(v), sizes[i]) for i in self._shared]
        damped = self._split(self._cost.product(torch.cat(padded, dim=1)), self._shared)
        extra = dict(zip(self._shared, damped, strict=True))
        parts = zip(rows, self._split(product, rows), strict=True)
        return torch.cat([p + extra[i] if i in extra else p for i, p in parts], dim=1)

    def _split(self, v: Tensor, blocks: Sequence[int]) -> tuple[Tensor, ...]:
        return v.split([self.system.sizes[i] for i in blocks], dim=1)


def _shared(cost: ControlCost, rows: Sequence[int], cols: Sequence[int]) -> tuple[int, ...]:
    """The blocks that R needs whole: those of both, and all of an operator that reaches both."""
    needed = set(rows) & set(cols)
    for members, value in cost.groups:
        reaches = set(members) & set(rows) and set(members) & set(cols)
        if isinstance(value, LinearOperator) and reaches:
            needed |= set(members)
    return tuple(sorted(needed))
