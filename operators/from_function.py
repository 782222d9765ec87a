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
        return self.product(v)


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

    Symmetry is taken on trust. The function runs with gradients enabled, so that it may build and
    differentiate a graph, and what it gives is copied, so that it may use its memory again.

    Args:
        function: Multiplies one vector, (n,) to (n,), or rows, (k, n) to (k, n).
        size: n.
        dtype: Of what it takes and gives.
        device: Likewise.
        rows: Whether it takes rows.
        columns: Most rows per call; None takes all at once.

    Raises:
        ValueError: From a product, where the function gives another shape or dtype.
    """
    proto = torch.empty(0, dtype=dtype, device=device)

    def called(v: Tensor, out: Tensor) -> None:
        with torch.enable_grad():
            given = function(v).detach()
        if given.shape != v.shape or given.dtype != v.dtype:
            raise ValueError(
                f"the function turned {v.dtype} of shape {tuple(v.shape)} into {given.dtype} of "
                f"shape {tuple(given.shape)}: it must map (n,) to (n,), or with rows=True (k, n) "
                "to (k, n), one vector per row, in the same dtype."
            )
        out.copy_(given)

    def product(v: Tensor) -> Tensor:
        v = v.detach()
        made = torch.empty_like(v, memory_format=torch.contiguous_format)
        if rows:
            called(v, made)
        else:
            for one, out in zip(v, made, strict=True):
                called(one, out)
        return made

    return FunctionOperator(proto, size=size, product=product, columns=columns)
