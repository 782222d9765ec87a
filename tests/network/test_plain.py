"""Models that are wrapped, compiled, sharded or not made yet: what to pass instead."""

import warnings

import pytest
import torch
from small_models import normal
from torch import nn

import llqr_mf as lq

X, Y = normal(6, 4, dtype=torch.float32), normal(6, 2, seed=1, dtype=torch.float32)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(mlp(), X)


class Sharded(nn.Module):
    """As fully_shard leaves a module: its parameters have placements."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))
        self.weight.placements = ()
        self.weight.full_tensor = lambda: self.weight

    def forward(self, x):
        return x @ self.weight.mT


class FSDPModule:
    """The class that fully_shard mixes into a module's own."""


class FSDPLinear(FSDPModule, nn.Linear):
    def __init__(self):
        super().__init__(4, 2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: torch.compile(mlp(), backend="eager"), r"give the module .*model\._orig_mod"),
        (lambda: nn.DataParallel(mlp()), "model is a DataParallel.* the module inside it"),
        (scripted, "split the original module"),
        (lambda: nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 2)), "'0.weight' is not initialized"),
        (lambda: nn.Linear(4, 2, device="meta"), "'weight' is on the meta device"),
        (lambda: nn.Sequential(nn.DataParallel(mlp())), "'0' is a DataParallel"),
        (FSDPLinear, "model is sharded by fully_shard"),
        (Sharded, r"'weight' is a DTensor.*full_tensor"),
    ],
)
def test_what_a_training_script_may_hold(model, message):
    model = model()
    with pytest.raises(ValueError, match=message):
        lq.split(model)
    with pytest.raises(ValueError, match=message):
        lq.split([model])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of dynamo itself
@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_part_is_seen_through(in_place):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 5), mlp_of(5), nn.Linear(5, 2))
    torch.manual_seed(0)
    inner = mlp_of(5)
    if in_place:
        inner.compile(backend="eager")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), inner, nn.Linear(5, 2))
    if not in_place:
        model[1] = torch.compile(inner, backend="eager")
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        p.data.copy_(q.data)
    found, wanted = (
        lq.LQRProblem.from_network(lq.split(m), X, Y, loss="mse") for m in (model, plain)
    )
    assert found.horizon == wanted.horizon
    v = normal(wanted.size, dtype=torch.float32)
    assert torch.equal(found.hessian @ v, wanted.hessian @ v)


def mlp_of(width):
    return nn.Sequential(nn.Linear(width, width), nn.Tanh())
