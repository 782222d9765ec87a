"""The low-rank sweep, with the refinement that float32 asks for."""

from __future__ import annotations

import math

import torch

from ..factors import state_factor
from ..operators.tangent import size_of
from ..problem import LQRProblem
from ..solvers.dots import row_norms
from ..solvers.low_rank import low_rank
from ..solvers.status import Code, Status
from .base import Found, Options, check_inverse, like, rows_of, worst

REFINEMENTS = 2
"""Solves of the residual that a sweep is followed by, where float32 asks for them."""


def by_low_rank(options: Options) -> Found:
    """One backward sweep of factors of all P_t, and with it every value and gain."""
    problem = options.problem
    assert isinstance(problem, LQRProblem)
    check_inverse(problem, "low_rank")
    system = problem.system
    factors = [
        state_factor(problem, t) if system.state_costs[t] else None
        for t in range(problem.horizon + 1)
    ]
    terminal = factors[-1]
    if terminal is None:
        terminal = system.proto.new_zeros(0, size_of(system.state_shapes(problem.horizon)))
    result = low_rank(system, terminal, factors[:-1])
    rows = rows_of(options.b)
    norm = row_norms(rows)
    u, left, miss = torch.zeros_like(rows), rows, math.inf
    for _ in range(1 + REFINEMENTS):
        refined = result.solve(left, system).add_(u)
        left = system.condensed_product(refined).neg_().add_(rows)
        before, miss = miss, worst(row_norms(left), norm)
        if not miss < before:
            miss = before
            break
        u = refined
        if miss <= options.rtol:
            break
    values = tuple(result.value(t) for t in range(problem.horizon + 1))
    gains = tuple(result.gain(t) for t in range(problem.horizon))
    rank = max(len(factor) for factor in result.factors)
    code, message = Code.CONVERGED, f"One backward sweep of factors of rank at most {rank}."
    if not miss <= options.rtol:
        code = Code.STAGNATED
        message += (
            f" The residual stays at {miss:.2e}, which the precision of the sweep limits: use "
            "float64 parameters, more damping, a larger rtol, or method='cg'."
        )
    extra = {"values": values, "gains": gains}
    return Found(options.complete(like(u, options.b)), Status(code, message), extra=extra)
