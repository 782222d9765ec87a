"""One problem in three precisions: the narrow answers are the wide one, rounded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import llqr_mf as lq

# Relative error of the steps: the products' rounding times the condition number, about 10 here.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def solve(dtype: torch.dtype, method: str) -> lq.Solution:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 64), nn.ReLU()
    )
    model.append(nn.Linear(64, 5))
    x, y = torch.randn(32, 20), torch.randint(0, 5, (32,))
    problem = lq.LQRProblem.from_network(
        lq.split(model.to(dtype)), x.to(dtype), y, loss="cross_entropy", damping=1e-1
    )
    return lq.solve(problem, method, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("method", ["cg", "dual", "low_rank"])
@pytest.mark.parametrize("dtype", CLOSE)
def test_narrow_steps(dtype: torch.dtype, method: str) -> None:
    wide, narrow = solve(torch.float64, method), solve(dtype, method)
    assert narrow.status.ok and narrow.step.dtype == dtype
    error = (narrow.step.double() - wide.step).norm() / wide.step.norm()
    assert float(error) < CLOSE[dtype]
