"""An estimate of a problem whose weights moved without torch's count."""

import pytest
import torch
from small_models import normal, seeded
from torch import nn

import llqr_mf as lq
from llqr_mf import probe

X, Y = normal(9, 4), torch.arange(9) % 3


def fused(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()


def through_data(model):
    model[0].weight.data.mul_(2)


@pytest.mark.parametrize("move", [fused, through_data])
@pytest.mark.parametrize("given", ["problem", "operator"])
@pytest.mark.parametrize("estimate", [probe.trace, probe.logdet, probe.eigenvalues, probe.diagonal])
def test_is_refused_and_given_once_they_are_back(estimate, given, move):
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()
    problem = lq.LQRProblem.from_network(lq.split(model), X, Y, loss="cross_entropy")
    A = problem if given == "problem" else problem.hessian
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    move(model)
    with pytest.raises(RuntimeError, match="make a new problem"):
        estimate(A)
    model.load_state_dict(before)
    estimate(A)
