"""What the Krylov solvers share: blocks of columns and the true residual."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from linear_operator import LinearOperator
from torch import Tensor
from tqdm import tqdm

from .dots import row_norms
from .product import Product, Vectors
from .product import RowProduct as RowProduct
from .status import SEVERITY, Code, Status

FLOAT64_VECTORS = 2**24
"""Block size n * k up to which the recurrences run in float64 unless told otherwise."""

MAX_RESTARTS = 3
"""How often a solve starts again from its true residual."""

RUNNING = -1
"""Place of a column's code in `SEVERITY` while it has none."""


@dataclass(frozen=True, eq=False)
class KrylovResult:
    """The answer of an iterative solve.

    Attributes:
        x: The solution in the dtype of b; shape of b.
        iterations: Iterations of the block, all restarts together.
        residual_norm: |b - A x| / |b|, recomputed from x; 0 for a zero b. Float64, shape () or
            (k,).
        status: How the solve ended; of a block, how its worst column ended.
        codes: How each column ended.
        products: Products with the operator; a block of k vectors is one product.
    """

    x: Tensor
    iterations: int
    residual_norm: Tensor
    status: Status
    codes: tuple[Code, ...]
    products: int


def default_iterations(n: int) -> int:
    """Twice the size and some, since rounding delays small systems, and 1000 at most."""
    return min(2 * n + 50, 1000)


class System:
    """A x = b for k columns at once, kept as rows.

    Args:
        operator: A, symmetric.
        b: Right-hand sides; shape (n,) or (n, k).
        preconditioner: Approximates the inverse of A; positive definite.
        rtol: Tolerance relative to |b_j|, column by column.
        atol: Absolute tolerance.
        recurrence_dtype: Dtype of the vectors; None takes float64 for a block of at most
            `FLOAT64_VECTORS` numbers, else b's dtype, and float32 at least.
        vector_device: Where the vectors live; None is b's device. Products stay on b's.

    Raises:
        ValueError: An argument has the wrong shape, dtype or range, or b is not finite.
    """

    def __init__(
        self,
        operator: RowProduct,
        b: Tensor,
        *,
        preconditioner: RowProduct | None,
        rtol: float,
        atol: float,
        recurrence_dtype: torch.dtype | None,
        vector_device: torch.device | str | None = None,
    ) -> None:
        if b.ndim not in (1, 2):
            raise ValueError(f"b has shape {tuple(b.shape)}: give (n,) or columns (n, k).")
        if not b.is_floating_point():
            raise ValueError(
                f"b is {b.dtype}: give real floating-point numbers; complex ones as real and "
                "imaginary parts (torch.view_as_real)."
            )
        if not 0 <= rtol < math.inf or not 0 <= atol < math.inf:
            raise ValueError(
                f"rtol is {rtol} and atol is {atol}: give finite numbers that are not negative."
            )
        _check_fit("operator", operator, b)
        self.is_vector = b.ndim == 1
        self.dtype, self.device = b.dtype, b.device
        device = b.device if vector_device is None else _device(vector_device)
        self.b = self.rows_of(b, device)
        k, n = self.b.shape
        pinned = device.type == "cpu" and b.device.type == "cuda"
        self.vectors = Vectors((k, n), recurrence_dtype or _default_dtype(b), device, pinned)
        self.multiply = Product(operator, self.dtype, b.device, self.vectors)
        self.precondition: Product | None = None
        if preconditioner is not None:
            its_dtype = _check_fit("preconditioner", preconditioner, b)
            self.precondition = Product(
                preconditioner, its_dtype, b.device, self.vectors, self.multiply
            )
        self.b_norm = row_norms(self.b).to(device)
        if not bool(self.b_norm.isfinite().all()):
            raise ValueError("b holds NaN or infinity: look at the gradient it came from.")
        self.norm_seen = torch.zeros_like(self.b_norm)
        self.tolerance = (rtol * self.b_norm).clamp_(min=atol)

    def rows_of(self, columns: Tensor, device: torch.device) -> Tensor:
        """The rows of a tensor with b's layout; shape (n,) or (n, k) to (k, n).

        Those of a single column are a view, where it is; more are copied to the device.
        """
        if columns.ndim == 1:
            return columns.reshape(1, -1)
        return columns.mT.to(device).contiguous()

    def columns_of(self, rows: Tensor) -> Tensor:
        """Rows in b's layout and on its device; shape (k, n) to (n,) or (n, k)."""
        rows = rows.to(self.device)
        return rows.squeeze(0) if self.is_vector else rows.mT

    def zeros(self) -> Tensor:
        """A block of vectors; shape (k, n)."""
        return self.vectors.empty().zero_()

    def release(self) -> None:
        """Lets go of what the products hold, once the last of them is made."""
        self.multiply.release()
        if self.precondition is not None:
            self.precondition.release()

    def mask(self, columns: list[int]) -> Tensor:
        """Which columns are in a list; shape (k,), bool."""
        chosen = [j in columns for j in range(len(self.b))]
        return torch.tensor(chosen, dtype=torch.bool, device=self.vectors.device)

    def see_norm(self, growth: Tensor) -> Tensor:
        """The largest |A p| / |p| met so far, a lower bound of |A|; shape (k,)."""
        self.norm_seen = torch.fmax(self.norm_seen, growth)
        return self.norm_seen

    def apply_preconditioner(self, r: Tensor) -> Tensor:
        """M r, or r itself."""
        return r if self.precondition is None else self.precondition(r)

    def residual(self, x: Tensor, out: Tensor) -> Tensor:
        """The true b - A x, with x rounded to the dtype of the products."""
        return out.copy_(self.b).sub_(self.multiply(x))

    def start(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """The first iterate and its residual; a zero column starts, and stays, at zero."""
        x = self.zeros()
        if initial is None:
            return x, self.vectors.empty().copy_(self.b)
        shape = (self.b.shape[1],) if self.is_vector else (self.b.shape[1], self.b.shape[0])
        if initial.shape != shape or not bool(initial.isfinite().all()):
            raise ValueError(f"initial must be finite and of b's shape {shape}.")
        x.copy_(self.rows_of(initial, self.vectors.device).to(self.dtype))
        x.masked_fill_((self.b_norm == 0).unsqueeze(-1), 0)
        return x, self.residual(x, out=self.vectors.empty())

    def relative(self, norm: Tensor) -> Tensor:
        """Residual norms over |b|; a column where both are zero has 0."""
        return torch.where(norm == 0, norm, norm / self.b_norm)


Ends: TypeAlias = dict[int, Code]
"""How the columns that ended did."""

Run: TypeAlias = Callable[[Tensor, Tensor, list[int], int], tuple[Ends, int]]
"""One run of a recurrence: (x, r, todo, budget) to the ends and the number of iterations. It
advances columns `todo` of x, leaves the others as they are, and may overwrite r."""


def solve_to_true_residual(
    system: System, x: Tensor, r: Tensor, run: Run, max_iterations: int
) -> tuple[Tensor, tuple[Code, ...], Tensor, int]:
    """Runs a recurrence, and again from the true residual while that is of use.

    Args:
        system: The equations.
        x: First iterate; shape (k, n). Overwritten.
        r: Its true residual. Overwritten.
        run: One run of the recurrence.
        max_iterations: Iterations of all runs together.

    Returns:
        x rounded to b's dtype, the code of every column, the true residual norms and the number
        of iterations.
    """
    norm = row_norms(r)
    kept: Tensor | None = None
    codes = [Code.CONVERGED] * len(x)
    todo = [j for j, small in enumerate((norm <= system.tolerance).tolist()) if not small]
    iterations, restarts = 0, -1
    while todo:
        ended, took = run(x, r, todo, max_iterations - iterations)
        iterations, restarts = iterations + took, restarts + 1
        previous, norm = norm, row_norms(system.residual(x, out=r))
        if kept is None:
            # Where the dtypes agree this is x itself.
            kept = x.to(system.dtype)
        else:
            # A restart that made its column worse is undone; a step to the boundary is an answer.
            undoable = [j for j in todo if ended.get(j) is not Code.TRUST_REGION]
            undo = system.mask(undoable) & (norm > previous)
            kept = torch.where(undo.unsqueeze(-1), kept, x.to(system.dtype))
            norm = torch.where(undo, previous, norm)
        # Rounding x and the product make an error of this size, which no restart gets rid of. The
        # 4 is for |A|: of A with a log-uniform spectrum a third is seen.
        floor = 4 * torch.finfo(system.dtype).eps * system.norm_seen * row_norms(kept)
        hopeful = (norm > floor) & (norm <= previous / 2)
        small, hopeful, finite = torch.stack(
            [norm <= system.tolerance, hopeful, norm.isfinite()]
        ).tolist()
        again = []
        for j in todo:
            codes[j] = ended.get(j, Code.MAX_ITERATIONS)
            if codes[j] not in (Code.CONVERGED, Code.MAX_ITERATIONS):
                continue
            if small[j]:
                codes[j] = Code.CONVERGED
            elif not finite[j]:
                codes[j] = Code.NOT_FINITE
            elif iterations >= max_iterations or ended.get(j) is Code.MAX_ITERATIONS:
                codes[j] = Code.MAX_ITERATIONS
            else:
                codes[j] = Code.STAGNATED
                if hopeful[j] and restarts < MAX_RESTARTS:
                    again.append(j)
        todo = again
        if todo:
            x.copy_(kept)
            kept = kept.clone() if kept is x else kept
    system.release()
    kept = x.to(system.dtype) if kept is None else kept
    return kept, tuple(codes), norm, iterations


def first_event(running: Tensor, events: dict[Code, Tensor]) -> Tensor:
    """The place in `SEVERITY` of each column's first event that holds, else `RUNNING`."""
    outcome = torch.full(running.shape, RUNNING, device=running.device)
    for code, holds in reversed(events.items()):
        outcome = torch.where(running & holds, SEVERITY.index(code), outcome)
    return outcome


def read_events(places: list[float]) -> Ends:
    """The events among the places that `first_event` gave."""
    return {j: SEVERITY[int(place)] for j, place in enumerate(places) if place != RUNNING}


def per_row(coefficient: Tensor, block: Tensor) -> Tensor:
    """One number per row, to multiply a block with; shape (k,) to (k, 1), in the block's dtype."""
    return coefficient.to(block.dtype).unsqueeze(-1)


def show_progress(bar: tqdm, residuals: list[float]) -> None:
    """One iteration on a bar, with the worst relative residual."""
    if not bar.disable:
        bar.set_postfix(residual=f"{max(residuals):.1e}", refresh=False)
        bar.update()


def _check_fit(name: str, operator: RowProduct, b: Tensor) -> torch.dtype:
    """The dtype of an operator's products, once it is seen to fit b."""
    if not isinstance(operator, LinearOperator):
        return b.dtype
    if tuple(operator.shape) != (len(b), len(b)):
        raise ValueError(
            f"the {name} of shape {tuple(operator.shape)} does not fit b of shape {tuple(b.shape)}."
        )
    dtype: torch.dtype = operator.dtype
    if dtype.is_complex:
        raise ValueError(f"the {name} is {dtype}: the solvers take real operators.")
    if operator.device != b.device or (name == "operator" and dtype != b.dtype):
        raise ValueError(
            f"the {name} is {dtype} on {operator.device} and b is {b.dtype} on {b.device}: "
            "convert one of them with .to()."
        )
    return dtype


def _device(name: torch.device | str) -> torch.device:
    """The device with its index, as a tensor there would have it."""
    try:
        return torch.empty(0, device=name).device
    except RuntimeError as error:
        raise ValueError(f"vector_device={name!r} cannot hold a tensor: {error}") from error


def _default_dtype(b: Tensor) -> torch.dtype:
    if b.numel() <= FLOAT64_VECTORS:
        return torch.float64
    return torch.promote_types(b.dtype, torch.float32)
