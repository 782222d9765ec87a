"""A user's code runs as it does in training: with gradients on, and on copies of the batch."""

import pytest
import torch
from oracle import dense_gradient, dense_jacobian
from small_models import normal
from torch import nn
from torch.nn import functional as F

import llqr_mf as lq

X, Y = normal(6, 4), torch.arange(6) % 3


class Force(nn.Module):
    """Differentiates its own inputs, as physics-informed nets and force fields do."""

    def __init__(self, frozen=False):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.energy.requires_grad_(not frozen)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.force(x))

    def force(self, x):
        assert torch.is_grad_enabled()
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return force


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.force = Frozen()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.force(x))


class Frozen(Force):
    """Nothing of it moves, so that its call is evaluated and not linearized."""

    def __init__(self):
        super().__init__(frozen=True)
        self.head.requires_grad_(False)

    def forward(self, x):
        return self.force(x)


class OnConstants(nn.Module):
    """The same of a buffer: no part of the batch comes near it."""

    def __init__(self):
        super().__init__()
        self.force, self.head = Frozen(), nn.Linear(4, 3)
        self.register_buffer("points", torch.randn(1, 4))

    def forward(self, x):
        return self.head(torch.tanh(x + self.force(self.points)))


@pytest.mark.parametrize("build", [Force, Inner, OnConstants])
def test_a_model_that_differentiates_in_its_forward_pass(build):
    torch.manual_seed(0)
    model = build().double()
    problem = lq.LQRProblem.from_network(lq.split(model), X, Y, loss="cross_entropy", damping=0.0)
    assert torch.allclose(
        problem.gradient, dense_gradient(model, X, lambda out: F.cross_entropy(out, Y)), rtol=1e-12
    )
    J = dense_jacobian(model, X)
    assert torch.allclose(problem.output_jacobian.to_dense(), J, rtol=1e-10, atol=1e-12)
    for step in ("base", "subspace"):
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = lq.LLQR(model, base, loss="cross_entropy", step=step)
        assert optimizer.refresh(X, Y)
        if step == "subspace":
            before = F.cross_entropy(model(X), Y).item()
            assert float(optimizer.step(X, Y)) == pytest.approx(before, rel=1e-12)


class Overwrites(nn.Module):
    """Writes to its input where tracing cannot see it."""

    def forward(self, x):
        assert x.dim() == 2
        x[:, 0] = 0
        return x


class Sets(nn.Module):
    def forward(self, x):
        x[:, 0] = 0.0
        return x


@torch.fx.wrap
def overwrite(x):
    x[:, 1] = 0.5
    return x * 2


class Wrapped(nn.Module):
    def forward(self, x):
        return overwrite(x)


FIRST = {
    "relu": lambda: nn.ReLU(inplace=True),
    "elu": lambda: nn.ELU(inplace=True),
    "rrelu": lambda: nn.RReLU(inplace=True),
    "dropout": lambda: nn.Dropout(0.5, inplace=True),
    "threshold": lambda: nn.Threshold(0.5, 0.0, inplace=True),
    "untraceable": Overwrites,
    "index": Sets,
    "wrapped": Wrapped,
}


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("step", ["base", "subspace"])
def test_the_batch_stays_whatever_the_model_does_to_it(first, step):
    torch.manual_seed(0)
    model = nn.Sequential(FIRST[first](), nn.Linear(4, 3)).double()
    x, before = X.clone(), X.clone()
    problem = lq.LQRProblem.from_network(lq.split(model), x, Y, loss="cross_entropy")
    problem.hessian @ problem.gradient
    optimizer = lq.LLQR(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss="cross_entropy", step=step
    )
    optimizer.refresh(x, Y)
    if step == "subspace":
        for _ in range(3):
            optimizer.step(x, Y)
        assert optimizer.counts.skipped == 0
    assert torch.equal(x, before)


def test_integer_inputs_stay_too():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, tokens):
            tokens[tokens == 4] = 0
            return self.head(self.embed(tokens))

    tokens = torch.arange(6) % 5
    before = tokens.clone()
    model = Model().double()
    problem = lq.LQRProblem.from_network(lq.split(model), tokens, Y, loss="cross_entropy")
    problem.hessian @ problem.gradient
    assert torch.equal(tokens, before)


class Views(nn.Module):
    """Views of a parameter, and a parameter, meet calls that have no rule."""

    def __init__(self):
        super().__init__()
        self.weight, self.slope = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.rand(1))
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        h = F.prelu(self.linear(x), self.slope)
        return torch.einsum("nk,kc->nc", h, self.weight[:, 1:4].softmax(1))


def test_weights_and_batch_that_were_put_back_are_accepted():
    torch.manual_seed(0)
    model, x = Views().double(), X.clone()
    problem = lq.LQRProblem.from_network(
        lq.split(model), x, Y, loss="cross_entropy", metric="newton"
    )
    before = problem.hessian @ problem.gradient
    old = [t.detach().clone() for t in (*model.parameters(), x)]
    with torch.no_grad():
        for tensor in (*model.parameters(), x):
            tensor.add_(1.0)
        with pytest.raises(RuntimeError, match="put the old values back"):
            problem.hessian @ problem.gradient
        for tensor, value in zip((*model.parameters(), x), old, strict=True):
            tensor.copy_(value)
    assert torch.equal(problem.hessian @ problem.gradient, before)


def smooth(outputs, targets):
    """A loss that differentiates something itself."""
    assert torch.is_grad_enabled()
    scale = torch.ones((), dtype=outputs.dtype, requires_grad=True)
    (slope,) = torch.autograd.grad((scale * 2).square(), scale)
    return (outputs - targets).square().sum(1).mean() * slope


@pytest.mark.parametrize("step", ["base", "subspace"])
def test_a_loss_and_a_dataset_run_with_gradients_on(step):
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            assert torch.is_grad_enabled()
            return X[i], X[i, :3]

    model = nn.Linear(4, 3).double()
    optimizer = lq.LLQR(
        *(model, torch.optim.SGD(model.parameters(), lr=0.1)),
        loss=smooth,
        metric="gauss_newton",
        step=step,
    )
    with torch.no_grad():
        assert optimizer.refresh(X, X[:, :3])
        if step == "subspace":
            assert optimizer.step(X, X[:, :3]) is not None
        loader = torch.utils.data.DataLoader(Data(), batch_size=3)
        stream = lq.StreamedProblem(lq.split(model), loader, loss=smooth)
        stream.hessian @ stream.gradient
    assert optimizer.counts.skipped == 0
