"""What happens between a posterior and its predictions: changed weights, modes, inputs, copies."""

from __future__ import annotations

import copy

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from oracle import dense_jacobian
from small_models import F64, mlp, normal, relative, seeded
from torch import nn

import llqr_mf as lq
from llqr_mf.gaussian_process import (
    Laplace,
    NetworkMean,
    NeuralTangentKernel,
    choose_prior,
    evidence_of,
    kernel,
    kernel_matrix,
    log_evidence,
)
from llqr_mf.gaussian_process.linearised import linearised
from llqr_mf.output_sweep import pull_back

LABELS = torch.arange(8) % 3


def inputs():
    return normal(8, 4, seed=1), normal(5, 4, seed=2)


def norms():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def in_place(model, x):
    with torch.no_grad():
        model[0].weight.mul_(1.7)


def by_data(model, x):
    model[2].weight.data.mul_(1.7)


def by_vector(model, x):
    flat = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(1.7 * flat.detach(), model.parameters())


def batch(model, x):
    x.mul_(1.7)


CHANGES = [in_place, by_data, by_vector, batch]
READS = {
    "predict": lambda la, p, new: la.predict(new),
    "probabilities": lambda la, p, new: la.probabilities(new),
    "sample": lambda la, p, new: la.sample(1),
    "with_prior": lambda la, p, new: la.with_prior(2.0),
    "log_evidence": lambda la, p, new: log_evidence(la),
    "choose_prior": lambda la, p, new: choose_prior(la),
    "evidence_of": lambda la, p, new: evidence_of(p),
    "stale problem": lambda la, p, new: Laplace(p, prior_precision=1.0),
    "kernel": lambda la, p, new: kernel(p, linearised(p.origin.layers, new)),
    "kernel_matrix": lambda la, p, new: kernel_matrix(linearised(p.origin.layers, new), p),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("read", READS)
def test_changed_weights_are_refused(read, change):
    x, new = inputs()
    model = mlp(4, 6, 3)
    problem = lq.LQRProblem.from_network(lq.split(model), x, LABELS, loss="cross_entropy")
    laplace = Laplace(problem, prior_precision=1.0)
    READS[read](laplace, problem, new)
    change(model, x)
    with pytest.raises(RuntimeError, match="was written to after the problem was made"):
        READS[read](laplace, problem, new)


@pytest.mark.parametrize("method", ["dual", "cg"])
def test_a_step_between_predict_and_its_variance(method):
    x, new = inputs()
    model = mlp(4, 6, 3)
    problem = lq.LQRProblem.from_network(lq.split(model), x, LABELS, loss="cross_entropy")
    made = Laplace(problem, prior_precision=1.0, method=method).predict(new)
    expected = made.variance
    later = Laplace(problem, prior_precision=1.0, method=method).predict(new)
    before = model[0].weight.detach().clone()
    in_place(model, x)
    with pytest.raises(RuntimeError, match="was written to"):
        later.variance  # noqa: B018
    with torch.no_grad():
        model[0].weight.copy_(before)
    assert relative(later.variance, expected) < 1e-12


def test_pull_back_notices():
    x, _ = inputs()
    model = mlp(4, 6, 3)
    problem = linearised(lq.split(model), x)
    rows = torch.ones(1, 8, 3, dtype=F64)
    list(pull_back(problem, rows))
    in_place(model, x)
    with pytest.raises(RuntimeError, match="was written to"):
        list(pull_back(problem, rows))


def test_streamed_posterior_and_buffers():
    x, new = inputs()
    model = seeded(norms).eval()
    layers = lq.split(model)
    chunks = lq.StreamedProblem.chunks(x, LABELS, 4)
    streamed = lq.StreamedProblem(layers, chunks, loss="cross_entropy")
    whole = lq.LQRProblem.from_network(layers, x, LABELS, loss="cross_entropy")
    both = [Laplace(problem, prior_precision=1.0) for problem in (streamed, whole)]
    model[1].running_var.mul_(2.0)
    for laplace in both:
        with pytest.raises(RuntimeError, match=r"1\.running_var was written to"):
            laplace.predict(new)


# ---- the kernel of gpytorch


def dense(model, x):
    J = dense_jacobian(model, x)
    return J @ J.mT


def test_kept_matrices_are_of_what_is_there_now():
    x, _ = inputs()
    model = mlp(4, 6, 3)
    made = NeuralTangentKernel(model)

    def right():
        return relative(made(x).to_dense(), dense(model, x)) < 1e-12

    assert right()
    for change in (batch, by_data, by_vector, in_place):
        change(model, x)
        assert right(), change.__name__
    model[0].weight.requires_grad_(False)
    J = [p for p in model.parameters() if p.requires_grad]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(y, J, retain_graph=True)])
        for y in model(x).flatten()
    ]
    expected = torch.stack(rows) @ torch.stack(rows).mT
    assert relative(made(x).to_dense(), expected) < 1e-12
    assert len(made._kept) == 1


def test_modes_of_the_network():
    """Split again in the new mode; refused where outputs depend on their batch."""
    x, _ = inputs()
    model = seeded(norms).eval()
    made, mean = NeuralTangentKernel(model), NetworkMean(model)
    assert relative(made(x).to_dense(), dense(model, x)) < 1e-12
    model.train()
    for of in (lambda: made(x).to_dense(), lambda: mean(x)):
        with pytest.raises(ValueError, match="'1' takes its statistics from the batch"):
            of()
    model.eval()
    model[1].running_var.mul_(3.0)
    assert relative(made(x).to_dense(), dense(model, x)) < 1e-12
    assert relative(mean(x), model(x).detach()) < 1e-14


class GP(gpytorch.models.ExactGP):
    def __init__(self, x, y, likelihood, model):
        super().__init__(x, y, likelihood)
        self.mean_module = NetworkMean(model)
        self.covar_module = gpytorch.kernels.ScaleKernel(NeuralTangentKernel(model))

    def forward(self, x):
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def test_copies_and_fantasies():
    """`get_fantasy_model` copies the kernel: its posterior is that of all data."""
    x, new = inputs()
    model = mlp(4, 6, 1)
    y = normal(8, seed=3)
    first = NeuralTangentKernel(model)
    other = copy.deepcopy(first)
    assert torch.equal(other(x).to_dense(), first(x).to_dense())
    assert other._network.model is model and other._network is not first._network
    assert torch.equal(copy.deepcopy(NetworkMean(model))(x), NetworkMean(model)(x))

    def gp(rows):
        likelihood = gpytorch.likelihoods.GaussianLikelihood()
        made = GP(x[rows], y[rows], likelihood, model).double().eval()
        likelihood.noise = torch.tensor(0.2, dtype=F64)
        return made

    with torch.no_grad():
        some = gp(slice(0, 6))
        some(new)
        fantasy = some.get_fantasy_model(x[6:], y[6:])(new)
        whole = gp(slice(0, 8))(new)
    assert relative(fantasy.mean, whole.mean) < 1e-6
    assert relative(fantasy.covariance_matrix, whole.covariance_matrix) < 1e-6


# ---- networks that are no function of one sample


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        return self.inner(nn.functional.dropout(x, 0.3, self.training))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        return self.inner(x + torch.randn_like(x))


def dropout(*modules):
    return lambda: nn.Sequential(nn.Linear(4, 6), *modules, nn.Linear(6, 3))


def attention():
    return nn.Sequential(
        nn.Unflatten(1, (2, 2)),
        nn.TransformerEncoderLayer(2, 1, 3, dropout=0.2, batch_first=True),
        *(nn.Flatten(), nn.Linear(4, 3)),
    )


RANDOM = {
    "dropout": dropout(nn.Dropout(0.3)),
    "alpha": dropout(nn.AlphaDropout(0.3)),
    "functional": Functional,
    "attention": attention,
    "rrelu": dropout(nn.RReLU()),
    "noise": Noisy,
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_networks(name):
    x, new = inputs()
    model = seeded(RANDOM[name]).train()
    problem = lq.LQRProblem.from_network(
        lq.split(model), x, LABELS, loss="cross_entropy", check=False
    )
    with pytest.raises(ValueError, match=r"draws random numbers .*model\.eval\(\)"):
        Laplace(problem, prior_precision=1.0)
    # The problem is still the one with the masks.
    model.eval()
    with pytest.raises(ValueError, match="draws random numbers"):
        Laplace(problem, prior_precision=1.0)
    if name == "noise":
        return
    problem = lq.LQRProblem.from_network(lq.split(model), x, LABELS, loss="cross_entropy")
    laplace = Laplace(problem, prior_precision=1.0)
    assert torch.equal(laplace.predict(new).variance, laplace.predict(new).variance)


def test_nothing_random():
    """Rates of zero draw nothing that shows."""
    x, _ = inputs()
    model = seeded(dropout(nn.Dropout(0.0))).train()
    problem = lq.LQRProblem.from_network(lq.split(model), x, LABELS, loss="cross_entropy")
    assert Laplace(problem, prior_precision=1.0).predict(x).mean.shape == (8, 3)


def test_train_mode_batch_norm():
    x, _ = inputs()
    model = seeded(norms).train()
    for layers in (lq.split(model), lq.split(model, cuts=["1"])):
        problem = lq.LQRProblem.from_network(layers, x, LABELS, loss="cross_entropy")
        with pytest.raises(ValueError, match=r"'1' takes its statistics .*model\.eval\(\)"):
            Laplace(problem, prior_precision=1.0)
    bare = seeded(
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    ).eval()
    problem = lq.LQRProblem.from_network(lq.split(bare), x, LABELS, loss="cross_entropy")
    with pytest.raises(ValueError, match="without running statistics"):
        Laplace(problem, prior_precision=1.0)
