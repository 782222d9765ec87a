"""Products in one dtype, on one device, for vectors of another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from linear_operator import LinearOperator
from torch import Tensor

from ..operators.apply import apply_rows
from ..operators.base import MatrixFreeOperator
from .dots import pieces, row_dots

RowProduct: TypeAlias = LinearOperator | Callable[[Tensor], Tensor]
"""An operator, or a function of rows: shape (k, n) to (k, n)."""


@dataclass(frozen=True)
class Vectors:
    """The blocks that a recurrence works on.

    Attributes:
        shape: (k, n).
        dtype: Their dtype.
        device: Where they live.
        pinned: Whether their memory is page-locked, for copies to an accelerator.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    pinned: bool = False

    def empty(self) -> Tensor:
        """A block that is not filled."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device, pin_memory=self.pinned)


class Product:
    """A product in its own dtype and on its own device, seen from vectors of another.

    When the dtypes differ, each row is scaled by a power of two to a norm in [1/2, 1) before it is
    rounded, so that a small residual does not vanish in a narrow dtype.

    Besides the result, which is with the vectors, it holds at most two blocks: what is multiplied,
    if that cannot be the vectors themselves, and what a `MatrixFreeOperator` writes to.

    Args:
        operator: An operator or a function of rows.
        dtype: The dtype of its products.
        device: The device of its products.
        vectors: What it is to multiply.
        partner: Another product, never in use at the same time, whose blocks serve this one too.
    """

    def __init__(
        self,
        operator: RowProduct,
        dtype: torch.dtype,
        device: torch.device,
        vectors: Vectors,
        partner: Product | None = None,
    ) -> None:
        self.operator, self.count = operator, 0
        self.mixed = dtype != vectors.dtype
        self.staged = self.mixed or device != vectors.device
        self.given: Tensor | None = None
        self.result: Tensor | None = None
        self.buffer: Tensor | None = None
        if partner is not None and not (self.staged and partner.staged):
            # Without staging the buffer is the result, which has to outlive the partner's call.
            partner = None
        its_own = Vectors(vectors.shape, dtype, device)
        if self.staged:
            self.result = vectors.empty()
            self.given = _shared(its_own, None if partner is None else partner.given)
        if isinstance(operator, MatrixFreeOperator):
            self.buffer = _shared(its_own, None if partner is None else partner.buffer)

    def __call__(self, v: Tensor, square: Tensor | None = None) -> Tensor:
        """Product with rows; shape (k, n) to (k, n). The next call may overwrite the result.

        Args:
            v: The rows.
            square: v'v of every row, if it is known already; shape (k,).
        """
        if self.given is None or self.result is None:
            return self._product(v)
        if not self.mixed:
            return self.result.copy_(self._product(self.given.copy_(v)))
        norm = (row_dots(v, v) if square is None else square).sqrt()
        scale = torch.where(norm > 0, torch.frexp(norm).mantissa / norm, 1.0)
        scale = scale.to(v.dtype).unsqueeze(-1)
        for wide, narrow in pieces(v, self.given):
            narrow.copy_(wide * scale)
        out = self._product(self.given)
        for wide, narrow in pieces(self.result, out):
            wide.copy_(narrow).div_(scale)
        return self.result

    def release(self) -> None:
        """Lets go of the blocks; no product can follow."""
        self.given = self.buffer = self.result = None

    def _product(self, v: Tensor) -> Tensor:
        self.count += 1
        return multiply(self.operator, v, self.buffer)


class CountedProduct:
    """A product with rows in the operator's own dtype, which counts the vectors multiplied.

    Args:
        operator: An operator or a function of rows, shape (k, n) to (k, n).
    """

    def __init__(self, operator: RowProduct) -> None:
        self.operator, self.vectors = operator, 0
        self._sum: Tensor | float = 0.0

    def __call__(self, v: Tensor) -> Tensor:
        """Product with rows; shape (k, n) to (k, n)."""
        self.vectors += len(v)
        product = multiply(self.operator, v, None)
        # It stays on the device until somebody asks.
        self._sum = self._sum + product.sum(dtype=torch.float64)
        return product

    def check(self) -> None:
        """Whether all products so far were finite; reads the device once.

        Raises:
            ValueError: One was not.
        """
        if not math.isfinite(self._sum):
            raise ValueError(
                "a product with the operator gave NaN or infinity: look at the model's outputs and "
                "weights, or run it in a wider dtype."
            )


def multiply(operator: RowProduct, v: Tensor, buffer: Tensor | None) -> Tensor:
    """The operator's product with rows, in the buffer if it is one that writes to it.

    Raises:
        ValueError: A callable gave rows of another shape.
    """
    if isinstance(operator, MatrixFreeOperator) and buffer is not None:
        return operator._rows_into(v, buffer)
    if isinstance(operator, LinearOperator):
        out: Tensor = apply_rows(operator, v)
        return out
    out = operator(v)
    if out.shape != v.shape:
        raise ValueError(
            f"the callable turned rows of shape {tuple(v.shape)} into {tuple(out.shape)}: it "
            "must map (k, n) to (k, n), one vector per row."
        )
    if out.is_complex():
        raise ValueError(f"the callable turned {v.dtype} into {out.dtype}: it must stay real.")
    return out


def _shared(vectors: Vectors, lent: Tensor | None) -> Tensor:
    """The block that is lent if it fits, else a new one."""
    if lent is not None and (lent.dtype, lent.device) == (vectors.dtype, vectors.device):
        return lent
    return vectors.empty()
