"""Whether samples meet is found exactly, whatever rows meet whatever other rows."""

import itertools

import pytest
import torch
from oracle import dense_jacobian
from small_models import normal
from torch import nn

import llqr_mf as lq
from llqr_mf.gram import closed_form_gram
from llqr_mf.output_sweep import mixed_values, samples_are_apart, subsets_that_separate
from llqr_mf.preconditioners.squared_gradients import squared_gradients

N = 8


class Mixed(nn.Module):
    """Two layers, and between them something that may let rows meet."""

    def __init__(self, mix, opaque=False):
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(3, 4), mix, nn.Linear(4, 2)
        self.opaque = opaque

    def forward(self, x):
        if self.opaque and x.ndim != 2:
            raise ValueError("rows, please")
        return self.last(self.mix(torch.tanh(self.first(x))))


class Mix(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Opaque(Mix):
    """The same in a module that is not looked into."""

    def forward(self, x):
        if x.ndim != 2:
            raise ValueError("rows, please")
        return self.function(x)


def attention(x):
    return torch.softmax(x @ x.mT, -1) @ x


def sorted_rows(x):
    return x + x.sort(0).values


def pair(n, m):
    """Row m sees row n, and nobody else anybody."""

    def function(x):
        seen = torch.zeros(len(x), 1, dtype=x.dtype)
        seen[m] = 0.3
        return x + seen * x[n]

    return function


MIXES = {
    "roll 1": lambda x: x + 0.5 * x.roll(1, 0),
    "roll 2": lambda x: x + 0.5 * x.roll(2, 0),
    "roll 4": lambda x: x + 0.5 * x.roll(4, 0),
    "flip": lambda x: x + 0.5 * x.flip(0),
    "moved only": lambda x: x.roll(2, 0),
    "same parity": lambda x: x + x[[2, 3, 0, 1, 6, 7, 4, 5]],
    "same half": lambda x: x + x[[1, 0, 3, 2, 5, 4, 7, 6]],
    "differences": lambda x: x + 0.5 * (x[[2, 3, 4, 5, 6, 7, 0, 1]] - x[[4, 5, 6, 7, 0, 1, 2, 3]]),
    "of features": lambda x: x + (x[:, :1] - x[:, 1:2]).roll(2, 0),
    "attention": attention,
    "sort": sorted_rows,
    "square": lambda x: x + 0.1 * x.square().roll(6, 0),
}


def problem_of(model, *, samples=N, damping=0.1):
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    targets = torch.arange(samples) % 2
    inputs = normal(samples, 3, seed=1)
    layers = lq.split(model.double())
    return lq.LQRProblem.from_network(
        layers, inputs, targets, loss="cross_entropy", damping=damping
    )


@pytest.mark.parametrize("wrap", [Mix, Opaque])
@pytest.mark.parametrize("name", MIXES)
def test_rows_that_meet_are_found(name, wrap):
    problem = problem_of(Mixed(wrap(MIXES[name])))
    assert not samples_are_apart(problem)
    assert closed_form_gram(problem) is None


@pytest.mark.parametrize("n, m", list(itertools.permutations(range(5), 2)))
def test_a_single_pair_is_found(n, m):
    assert not samples_are_apart(problem_of(Mixed(Mix(pair(n, m))), samples=5))


@pytest.mark.parametrize("wrap", [Mix, Opaque])
def test_rows_that_do_not_meet_are_apart(wrap):
    """Products of a row with itself, and numbers per row and for all rows."""
    mix = wrap(lambda x: x * x.sum(1, keepdim=True) + torch.arange(len(x)).unsqueeze(1) * x)
    assert samples_are_apart(problem_of(Mixed(mix)))


@pytest.mark.parametrize("elements", [1, 2**22])
def test_columns_per_pass_change_no_answer(monkeypatch, elements):
    monkeypatch.setattr("llqr_mf.output_sweep.PROBED_ELEMENTS", elements)
    assert not samples_are_apart(problem_of(Mixed(Mix(MIXES["flip"]))))
    assert samples_are_apart(problem_of(Mixed(Mix(torch.square))))


def test_one_sample_meets_nobody():
    assert samples_are_apart(problem_of(Mixed(Mix(MIXES["flip"])), samples=1))


@pytest.mark.parametrize("name", ["roll 2", "flip"])
def test_squares_and_maps_behind_such_rows_are_the_dense_ones(name):
    """Those behind the mix exactly; before it they are estimates, and say so."""
    model = Mixed(Mix(MIXES[name]))
    problem = problem_of(model)
    curved = problem.hessian.to_dense() - 0.1 * torch.eye(problem.size)
    squares = squared_gradients(problem)
    jacobian = dense_jacobian(model, normal(N, 3, seed=1))
    assert torch.allclose(jacobian.mT @ problem.Q[-1].to_dense() @ jacobian, curved, atol=1e-13)
    diagonal = dict(zip(problem.names, curved.diagonal().split(problem.system.sizes), strict=True))
    last = diagonal["last.weight"]
    assert torch.allclose(squares["last.weight"].flatten(), last, rtol=1e-10)
    found = lq.probe.cross_layer(problem)
    assert found.method != "exact" and bool((found.standard_error > 0).any())


class Vector(nn.Module):
    """A batch of numbers: Linear takes it for one sample of as many features."""

    def __init__(self):
        super().__init__()
        self.scale, self.across = nn.Parameter(torch.ones(1)), nn.Linear(N, N)

    def forward(self, x):
        return self.across(torch.tanh(self.scale * x))


def test_a_linear_layer_across_the_samples_mixes_them():
    model = Vector().double()
    problem = lq.LQRProblem.from_network(
        lq.split(model), normal(N, seed=1), normal(N, seed=2), loss="mse", damping=0.1
    )
    assert mixed_values(problem)
    assert not samples_are_apart(problem)


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 6, 7, 20, 21, 64, 300])
def test_every_pair_is_separated(samples):
    subsets = subsets_that_separate(samples)
    apart = (subsets.mT.unsqueeze(1) & ~subsets.mT).any(-1)
    assert bool((apart | torch.eye(samples, dtype=torch.bool)).all())
    # log2(N) bits are needed, and half a log of that more.
    assert len(subsets) <= max(2, samples.bit_length() + 3)
