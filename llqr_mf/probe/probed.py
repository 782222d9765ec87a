"""What is probed: one symmetric operator, its products counted, and vectors drawn for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from linear_operator import LinearOperator
from torch import Tensor
from tqdm import tqdm

from ..operators import System
from ..operators.apply import as_operator
from ..problem import LQRProblem
from ..solvers.dots import row_dots
from ..solvers.product import CountedProduct, RowProduct, multiply
from ..streamed import StreamedProblem
from .draws import Kind, check_kind, draw
from .journal import ROUNDINGS, Journal

VIEWS = 8
"""Random vectors that a fingerprint of an operator sees its product from."""

Probeable: TypeAlias = LinearOperator | Tensor | LQRProblem | StreamedProblem
"""A symmetric operator or matrix (n, n), or a problem, whose Hessian (with R) is meant."""


class Probed:
    """A symmetric operator and the vectors that an estimator multiplies it by.

    Args:
        A: The operator. A closure goes through `lq.operators.from_function` first.
        seed: Of the random vectors.
        probes: Their distribution.
        columns: Vectors in memory at a time.
        progress: Whether to show a progress bar over the vectors.
        checkpoint: A folder to go on from and to keep what is done in, or None.
        header: What tells this computation from others in that file.
        started_from: Rows (j, n) that it starts from, which tell it from others, too.
        preconditioner: What it is preconditioned by, likewise.

    Raises:
        TypeError: A is something else.
        ValueError: A is not square, or a tensor that is not symmetric, or an option is unknown.
    """

    def __init__(
        self,
        A: Probeable,
        *,
        seed: int,
        probes: Kind = "rademacher",
        columns: int | None = None,
        progress: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        header: dict[str, Any] | None = None,
        started_from: Tensor | None = None,
        preconditioner: RowProduct | None = None,
    ) -> None:
        check_kind(probes)
        if seed < 0:
            raise ValueError(f"seed is {seed}: give a number that is not negative.")
        if columns is not None and columns < 1:
            raise ValueError(f"columns is {columns}: give at least 1, or None.")
        self.operator = symmetric_operator(A)
        system = getattr(A, "system", None)
        if isinstance(system, System):
            # As `solve`: a product sees only those writes that torch counts.
            system.check(look="all")
        self.size: int = self.operator.shape[-1]
        self.seed, self.kind, self.columns, self.progress = seed, probes, columns, progress
        self.times = CountedProduct(self.operator)
        self.proto = torch.empty(0, dtype=self.operator.dtype, device=self.operator.device)
        self._also = started_from, preconditioner
        self.journal = self._journal(A, checkpoint, header or {})

    @property
    def products(self) -> int:
        """Vectors multiplied so far."""
        return self.times.vectors

    def draw(self, indices: range) -> Tensor:
        """Random rows (k, n) by number: always the same ones."""
        return draw(self.kind, self.size, indices, self.seed, self.proto)

    @torch.no_grad()
    def map(
        self,
        count: int,
        function: Callable[[Tensor], tuple[Tensor, ...]],
        *,
        start: int = 0,
        name: str = "probes",
    ) -> tuple[Tensor, ...]:
        """A function of each random vector, `columns` of them at a time, results stacked.

        Chunks found in the journal are not computed again.

        Args:
            count: Vectors.
            function: Rows (c, n) to tensors whose first axis is c.
            start: The number of the first vector.
            name: On the progress bar and in the journal.

        Raises:
            ValueError: A product was not finite.
        """
        step = count if self.columns is None else self.columns
        chunks = [range(i, min(i + step, start + count)) for i in range(start, start + count, step)]
        made: list[tuple[Tensor, ...]] = []
        with tqdm(total=count, desc=name, disable=not self.progress) as bar:
            for chunk in chunks:
                key = f"{name} {chunk.start}:{chunk.stop}"
                found = self.journal.get(key)
                if found is None:
                    before = self.times.vectors
                    found = function(self.draw(chunk))
                    self.times.check()
                    spent = torch.tensor(self.times.vectors - before)
                    self.journal.put(key, (*found, spent))
                else:
                    *kept, spent = found
                    self.times.vectors += int(spent)
                    found = tuple(tensor.to(self.proto.device) for tensor in kept)
                made.append(found)
                bar.update(len(chunk))
        return tuple(torch.cat(parts) for parts in zip(*made, strict=True))

    @torch.no_grad()
    def _journal(
        self, A: Probeable, path: str | os.PathLike[str] | None, header: dict[str, Any]
    ) -> Journal:
        if path is None:
            return Journal(None, {}, self.proto)
        damping = None
        if isinstance(A, LQRProblem | StreamedProblem):
            values = A.control_cost.block_values
            damping = "operator" if values is None else list(values)
        header = {
            **header,
            "size": self.size,
            "dtype": str(self.proto.dtype),
            "seed": self.seed,
            "probes": self.kind,
            "columns": self.columns,
            "damping": damping,
        }
        told_by = [self.times(self.draw(range(1)))]
        self.times.check()
        self.times.vectors = 0
        started_from, preconditioner = self._also
        if preconditioner is not None:
            told_by.append(preconditioned(preconditioner, self.draw(range(1))))
        if started_from is not None:
            told_by.append(started_from.to(self.proto))
        marks, tolerances = zip(*(self._marks(rows) for rows in told_by), strict=True)
        return Journal(path, header, torch.cat(marks), torch.cat(tolerances))

    def _marks(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What rows (j, n) are told from others by, and by how much that may differ."""
        views = [self.draw(range(i, i + 1)).expand_as(rows) for i in range(VIEWS)]
        seen = torch.cat([row_dots(view, rows) for view in views])
        # Vectors of unit variance: a rounding of a row moves each by eps |row|.
        size = rows.double().norm(dim=1).repeat(VIEWS)
        return seen.cpu(), ROUNDINGS * torch.finfo(self.proto.dtype).eps * size.cpu()


def preconditioned(preconditioner: RowProduct | None, r: Tensor) -> Tensor:
    """M r, in the dtype of r."""
    if preconditioner is None:
        return r
    narrow = preconditioner.dtype if isinstance(preconditioner, LinearOperator) else r.dtype
    return multiply(preconditioner, r.to(narrow), None).to(r.dtype)


def symmetric_operator(A: Probeable) -> LinearOperator:
    """The operator that is meant by an operator, a matrix or a problem.

    Raises:
        TypeError: It is none of these.
        ValueError: It is not square, or a tensor that is not symmetric.
    """
    if isinstance(A, LQRProblem | StreamedProblem):
        return A.hessian
    if not isinstance(A, LinearOperator | Tensor):
        raise TypeError(
            f"A is a {type(A).__name__}: give a problem, a symmetric operator or matrix, or wrap a "
            "function with lq.operators.from_function(function, size)."
        )
    if len(A.shape) != 2 or A.shape[0] != A.shape[1] or not A.shape[0]:
        raise ValueError(f"A has shape {tuple(A.shape)}: only square operators are probed.")
    if not A.dtype.is_floating_point:
        raise ValueError(f"A is {A.dtype}: convert it to a floating-point dtype.")
    if isinstance(A, Tensor) and not torch.allclose(A, A.mT):
        raise ValueError("A is not symmetric: give (A + A.mT) / 2.")
    return as_operator(A)
