"""What the methods are given and what they give back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..operators.apply import apply_rows
from ..problem import LQRProblem
from ..solvers.residual import Measured, can_measure, measure
from ..streamed import StreamedProblem

Problem: TypeAlias = LQRProblem | StreamedProblem

Products = Literal["plain", "compiled", "graphed", "bf16", "tf32"]


@dataclass(frozen=True)
class Options:
    """The options of `solve`, checked.

    Args:
        problem: The problem.
        rhs: A right-hand side in place of -g, (P,) or (P, k).
        previous: The step that momentum starts from, already scaled by it, (P,).
        rtol: Wanted relative residual.
        max_iterations: Limit, or None.
        preconditioner: About H^{-1}, or None.
        initial: First iterate, or None.
        radius: Trust region, or None.
        on_negative_curvature: What CG does there.
        recurrence_dtype: Of CG's vectors, or None.
        flexible: Whether the preconditioner changes.
        products: How CG's products are run.
        vector_device: Where CG's vectors live, or None.
        progress: Whether to show a bar.
        form_step: Whether the step itself is wanted, or its costate will do.
        give_up: For CG: sees iterations and residual, and says when another method costs less.
    """

    problem: Problem
    rhs: Tensor | None
    previous: Tensor | None
    rtol: float
    max_iterations: int | None
    preconditioner: Any
    initial: Tensor | None
    radius: float | None
    on_negative_curvature: Any
    recurrence_dtype: torch.dtype | None
    flexible: bool
    products: Products
    vector_device: torch.device | str | None
    progress: bool
    form_step: bool
    give_up: Callable[[int, float], bool] | None = None

    @cached_property
    def b(self) -> Tensor:
        """The right-hand side of the correction that is solved for, (P,) or (P, k)."""
        b = -self.problem.gradient if self.rhs is None else self.rhs
        if self.previous is None:
            return b
        # (H + R) u = -g + R u_old, in v = u - u_old: what R pulls to moves, the curvature does not.
        rows = self.previous.unsqueeze(0)
        bent = apply_rows(self.problem.hessian, rows)
        return b - bent[0] + self.problem.control_cost.product(rows)[0]

    @property
    def initial_correction(self) -> Tensor | None:
        """Where CG starts, which solves for the correction."""
        if self.initial is None or self.previous is None:
            return self.initial
        return self.initial - self.previous

    def complete(self, correction: Tensor) -> Tensor:
        """The step of which b's solution is the correction."""
        return correction if self.previous is None else correction + self.previous

    @property
    def in_output_space(self) -> bool:
        """Whether -g is the right-hand side of a network's problem, so that it is J' of q."""
        problem = self.problem
        is_network = isinstance(problem, LQRProblem) and problem.origin is not None
        return is_network and self.rhs is None

    def measure(self, step: Tensor) -> Measured | None:
        """The true residual of a step, where that takes no second step's memory."""
        problem = self.problem
        if not self.in_output_space:
            return None
        assert isinstance(problem, LQRProblem)
        if not can_measure(problem.system):
            return None
        anchor = None if self.previous is None else self.previous.unsqueeze(0)
        return measure(problem.system, step.unsqueeze(0), problem.output_gradient, anchor)


@dataclass(frozen=True)
class Found:
    """What a method found.

    Args:
        step: In the shape of the right-hand side; None where only the costate is known.
        status: How it ended.
        iterations: Of CG or the like.
        products: Condensed products spent.
        relative: Relative residual, where the method has measured it.
        decrease: The model's decrease, likewise.
        extra: Further fields of a `Solution`.
    """

    step: Tensor | None
    status: Any
    iterations: int = 0
    products: int = 0
    relative: float | None = None
    decrease: float | None = None
    extra: dict[str, Any] | None = None


def rows_of(b: Tensor) -> Tensor:
    """Rows (k, P) of what is (P,) or (P, k)."""
    return b.reshape(1, -1) if b.ndim == 1 else b.mT


def like(rows: Tensor, b: Tensor) -> Tensor:
    """Rows (k, P) in the shape of b."""
    return rows[0] if b.ndim == 1 else rows.mT


def worst(miss: Tensor, norm: Tensor) -> float:
    """The largest |H u - b| / |b| of all columns; |H u| where b is zero."""
    return float(torch.where(norm > 0, miss / norm, miss).max())


def has_inverse(problem: LQRProblem) -> bool:
    """Whether R^{-1} is positive and finite in the dtype of the products, where R is numbers."""
    values = problem.control_cost.block_values
    limits = torch.finfo(problem.dtype)
    return values is None or all(v <= 0 or 1 / limits.max < v < 1 / limits.tiny for v in values)


def check_inverse(problem: LQRProblem, method: str) -> None:
    """Raises a ValueError where R is of numbers that have no inverse in the dtype."""
    if not has_inverse(problem):
        values = problem.control_cost.block_values
        raise ValueError(
            f"method='{method}' needs R^{{-1}}, which overflows {problem.dtype} for damping "
            f"{min(values or ())}: raise the damping, use a wider dtype, or method='cg'."
        )
