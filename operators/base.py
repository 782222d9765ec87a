"""The base class of every lazy operator of the library."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from linear_operator import LinearOperator
from torch import Tensor

DENSE_COLUMNS = 64
"""Columns per pass when an operator is written out by `to_dense` or `diagonal`."""


class MatrixFreeOperator(LinearOperator):  # type: ignore[misc]
    """A matrix known only by its products, with `linear_operator`'s algebra on top.

    A subclass names its size and multiplies *rows*: a block of k right-hand sides is a tensor
    of shape (k, n), one contiguous vector per row, so that k folds into the batch of a network.
    `A @ V` takes the usual columns, shape (n, k), and transposes (a view).

    Two things differ from `LinearOperator`. `A @ v` calls `_matmul` itself rather than a legacy
    `autograd.Function`, so it is differentiable in v and can stand under `torch.func`. And
    nothing is ever solved here: solvers live in `llqr_mf.solvers`.

    Args:
        proto: A tensor (it may be empty) that carries dtype and device.
        columns: Columns multiplied in one pass; None takes all at once. A pass holds one tangent
            of every activation per column.
        **parts: Whatever the subclass needs to be rebuilt by `type(self)(proto, **parts)`.
    """

    symmetric = False

    def __init__(self, proto: Tensor, *, columns: int | None = None, **parts: Any) -> None:
        super().__init__(proto, columns=columns, **parts)
        self._proto = proto
        self._columns = columns

    def __repr__(self) -> str:
        """Kind, shape, dtype and device."""
        rows, columns = self._sizes()
        return f"{type(self).__name__}({rows} x {columns}, {self.dtype} on {self.device})"

    @abstractmethod
    def _sizes(self) -> tuple[int, int]:
        """The number of rows and columns."""

    @abstractmethod
    def _rows(self, v: Tensor) -> Tensor:
        """Product with k vectors; shape (k, n) to (k, m)."""

    def _rows_into(self, v: Tensor, out: Tensor) -> Tensor:
        """`_rows` written into a buffer (k, m); overridden where that saves an allocation."""
        return out.copy_(self.times_rows(v))

    def _rows_t(self, w: Tensor) -> Tensor:
        """Product of the transpose with k vectors; shape (k, m) to (k, n)."""
        if self.symmetric:
            return self._rows(w)
        raise NotImplementedError(f"{type(self).__name__} has no transposed product")

    # ---- what linear_operator asks of a subclass

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products."""
        return self._proto.dtype

    @property
    def device(self) -> torch.device:
        """The device of the products."""
        return self._proto.device

    def _size(self) -> torch.Size:
        return torch.Size(self._sizes())

    def _transpose_nonbatch(self) -> LinearOperator:
        return self if self.symmetric else TransposedOperator(self._proto, base=self)

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self._times_columns(rhs)

    def _t_matmul(self, rhs: Tensor) -> Tensor:
        return self._times_columns(rhs, transposed=True)

    def _times_columns(self, rhs: Tensor, *, transposed: bool = False) -> Tensor:
        if rhs.ndim == 1:
            return self.times_rows(rhs.unsqueeze(0), transposed=transposed).squeeze(0)
        *batch, n, k = rhs.shape
        rows = rhs.mT.reshape(math.prod(batch) * k, n)
        out = self.times_rows(rows, transposed=transposed)
        return out.reshape(*batch, k, out.shape[-1]).mT

    def times_rows(self, v: Tensor, *, transposed: bool = False) -> Tensor:
        """The product with rows (k, n), `columns` of them at a time; shape (k, m)."""
        product = self._rows_t if transposed else self._rows
        if len(v) == 0:
            return v.new_zeros(0, self._sizes()[1 if transposed else 0])
        if self._columns is None or len(v) <= self._columns:
            return product(v)
        return torch.cat([product(part) for part in v.split(self._columns)])

    def matmul(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
        """The product with a vector (n,), columns (n, k), a batch (..., n, k) or an operator."""
        if isinstance(other, LinearOperator):
            return super().matmul(other)
        size = self.shape[-1]
        if (other.shape[0] if other.ndim == 1 else other.shape[-2]) != size:
            raise ValueError(
                f"{type(self).__name__} of shape {tuple(self.shape)} cannot multiply a tensor of "
                f"shape {tuple(other.shape)}: it takes ({size},) or (..., {size}, k)."
            )
        if other.dtype != self.dtype or other.device != self.device:
            raise ValueError(
                f"{type(self).__name__} is {self.dtype} on {self.device} and the right-hand side "
                f"is {other.dtype} on {other.device}: convert the right-hand side with .to()."
            )
        system = getattr(self, "system", None)
        if system is not None and not torch.compiler.is_compiling():
            system.check(look="glance")
        return self._matmul(other)

    def to_dense(self) -> Tensor:
        """The matrix itself, by products with unit vectors, `DENSE_COLUMNS` at a time or fewer."""
        m, n = self._sizes()
        product, size = (self._rows, n) if n <= m else (self._rows_t, m)
        parts = [product(unit) for unit in self._unit_rows(size)]
        rows = torch.cat(parts) if parts else self._proto.new_zeros(0, max(m, n))
        return rows.mT.contiguous() if n <= m else rows

    def _diagonal(self) -> Tensor:
        parts, start = [], 0
        for unit in self._unit_rows(self._sizes()[0]):
            parts.append(self._rows(unit)[:, start : start + len(unit)].diagonal())
            start += len(unit)
        return torch.cat(parts) if parts else self._proto.new_zeros(0)

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        m, n = self._sizes()
        device = self.device
        return SubmatrixOperator(
            self._proto,
            base=self,
            chosen=(
                torch.arange(m, device=device)[row_index],
                torch.arange(n, device=device)[col_index],
            ),
        )

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Any) -> Tensor:
        columns, place = torch.unique(col_index, return_inverse=True)
        unit = torch.zeros(len(columns), self._sizes()[1], dtype=self.dtype, device=self.device)
        unit[torch.arange(len(columns)), columns] = 1
        return self.times_rows(unit)[place, row_index]

    def __getitem__(self, index: Any) -> Any:
        """A part of the matrix: an operator, or a tensor where an int picks one row or column."""
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) <= 2 and not any(part is Ellipsis for part in parts):
            # linear_operator reads -1 as the empty slice from -1 to 0, and counts a mask's zeros.
            index = tuple(_place(i, n) for i, n in zip(parts, self._sizes(), strict=False))
        return super().__getitem__(index)

    def _unit_rows(self, size: int) -> Iterator[Tensor]:
        step = min(DENSE_COLUMNS, self._columns or DENSE_COLUMNS)
        for start in range(0, size, step):
            k = min(step, size - start)
            unit = torch.zeros(k, size, dtype=self.dtype, device=self.device)
            unit[torch.arange(k), torch.arange(start, start + k)] = 1
            yield unit

    def _unsqueeze_batch(self, dim: int) -> LinearOperator:
        raise NotImplementedError(
            f"{type(self).__name__} is one matrix and takes no batch dimension: multiply a batch "
            "of right-hand sides instead."
        )

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> LinearOperator:
        if len(batch_shape) == 0:
            return self
        return self._unsqueeze_batch(0)

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def to_scipy(self) -> Any:
        """This operator as a `scipy.sparse.linalg.LinearOperator` on NumPy arrays."""
        from .scipy_bridge import to_scipy

        return to_scipy(self)

    def to(self, *args: Any, **kwargs: Any) -> LinearOperator:
        """Itself, if that asks for nothing new: a linearisation keeps its dtype and device.

        Raises:
            NotImplementedError: Another dtype or device was asked for.
        """
        wanted = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if (wanted.dtype, wanted.device) == (self.dtype, self.device):
            return self
        raise NotImplementedError(
            f"{type(self).__name__} keeps the dtype and device of its linearisation: convert the "
            "model and make a new problem, or convert the right-hand side."
        )

    def type(self, dtype: torch.dtype) -> LinearOperator:
        """As `to`."""
        return self.to(dtype)

    def float(self, device_id: str | None = None) -> LinearOperator:
        """As `to`."""
        return self.to(torch.float32)

    def double(self, device_id: str | None = None) -> LinearOperator:
        """As `to`."""
        return self.to(torch.float64)

    def half(self, device_id: str | None = None) -> LinearOperator:
        """As `to`."""
        return self.to(torch.float16)


class TransposedOperator(MatrixFreeOperator):
    """The transpose of a `MatrixFreeOperator`, sharing its linearisation."""

    def __init__(self, proto: Tensor, *, base: MatrixFreeOperator, columns: int | None = None):
        super().__init__(proto, columns=base._columns, base=base)
        self.base = base

    def _sizes(self) -> tuple[int, int]:
        m, n = self.base._sizes()
        return n, m

    def _rows(self, v: Tensor) -> Tensor:
        return self.base._rows_t(v)

    def _rows_t(self, w: Tensor) -> Tensor:
        return self.base._rows(w)

    def _transpose_nonbatch(self) -> LinearOperator:
        return self.base


class SubmatrixOperator(MatrixFreeOperator):
    """Chosen rows and columns of an operator; one product of the whole operator per product."""

    def __init__(
        self,
        proto: Tensor,
        *,
        base: MatrixFreeOperator,
        chosen: tuple[Tensor, Tensor],
        columns: int | None = None,
    ):
        super().__init__(proto, columns=base._columns, base=base, chosen=chosen)
        self.base, self.chosen = base, chosen

    def _sizes(self) -> tuple[int, int]:
        return len(self.chosen[0]), len(self.chosen[1])

    def _rows(self, v: Tensor) -> Tensor:
        whole = v.new_zeros(len(v), self.base._sizes()[1])
        return self.base._rows(whole.index_add(1, self.chosen[1], v))[:, self.chosen[0]]

    def _rows_t(self, w: Tensor) -> Tensor:
        whole = w.new_zeros(len(w), self.base._sizes()[0])
        return self.base._rows_t(whole.index_add(1, self.chosen[0], w))[:, self.chosen[1]]


class ZeroOperator(MatrixFreeOperator):
    """An exact zero, so that an absent cost still multiplies.

    (The product of `linear_operator`'s own zero is no tensor.)

    Args:
        proto: Carries dtype and device.
        sizes: The number of rows and columns.
        columns: Columns per pass.
    """

    def __init__(
        self, proto: Tensor, *, sizes: tuple[int, int], columns: int | None = None
    ) -> None:
        super().__init__(proto, columns=columns, sizes=sizes)
        self.sizes = sizes

    def _sizes(self) -> tuple[int, int]:
        return self.sizes

    def _rows(self, v: Tensor) -> Tensor:
        return v.new_zeros(len(v), self.sizes[0])

    def _rows_t(self, w: Tensor) -> Tensor:
        return w.new_zeros(len(w), self.sizes[1])


def _place(index: Any, size: int) -> Any:
    """An integer counted from the start, a mask as indices; anything else as it is."""
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        return index.nonzero().squeeze(-1)
    if not isinstance(index, int) or isinstance(index, bool):
        return index
    if not -size <= index < size:
        raise IndexError(f"index {index} is out of range for an axis of size {size}.")
    return index % size
