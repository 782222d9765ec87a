"""A fit on a problem whose weights moved without torch's count is refused."""

import pytest
import torch
from small_models import normal, seeded
from torch import nn

import llqr_mf as lq


def test_a_fit_looks_at_every_weight():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()
    x, y = normal(9, 4), torch.arange(9) % 3
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy")
    M = lq.Diagonal(problem)
    before = {name: t.clone() for name, t in M.tensors.items()}
    model[0].weight.data[0] += 1
    with pytest.raises(RuntimeError, match="make a new problem"):
        lq.fit(M, problem)
    assert all(torch.equal(t, before[name]) for name, t in M.tensors.items())
    model[0].weight.data[0] -= 1
