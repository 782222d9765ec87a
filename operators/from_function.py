"""A symmetric operator from a function that multiplies by it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import MatrixFreeOperator


class FunctionOperator(MatrixFreeOperator):
    """A symmetric matrix known by a function; shape (n, n).

    Args:
        proto: Carries dtype and device.
        size: n.
        product: Multiplies rows, shape (k, n) to (k, n).
        columns: Vectors per call of the function.
    """

    symmetric = True

    def __init__(
        self,
        proto: Tensor,
        *,
        size: int,
        product: Callable[[Tensor], Tensor],
        columns: int | None = None,
    ) -> None:
        super().__init__(proto, columns=columns, size=size, product=product)
        self.size_, self.product = size, product

    def _sizes(self) -> tuple[int, int]:
        return self.size_, self.size_

    def _rows(self, v: Tensor) -> Tensor:
        out = self.product(v)
        if out.shape != v.shape:
            raise ValueError(
                f"the function turned rows of shape {tuple(v.shape)} into {tuple(out.shape)}: it "
                "must map (k, n) to (k, n), one vector per row, or (n,) to (n,) if it is given "
                "with rows=False."
            )
        return out


def from_function(
    function: Callable[[Tensor], Tensor],
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    rows: bool = False,
    columns: int | None = None,
) -> FunctionOperator:
    """A symmetric operator from a function of the user's, say a Hessian-vector product.

    Symmetry is taken on trust.

    Args:
        function: Multiplies one vector, (n,) to (n,), or rows, (k, n) to (k, n).
        size: n.
        dtype: Of what it takes and gives.
        device: Likewise.
        rows: Whether it takes rows.
        columns: Most rows per call; None takes all at once.

    Raises:
        ValueError: From a product, where the function gives another shape.
    """
    proto = torch.empty(0, dtype=dtype, device=device)
    if rows:
        return FunctionOperator(proto, size=size, product=function, columns=columns)

    def one_by_one(v: Tensor) -> Tensor:
        return torch.stack([function(row) for row in v])

    return FunctionOperator(proto, size=size, product=one_by_one, columns=columns)
