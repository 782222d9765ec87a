"""The kernel inside gpytorch: exact GPs of one and several outputs, beside Laplace and formulas."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from llqr_mf.operators.base import MatrixFreeOperator
from oracle import dense_jacobian
from small_models import F64, ConvNet, mlp, normal, relative, seeded
from torch import nn

import llqr_mf as lq
from llqr_mf.gaussian_process import Laplace, NetworkMean, NeuralTangentKernel

X, NEW = normal(12, 4, seed=1), normal(5, 4, seed=2)
NOISE, VARIANCE = 0.2, 1.7


class GP(gpytorch.models.ExactGP):
    def __init__(self, x, y, likelihood, mean, kernel, outputs):
        super().__init__(x, y, likelihood)
        self.mean_module, self.outputs = mean, outputs
        self.covar_module = gpytorch.kernels.ScaleKernel(kernel)

    def forward(self, x):
        mean, covariance = self.mean_module(x), self.covar_module(x)
        if self.outputs == 1:
            return MultivariateNormal(mean, covariance)
        return MultitaskMultivariateNormal(mean, covariance)


def gp_of(model, y, outputs, prior_mean="weights", **options):
    if outputs == 1:
        likelihood = gpytorch.likelihoods.GaussianLikelihood()
    else:
        likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(outputs, has_task_noise=False)
    kernel = NeuralTangentKernel(model, **options)
    gp = GP(X, y, likelihood, NetworkMean(model, prior_mean=prior_mean), kernel, outputs).double()
    # A float would be rounded to float32 on its way.
    likelihood.noise = torch.tensor(NOISE, dtype=F64)
    gp.covar_module.outputscale = torch.tensor(VARIANCE, dtype=F64)
    return gp


@pytest.mark.parametrize("dense_size", [8192, 0])
@pytest.mark.parametrize("outputs", [1, 3])
def test_exact_gp_is_the_linearised_network(outputs, dense_size):
    """Covariance that of Laplace; mean f + J u for the step u that minimises the model."""
    model = mlp(4, 6, 5, outputs)
    y = normal(12, outputs, seed=3)
    gp = gp_of(model, y.squeeze(-1), outputs, dense_size=dense_size).eval()
    with torch.no_grad():
        made = gp(NEW)
    problem = lq.LQRProblem.from_network(lq.split(model), X, y, loss="mse", damping=1.0)
    laplace = Laplace(problem, prior_precision=1 / VARIANCE, noise=NOISE)
    expected = laplace.predict(NEW)
    assert type(expected) is type(made) and made.mean.shape == expected.mean.shape
    assert relative(made.covariance_matrix, expected.covariance_matrix) < 1e-9
    assert relative(made.variance, expected.variance) < 1e-9
    step = lq.solve(laplace.posterior.problem, method="dual", rtol=1e-12).step
    moved = dense_jacobian(model, NEW) @ step
    assert relative(made.mean.flatten(), expected.mean.flatten() + moved) < 1e-9


def test_mean_of_laplace_at_the_optimum():
    """Trained with its prior to the bottom, the GP around J theta has Laplace's mean, f(x)."""
    model = mlp(4, 5, 1)
    y = torch.sin(X.sum(1, keepdim=True))
    layers, scale = lq.split(model), len(X) / (2 * NOISE)
    damping = 1 / VARIANCE / scale
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=3000,
        tolerance_grad=1e-10,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def objective():
        optimizer.zero_grad()
        prior = sum(p.square().sum() for p in model.parameters())
        value = (model(X) - y).square().mean() + damping / 2 * prior
        value.backward()
        return value

    optimizer.step(objective)
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e-8
    with torch.no_grad():
        made = gp_of(model, y.squeeze(-1), 1, prior_mean="zero").eval()(NEW)
    problem = lq.LQRProblem.from_network(layers, X, y, loss="mse")
    expected = Laplace(problem, prior_precision=1 / VARIANCE, noise=NOISE).predict(NEW)
    assert relative(made.mean, expected.mean) < 1e-6
    assert relative(made.covariance_matrix, expected.covariance_matrix) < 1e-8


def test_layout_output_fastest():
    """Index n D + c, both in the kernel and in gpytorch's multitask distribution."""
    model = mlp(4, 6, 3)
    K = NeuralTangentKernel(model)(NEW, X).to_dense()
    J, other = dense_jacobian(model, NEW), dense_jacobian(model, X)
    assert K.shape == (15, 36) and relative(K, J @ other.mT) < 1e-12
    # Output c of sample n by its own gradient.
    (y,) = model(NEW[2:3])
    gradient = torch.autograd.grad(y[1], list(model.parameters()))
    row = torch.cat([g.flatten() for g in gradient])
    assert relative(K[2 * 3 + 1], other @ row) < 1e-12
    made = MultitaskMultivariateNormal(torch.zeros(5, 3, dtype=F64), (J @ J.mT))
    variance = torch.stack([row @ row for row in J]).reshape(5, 3)
    assert relative(made.variance, variance) < 1e-12


def test_training_of_hyperparameters():
    """The likelihood falls, its value is that of the dense formula, and one kernel is made."""
    model = mlp(4, 6, 3)
    y = normal(12, 3, seed=3)
    gp = gp_of(model, y, 3).train()
    likelihood = gp.likelihood
    before = [p.detach().clone() for p in model.parameters()]
    marginal = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, gp)
    optimizer = torch.optim.Adam(gp.parameters(), lr=0.1)
    assert sum(p.numel() for p in gp.parameters()) == 2
    values = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = -marginal(gp(X), y)
        loss.backward()
        values.append(float(loss.detach()))
        optimizer.step()
    assert values[-1] < values[0]
    J = dense_jacobian(model, X)
    dense = torch.distributions.MultivariateNormal(
        model(X).detach().flatten(), VARIANCE * J @ J.mT + NOISE * torch.eye(36, dtype=F64)
    )
    # gpytorch divides by the number of observations.
    count = y.numel()
    assert values[0] == pytest.approx(-float(dense.log_prob(y.flatten())) / count, rel=1e-6)
    assert len(gp.covar_module.base_kernel._kept) == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_kept_matrices_see_the_weights_move():
    model = mlp(4, 6, 1)
    kernel = NeuralTangentKernel(model)
    first = kernel(X, NEW).to_dense()
    assert torch.equal(kernel(X, NEW).to_dense(), first)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    expected = dense_jacobian(model, X) @ dense_jacobian(model, NEW).mT
    assert relative(kernel(X, NEW).to_dense(), expected) < 1e-12


def test_images_and_diagonals():
    model = seeded(ConvNet).eval()
    images = normal(6, 16, seed=4)
    kernel = NeuralTangentKernel(model, input_shape=(1, 4, 4))
    J = dense_jacobian(model, images.reshape(6, 1, 4, 4))
    assert relative(kernel(images).to_dense(), J @ J.mT) < 1e-12
    assert relative(kernel(images, images, diag=True), (J @ J.mT).diagonal()) < 1e-12
    other = images.flip(0)
    crossed = (J @ J.reshape(6, 3, -1).flip(0).reshape(18, -1).mT).diagonal()
    assert relative(kernel(images, other, diag=True), crossed) < 1e-12


def test_lazy_beyond_dense_size():
    model = mlp(4, 6, 2)
    kernel = NeuralTangentKernel(model, dense_size=20)
    assert isinstance(kernel.forward(X, X), MatrixFreeOperator)
    assert isinstance(kernel.forward(NEW, NEW), torch.Tensor)
    J, other = dense_jacobian(model, X), dense_jacobian(model, NEW)
    v = normal(10, 2)
    assert relative(kernel.forward(X, NEW) @ v, J @ (other.mT @ v)) < 1e-12


def test_damping_by_layer_weighs_the_weights():
    model = mlp(4, 6, 1)
    names = [layer.name for layer in lq.split(model)]
    damping = {name: 2.0 ** (t + 1) for t, name in enumerate(names)}
    J = dense_jacobian(model, X)
    of = {n: damping[layer.name] for layer in lq.split(model) for n in layer.parameters}
    R = torch.cat([torch.full((p.numel(),), of[n]) for n, p in model.named_parameters()])
    found = NeuralTangentKernel(model, damping=damping)(X).to_dense()
    assert relative(found, (J / R) @ J.mT) < 1e-12


def test_bad_arguments():
    model = mlp(4, 6, 1)
    kernel = NeuralTangentKernel(model)
    with pytest.raises(ValueError, match="without batch dimensions"):
        kernel.forward(X.unsqueeze(0), X.unsqueeze(0))
    with pytest.raises(ValueError, match="leave batch_shape out"):
        NeuralTangentKernel(model, batch_shape=torch.Size([2]))
    with pytest.raises(ValueError, match="choose 'weights' or 'zero'"):
        NetworkMean(model, prior_mean="one")
    with pytest.raises(ValueError, match="takes \\(N, d\\)"):
        NetworkMean(model).forward(X.unsqueeze(0))
    assert list(kernel.parameters()) == [] and list(NetworkMean(model).parameters()) == []
    assert isinstance(model, nn.Module)
