"""H_st: a block of the condensed Hessian, without vectors of the whole control's length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import MatrixFreeOperator
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
        damped: Whether R is included; it has no part in a block without common parameters.
        columns: Columns per pass.

    Raises:
        ValueError: R is asked for, and one operator of it spans blocks inside and outside.
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
        common = [i for i in rows if i in cols] if damped else []
        self._cost = system.control_cost.restrict(common) if common else None
        self._common = common

    def _sizes(self) -> tuple[int, int]:
        sizes = self.system.sizes
        return sum(sizes[i] for i in self.rows), sum(sizes[i] for i in self.cols)

    def _rows(self, v: Tensor) -> Tensor:
        return self._product(v, self.cols, self.rows)

    def _rows_t(self, w: Tensor) -> Tensor:
        return self._product(w, self.rows, self.cols)

    def _product(self, v: Tensor, columns: Sequence[int], rows: Sequence[int]) -> Tensor:
        product = self.system.block_product(v, columns, rows)
        if self._cost is None:
            return product
        if self.symmetric:
            return self._cost.add_product(v, product, in_place=False)
        sizes = self.system.sizes
        given = dict(zip(columns, v.split([sizes[i] for i in columns], dim=1), strict=True))
        joined = torch.cat([given[i] for i in self._common], dim=1)
        damped = self._cost.product(joined).split([sizes[i] for i in self._common], dim=1)
        extra = dict(zip(self._common, damped, strict=True))
        parts = zip(rows, product.split([sizes[i] for i in rows], dim=1), strict=True)
        return torch.cat([p + extra[i] if i in extra else p for i, p in parts], dim=1)
