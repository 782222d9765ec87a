"""Preconditioners side by side, beside the exact step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from linear_operator import LinearOperator
from torch import Tensor
from tqdm import tqdm

from ..fitting.measure import Apply, exact_step, mean, measure
from ..fitting.report import format_number, plain_number
from ..methods.base import Problem
from ..operators.apply import apply_rows, as_operator
from ..preconditioners.base import Structure
from ..problem import LQRProblem
from ..streamed import StreamedProblem

Candidate: TypeAlias = LinearOperator | Tensor | Callable[[Tensor], Tensor] | None
"""M as a structure, an operator or a matrix (P, P), a function of rows (k, P); None is I."""


@dataclass(frozen=True)
class ComparisonRow:
    """One preconditioner on the gradients of the problems; J means over the problems.

    Args:
        name: Its name.
        fraction: J(-M g) / J(u*): the share of the exact decrease; negative where the step raises
            the model.
        best_fraction: The same for the best multiple c M, one c for all problems; NaN where M g
            has no positive curvature.
        multiple: That c.
        cosine: Between -M g and the exact step u*.
        falls: Whether the step lowers the model.
        seconds: One product M g, measured once after one to warm up.
        state_bytes: What a structure holds; None of anything else.
    """

    name: str
    fraction: float
    best_fraction: float
    multiple: float
    cosine: float
    falls: bool
    seconds: float
    state_bytes: int | None


@dataclass(frozen=True)
class Comparison:
    """Preconditioners side by side; `print` it, or take `to_dict()` for JSON.

    Args:
        rows: One per preconditioner, in the order given.
        optimum: J(u*) = -1/2 g'H^{-1}g, the mean over the problems.
        problems: How many there were.
        products: Condensed products spent, the exact solves included.
    """

    rows: tuple[ComparisonRow, ...]
    optimum: float
    problems: int
    products: int

    def __getitem__(self, name: str) -> ComparisonRow:
        """The row of that name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"'{name}' was not compared: {[row.name for row in self.rows]}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, NaN as None."""
        rows = [{name: plain_number(x) for name, x in asdict(row).items()} for row in self.rows]
        return {
            "optimum": plain_number(self.optimum),
            "problems": self.problems,
            "products": self.products,
            "rows": rows,
        }

    def __str__(self) -> str:
        """The table."""
        width = max([14, *(len(row.name) for row in self.rows)])
        shape = f"{{:{width}}}{{:>10}}{{:>10}}{{:>12}}{{:>8}}{{:>7}}{{:>11}}{{:>12}}"
        head = ("", "fraction", "at best", "multiple", "cosine", "falls", "seconds", "bytes")
        lines = [
            f"share of the exact decrease {-self.optimum:.6g}, {self.problems} problem(s)",
            shape.format(*head),
        ]
        for row in self.rows:
            numbers = (
                format_number(row.fraction, ".3f"),
                format_number(row.best_fraction, ".3f"),
                format_number(row.multiple, ".3g"),
                format_number(row.cosine, ".3f"),
                "yes" if row.falls else "no",
                format_number(row.seconds, ".2e"),
                "-" if row.state_bytes is None else str(row.state_bytes),
            )
            lines.append(shape.format(row.name, *numbers))
        return "\n".join(lines)


@torch.no_grad()
def compare(
    problems: Problem | Sequence[Problem],
    preconditioners: Mapping[str, Candidate],
    *,
    rtol: float | None = None,
    progress: bool = False,
) -> Comparison:
    """How much of the exact decrease the step -M g of each preconditioner reaches.

    Every problem is solved exactly once, and multiplied by all steps at once. For honest numbers
    take problems of batches on which nothing was fitted.

    Args:
        problems: One or several.
        preconditioners: M by name; see `Candidate`. M may be indefinite.
        rtol: True relative residual of the exact solves. None: 1e-6, and 1e-2 in half precisions.
        progress: Whether to show a progress bar over the problems.

    Returns:
        A table.

    Raises:
        ValueError: There is nothing to compare, a problem has no exact step, or an M does not fit.
    """
    alone = isinstance(problems, LQRProblem | StreamedProblem)
    listed: list[Problem] = [problems] if alone else list(problems)  # type: ignore[list-item, arg-type]
    if not listed or not preconditioners:
        raise ValueError("give at least one problem and one preconditioner.")
    applies = {name: _apply(name, M, listed) for name, M in preconditioners.items()}
    seconds = {name: _seconds(apply, listed[0]) for name, apply in applies.items()}
    exact = []
    for problem in tqdm(listed, desc="exact steps", disable=not progress):
        found = exact_step(problem, rtol=rtol)
        if found.step is None or not found.optimum < 0:
            raise ValueError(
                "a problem has no exact step to compare with (its gradient is zero or not finite, "
                "or H is not positive definite): add damping, or use a Gauss-Newton or Fisher "
                "metric."
            )
        exact.append(found)
    optimum = mean([found.optimum for found in exact])
    measured = measure(list(applies.values()), listed, exact)
    rows = tuple(
        ComparisonRow(
            name=name,
            fraction=m.objective / optimum,
            best_fraction=m.best / optimum,
            multiple=m.multiple,
            cosine=m.cosine,
            falls=m.objective < 0,
            seconds=seconds[name],
            state_bytes=getattr(preconditioners[name], "memory_bytes", None),
        )
        for name, m in zip(applies, measured, strict=True)
    )
    products = len(listed) * len(applies) + sum(found.products for found in exact)
    return Comparison(rows, optimum, len(listed), products)


def _apply(name: str, M: Candidate, problems: Sequence[Problem]) -> Apply:
    """M as a function of rows, once it is known to fit all problems."""
    if M is None:
        return lambda rows: rows
    if isinstance(M, LinearOperator | Tensor):
        operator = as_operator(M)
        size = problems[0].size
        if tuple(operator.shape) != (size, size):
            raise ValueError(f"'{name}' has shape {tuple(operator.shape)}, not {(size, size)}.")
        if isinstance(M, Structure) and any(p.layout != M.layout for p in problems):
            raise ValueError(f"'{name}' was made for other parameters than those of a problem.")
        return lambda rows: apply_rows(operator, rows.to(operator.dtype))
    if not callable(M):
        raise ValueError(
            f"'{name}' is a {type(M).__name__}: give a structure, an operator or matrix (P, P), a "
            "function of rows (k, P), or None."
        )
    return M


def _seconds(apply: Apply, problem: Problem) -> float:
    g = problem.gradient.unsqueeze(0)
    x = apply(g)
    if x.shape != g.shape:
        raise ValueError(
            f"a preconditioner turned rows of shape {tuple(g.shape)} into {tuple(x.shape)}."
        )
    _wait_for(g)
    start = time.perf_counter()
    apply(g)
    _wait_for(g)
    return time.perf_counter() - start


def _wait_for(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
