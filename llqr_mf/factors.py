"""Factors Q = L L' of the costs, for the methods that work in the output space."""

from __future__ import annotations

import torch
from torch import Tensor

from .operators.apply import apply_rows
from .operators.outer_curvature import OuterCurvature
from .operators.output_curvature import OutputCurvature
from .output_sweep import terminal_factor
from .problem import LQRProblem

DUAL_SIZE = 4096
"""Largest N r, or size of a dense cost, that is factored."""


def output_factor(problem: LQRProblem) -> OutputCurvature:
    """Q_T with a factor: its own, or that of the dense matrix if it is small."""
    factor = terminal_factor(problem)
    if factor is not None:
        return factor
    system = problem.system
    costs = system.state_costs[-1]
    if system.curved or len(costs) != 1 or problem.Q[-1].shape[0] > DUAL_SIZE:
        raise ValueError(
            "method='dual' needs a terminal cost alone, with a known factor or small enough to "
            f"factor (at most {DUAL_SIZE}): here there are costs on other layers, second-order "
            "terms or a larger cost; use method='cg'."
        )
    rows = _dense_factor(problem, problem.horizon)
    return OuterCurvature(system.proto, vectors=rows.mT.unsqueeze(0).contiguous())


def state_factor(problem: LQRProblem, t: int) -> Tensor:
    """Rows F with F'F = Q_t."""
    if t == problem.horizon:
        factor = terminal_factor(problem)
        if factor is not None and factor.rank is not None:
            size = factor.rank * factor.samples
            if size > DUAL_SIZE:
                raise ValueError(
                    f"method='low_rank' would carry N r = {size} > {DUAL_SIZE} columns: use "
                    "method='cg'."
                )
            eye = torch.eye(size, dtype=factor.dtype, device=factor.device)
            return factor.factor(eye.reshape(size, factor.rank, factor.samples))
    return _dense_factor(problem, t)


def _dense_factor(problem: LQRProblem, t: int) -> Tensor:
    operator = problem.Q[t]
    n = operator.shape[0]
    if n > DUAL_SIZE:
        raise ValueError(
            f"Q[{t}] has no known factor and is too large ({n}) to be factored densely: use "
            "method='cg'."
        )
    eye = torch.eye(n, dtype=problem.dtype, device=problem.device)
    dense = apply_rows(operator, eye).double()
    eigenvalues, vectors = torch.linalg.eigh((dense + dense.mT) / 2)
    largest = eigenvalues.abs().max() if n else eigenvalues.sum()
    rounding = largest * n * torch.finfo(problem.dtype).eps
    if n and float(eigenvalues[0]) < -float(rounding):
        raise ValueError(
            f"Q[{t}] is indefinite (least eigenvalue {float(eigenvalues[0]):.3g}), so it has no "
            "factor: use method='cg' or 'riccati'."
        )
    kept = eigenvalues > rounding
    return (vectors[:, kept] * eigenvalues[kept].sqrt()).mT.to(problem.dtype)
