"""The marginal likelihood beside log N(y; ...) and log det of dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import dense_jacobian
from small_models import F64, mlp, normal
from torch import nn

import llqr_mf as lq
from llqr_mf.gaussian_process import Laplace, choose_prior, evidence_of, log_evidence
from llqr_mf.gaussian_process import evidence as evidence_module
from llqr_mf.gaussian_process.linearised import linearised

X, LABELS = normal(8, 4, seed=1), torch.arange(8) % 3
TARGETS = normal(8, 3, seed=3)


def problem_of(loss, model=None):
    model = mlp(4, 6, 3) if model is None else model
    targets = TARGETS if loss == "mse" else LABELS
    return model, lq.LQRProblem.from_network(lq.split(model), X, targets, loss=loss)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def dense_evidence(model, loss, delta, noise, centre=0.0):
    J = dense_jacobian(model, X)
    outputs = model(X).detach()
    if loss == "mse":
        H = torch.eye(len(J), dtype=F64) / noise
        fit = torch.distributions.Normal(outputs, noise**0.5).log_prob(TARGETS).sum()
    else:
        p = torch.softmax(outputs, -1)
        H = torch.block_diag(*[torch.diag(q) - torch.outer(q, q) for q in p])
        fit = p.log()[torch.arange(8), LABELS].sum()
    theta = flat(model) - centre
    precision = J.mT @ H @ J + delta * torch.eye(len(theta), dtype=F64)
    log_prior = torch.distributions.Normal(0 * theta, delta**-0.5).log_prob(theta).sum()
    gaussian = len(theta) / 2 * math.log(2 * math.pi) - torch.logdet(precision) / 2
    return float(fit + log_prior + gaussian)


@pytest.mark.parametrize("loss, noise", [("mse", 0.2), ("cross_entropy", None)])
def test_against_dense(loss, noise):
    """Normalised densities: log p(D|theta) + log p(theta) + P/2 log 2 pi - 1/2 log det Lambda."""
    model, problem = problem_of(loss)
    centre = normal(problem.size, seed=4)
    evidence = evidence_of(problem)
    for delta in (0.3, 30.0):
        expected = dense_evidence(model, loss, delta, noise)
        laplace = Laplace(problem, prior_precision=delta, noise=noise)
        assert float(log_evidence(laplace)) == pytest.approx(expected, rel=1e-11)
        assert float(evidence(delta, noise)) == pytest.approx(expected, rel=1e-11)
        shifted = dense_evidence(model, loss, delta, noise, centre)
        found = log_evidence(laplace, prior_mean=centre)
        assert float(found) == pytest.approx(shifted, rel=1e-11)
        found = evidence_of(laplace, prior_mean=centre)(delta, noise)
        assert float(found) == pytest.approx(shifted, rel=1e-11)
        shifted = dense_evidence(model, loss, delta, noise, flat(model))
        found = log_evidence(laplace, prior_mean="weights")
        assert float(found) == pytest.approx(shifted, rel=1e-11)


def test_damping_by_layer():
    """A prior precision of its own for every layer, in the dual's log determinant and norm."""
    model, problem = problem_of("cross_entropy")
    names = [layer.name for layer in problem.origin.layers]
    damped = problem.with_damping({name: 0.1 * (t + 1) for t, name in enumerate(names)})
    laplace = Laplace(damped)
    values = dict(zip(problem.names, laplace.prior_precision, strict=True))
    prior = torch.cat([torch.full((p.numel(),), values[n]) for n, p in model.named_parameters()])
    J = dense_jacobian(model, X)
    p = torch.softmax(model(X).detach(), -1)
    H = torch.block_diag(*[torch.diag(q) - torch.outer(q, q) for q in p])
    R = torch.diag(prior.to(F64))
    expected = float(p.log()[torch.arange(8), LABELS].sum())
    expected -= float(flat(model) @ R @ flat(model)) / 2
    expected -= float(torch.logdet(J.mT @ H @ J + R) - torch.logdet(R)) / 2
    assert float(log_evidence(laplace)) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="differs from parameter to parameter"):
        evidence_of(laplace)


def test_linear_regression_has_its_exact_marginal_likelihood():
    """Where the network is linear and at its optimum, this is log N(y; 0, K / delta + v I)."""
    delta, noise = 0.7, 0.3
    model = nn.Linear(4, 3).to(F64)
    J = dense_jacobian(model, X)
    precision = J.mT @ J / noise + delta * torch.eye(J.shape[1], dtype=F64)
    best = torch.linalg.solve(precision, J.mT @ TARGETS.flatten() / noise)
    torch.nn.utils.vector_to_parameters(best, model.parameters())
    _, problem = problem_of("mse", model)
    covariance = J @ J.mT / delta + noise * torch.eye(len(J), dtype=F64)
    marginal = torch.distributions.MultivariateNormal(torch.zeros(len(J)).to(F64), covariance)
    expected = float(marginal.log_prob(TARGETS.flatten()))
    assert float(evidence_of(problem)(delta, noise)) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_the_best_prior(loss):
    """Higher than all of the grid and its neighbours, and stationary."""
    model, problem = problem_of(loss)
    choice = choose_prior(problem)
    assert not choice.at_edge and len(choice.curve) == len(choice.prior_precisions) == 57
    assert choice.log_evidence >= float(choice.curve.max())
    point = (choice.prior_precision, choice.noise)
    top = dense_evidence(model, loss, *point)
    assert choice.log_evidence == pytest.approx(top, rel=1e-10)
    for factor in (0.9, 1.1):
        assert dense_evidence(model, loss, factor * point[0], point[1]) < top
        if loss == "mse":
            assert dense_evidence(model, loss, point[0], factor * point[1]) < top
    # MacKay's fixed point: delta |theta|^2 is the number of effective parameters.
    norm = float(flat(model).square().sum())
    assert choice.prior_precision * norm == pytest.approx(choice.effective_parameters, rel=1e-3)
    assert "effective parameters" in str(choice)
    if loss == "mse":
        residual = float((model(X).detach() - TARGETS).square().sum())
        left = TARGETS.numel() - choice.effective_parameters
        assert choice.noise == pytest.approx(residual / left, rel=1e-3)
        middle = choice.curve[20], choice.prior_precisions[20], choice.noises[20]
        expected = dense_evidence(model, loss, float(middle[1]), float(middle[2]))
        assert float(middle[0]) == pytest.approx(expected, rel=1e-10)
    else:
        assert choice.noise is None and choice.noises is None


def test_a_grid_of_ones_own():
    _, problem = problem_of("mse")
    free = choose_prior(problem)
    fixed = choose_prior(Laplace(problem, prior_precision=3.0, noise=0.7), noise=0.1)
    assert fixed.noise == 0.1 and fixed.log_evidence < free.log_evidence
    grid = choose_prior(problem, prior_precisions=[1e-8, 1e-9], noises=[0.1], optimise=False)
    assert grid.prior_precision == 1e-8 and grid.noise == 0.1 and grid.at_edge
    assert "edge" in str(grid)
    assert grid.prior_precisions.tolist() == [1e-9, 1e-8]


@pytest.mark.parametrize("loss, noise", [("mse", 0.2), ("cross_entropy", None)])
def test_stochastic(loss, noise):
    """Within four standard errors and the bias; in float64 the bound of the bias is small."""
    _, problem = problem_of(loss)
    exact = float(log_evidence(Laplace(problem, prior_precision=0.3, noise=noise)))
    inputs, targets = X, TARGETS if loss == "mse" else LABELS
    chunks = lq.StreamedProblem.chunks(inputs, targets, 5)
    streamed = lq.StreamedProblem(problem.origin.layers, chunks, loss=loss)
    for given in (problem, streamed):
        laplace = Laplace(given, prior_precision=0.3, noise=noise, method="cg")
        found = log_evidence(laplace, vectors=40, seed=3)
        assert 0 < found.standard_error < 3 and found.bias_bound < 0.01
        assert abs(float(found) - exact) < 4 * found.standard_error + found.bias_bound


@pytest.mark.parametrize("loss, noise", [("mse", 0.2), ("cross_entropy", None)])
def test_effective_parameters_against_dense(loss, noise):
    """The trace of C (C + delta I)^{-1}, C the summed curvature."""
    model, problem = problem_of(loss)
    J = dense_jacobian(model, X)
    if loss == "mse":
        H = torch.eye(len(J), dtype=F64) / noise
    else:
        p = torch.softmax(model(X).detach(), -1)
        H = torch.block_diag(*[torch.diag(q) - torch.outer(q, q) for q in p])
    C, eye = J.mT @ H @ J, torch.eye(J.shape[1], dtype=F64)
    evidence = evidence_of(problem)
    for delta in (0.01, 0.3, 30.0):
        expected = float(torch.linalg.solve(C + delta * eye, C).trace())
        found = float(evidence.effective_parameters(delta, noise))
        assert found == pytest.approx(expected, rel=1e-10)
    fixed = {} if noise is None else {"noise": noise}
    choice = choose_prior(problem, prior_precisions=[0.3], optimise=False, **fixed)
    expected = float(torch.linalg.solve(C + 0.3 * eye, C).trace())
    assert choice.effective_parameters == pytest.approx(expected, rel=1e-10)


def test_the_standard_error_of_the_stochastic_evidence_is_the_deviation_over_seeds():
    """Half that of the log determinant; 24 seeds know a deviation to a seventh."""
    _, problem = problem_of("cross_entropy")
    laplace = Laplace(problem, prior_precision=0.3, method="cg")
    found = [log_evidence(laplace, vectors=4, seed=seed) for seed in range(24)]
    spread = torch.tensor([float(one) for one in found]).std()
    claimed = torch.stack([one.standard_error.square() for one in found]).mean().sqrt()
    # Four of these sevenths; without the half it would be 2.
    assert float(claimed / spread) == pytest.approx(1, abs=0.6)


def test_errors_of_the_stochastic_evidence_are_half_those_of_the_determinant():
    _, problem = problem_of("cross_entropy")
    laplace = Laplace(problem, prior_precision=0.3, method="cg")
    evidence = log_evidence(laplace, vectors=5, seed=2)
    determinant = evidence_module._stochastic_logdet(
        laplace.posterior.problem, {"vectors": 5, "seed": 2}
    )
    assert float(evidence.standard_error) == float(determinant.standard_error) / 2
    assert float(evidence.bias_bound) == float(determinant.bias_bound) / 2


def test_nothing_to_learn_a_prior_from():
    """Outputs so far apart that the softmax has no curvature; targets that are fitted exactly."""
    model = mlp(4, 6, 3)
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.copy_(torch.tensor([2000.0, 0.0, -2000.0]))
    zeros = torch.zeros(8, dtype=torch.long)
    problem = lq.LQRProblem.from_network(lq.split(model), X, zeros, loss="cross_entropy")
    with pytest.raises(ValueError, match=r"saturated softmax.*Give prior_precisions="):
        choose_prior(problem)
    choice = choose_prior(problem, prior_precisions=[0.1, 1.0])
    assert math.isfinite(choice.log_evidence) and choice.effective_parameters == 0
    fitted = mlp(4, 6, 3)
    problem = lq.LQRProblem.from_network(lq.split(fitted), X, fitted(X).detach(), loss="mse")
    with pytest.raises(ValueError, match=r"fits its targets exactly.*Give noise="):
        choose_prior(problem)
    for given in ({"noise": 0.1}, {"noises": [0.1, 0.2]}):
        choice = choose_prior(problem, **given)
        assert 1e-6 < choice.prior_precision < 1e6 and 0.1 <= choice.noise <= 0.2


def test_numbers_of_other_kinds():
    _, problem = problem_of("mse")
    expected = choose_prior(problem, noise=0.25)
    found = choose_prior(problem, noise=torch.tensor(0.25))
    assert (found.prior_precision, found.noise) == (expected.prior_precision, 0.25)


def test_bad_arguments():
    _, problem = problem_of("mse")
    _, classes = problem_of("cross_entropy")
    laplace = Laplace(classes, prior_precision=1.0)
    with pytest.raises(ValueError, match="choose 'zero'"):
        log_evidence(laplace, prior_mean="one")
    with pytest.raises(ValueError, match=r"prior_mean has shape \(3,\)"):
        log_evidence(laplace, prior_mean=torch.ones(3))
    with pytest.raises(ValueError, match="choose 'auto', 'exact'"):
        log_evidence(laplace, method="other")
    by_cg = Laplace(classes, prior_precision=1.0, method="cg")
    with pytest.raises(ValueError, match="needs a posterior by method='dual'"):
        log_evidence(by_cg, method="exact")
    with pytest.raises(ValueError, match="need a Gram matrix"):
        choose_prior(by_cg)
    with pytest.raises(ValueError, match="belongs to 'mse'"):
        choose_prior(classes, noise=1.0)
    with pytest.raises(ValueError, match="grid of positive"):
        choose_prior(problem, prior_precisions=[1.0, -1.0])
    with pytest.raises(ValueError, match="noise is 0"):
        choose_prior(problem, noise=0.0)
    with pytest.raises(ValueError, match="noise is missing"):
        evidence_of(problem)(1.0)
    with pytest.raises(ValueError, match="no likelihood"):
        Laplace(linearised(problem.origin.layers, X), prior_precision=1.0)
