"""P_t, the matrix of the cost-to-go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .base import MatrixFreeOperator
from .system import System
from .tangent import from_rows, size_of, to_rows

TailSolve = Callable[[System, Tensor], Tensor]
"""Solves H u = b on a tail system for rows b of shape (k, P_tail)."""


class ValueOperator(MatrixFreeOperator):
    """P_t: half its quadratic form is the least cost from x_t on; shape (n_t, n_t).

    P_t v is one condensed solve on the tail system started at x_t = v, then one adjoint sweep
    (design.md section 2, fact 2): no solver is nested in another.

    Args:
        proto: Carries dtype and device.
        system: The tail system, from time t.
        solve: Solver of the tail system's condensed equations.
        columns: Columns per pass.
    """

    symmetric = True

    def __init__(
        self, proto: Tensor, *, system: System, solve: TailSolve, columns: int | None = None
    ) -> None:
        super().__init__(proto, columns=columns, system=system, solve=solve)
        self.system, self.solve = system, solve

    def _sizes(self) -> tuple[int, int]:
        n = size_of(self.system.state_shapes(0))
        return n, n

    def _rows(self, v: Tensor) -> Tensor:
        shapes = self.system.state_shapes(0)
        x0 = from_rows(v, shapes)
        u = tail_controls(self.system, self.solve, v)
        zero = tuple(None for _ in self.system.state_shapes(self.system.horizon))
        p0, _ = self.system.adjoint(
            zero, self.system.rollout(u, x0), need_state=True, need_control=False
        )
        return to_rows(p0, shapes, v, len(v))


def tail_controls(system: System, solve: TailSolve, v: Tensor) -> Tensor:
    """The controls that are best from x_t = v on, linear terms left out; shape (k, P_tail)."""
    x0 = from_rows(v, system.state_shapes(0))
    zero = tuple(None for _ in system.state_shapes(system.horizon))
    gradient = system.adjoint(zero, system.rollout(None, x0, columns=len(v)))[1]
    assert gradient is not None
    return differentiable_solve(system, solve, -gradient)


def differentiable_solve(system: System, solve: TailSolve, b: Tensor) -> Tensor:
    """H^{-1} b for rows b, which autograd and `torch.func` see as the linear map it is."""
    out: Tensor = _Solve.apply(b, system, solve)
    return out


class _Solve(torch.autograd.Function):
    """The derivative of a solve with a symmetric matrix is another one, both ways."""

    @staticmethod
    def forward(b: Tensor, system: System, solve: TailSolve) -> Tensor:
        return solve(system, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.system, ctx.solve = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return differentiable_solve(ctx.system, ctx.solve, gradient), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return differentiable_solve(ctx.system, ctx.solve, tangent)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], b: Tensor, system: System, solve: TailSolve
    ) -> tuple[Tensor, int]:
        rows = b.movedim(in_dims[0], 0)
        return differentiable_solve(system, solve, rows.flatten(0, 1)).reshape(rows.shape), 0
