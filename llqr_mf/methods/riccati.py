"""The dense Riccati recursion: the oracle."""

from __future__ import annotations

import torch
from linear_operator.operators import DenseLinearOperator
from torch import Tensor

from ..problem import LQRProblem
from ..solvers.riccati import riccati
from .base import Found, Options, like, rows_of

DENSE_SIZE = 6000
"""Largest state or control that the dense Riccati recursion accepts."""


def by_riccati(options: Options) -> Found:
    """Dense matrices of every layer, in float64, with all values and gains."""
    problem = options.problem
    assert isinstance(problem, LQRProblem)
    system = problem.system
    largest = system.largest_block
    if largest > DENSE_SIZE:
        raise ValueError(
            f"the dense Riccati recursion would form matrices of size {largest} > {DENSE_SIZE}: "
            "use method='cg' or 'dual'."
        )
    steps = []
    result = None
    A, B, Q, R, S = (
        [operator.to_dense() for operator in operators]
        for operators in (problem.A, problem.B, problem.Q, problem.R, problem.S)
    )
    replaced = options.rhs is not None or options.previous is not None
    for column in rows_of(options.b).double():
        q, r, f, x0 = problem.q, problem.r, problem.f, problem.x0
        if replaced:
            # A right-hand side is a linear cost of the controls, in place of all other such terms.
            q, f = (tuple(torch.zeros_like(part) for part in parts) for parts in (q, f))
            pieces = system.split_control(-column.unsqueeze(0))
            empty = column.new_zeros(0)
            r = tuple(torch.cat([empty, *(pieces[i].reshape(-1) for i in o)]) for o in system.owned)
            x0 = torch.zeros_like(x0)
        result = riccati(A, B, Q, R, S, q, r, f, x0)
        steps.append(_flat(problem, result.controls))
    assert result is not None
    extra = {
        "values": tuple(DenseLinearOperator(P) for P in result.values),
        "gains": tuple(DenseLinearOperator(K) for K in result.gains),
    }
    u = torch.stack(steps).to(problem.dtype)
    return Found(options.complete(like(u, options.b)), result.status, extra=extra)


def _flat(problem: LQRProblem, controls: tuple[Tensor, ...]) -> Tensor:
    """Controls per stage as one flat step in the order of the blocks."""
    system = problem.system
    parts: dict[int, Tensor] = {}
    for owned, u in zip(system.owned, controls, strict=True):
        pieces = u.split([system.sizes[i] for i in owned]) if owned else ()
        parts.update(zip(owned, pieces, strict=True))
    return torch.cat([parts[i] for i in range(len(system.blocks))])
