"""What is saved comes back the same, or says what to save in its place."""

import copy
import io
import pickle

import pytest
import torch
from small_models import mlp, normal
from torch import nn

import llqr_mf as lq
from llqr_mf.gaussian_process import Laplace, NeuralTangentKernel

X, Y = normal(6, 4), torch.arange(6) % 3


def saved(made):
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = [lambda it: pickle.loads(pickle.dumps(it)), copy.deepcopy, saved]
MODELS = {
    "rules": lambda: mlp(4, 5, 3),
    "generic": lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 3)).double(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
def test_a_networks_problem_names_the_remedy(way, build, metric):
    layers = lq.split(MODELS[build]())
    problem = lq.LQRProblem.from_network(layers, X, Y, loss="cross_entropy", metric=metric)
    for made in (problem, problem.hessian, problem.A[0], problem.B[1], problem.output_jacobian):
        with pytest.raises(TypeError, match="make the problem again where it is needed"):
            way(made)
    for made in (layers, lq.StreamedProblem(layers, [(X, Y)], loss="cross_entropy")):
        with pytest.raises(TypeError, match=r"Call split\(\) on the copied or loaded model"):
            way(made)


def test_a_shallow_copy_shares_the_linearization():
    problem = lq.LQRProblem.from_network(lq.split(mlp(4, 5, 3)), X, Y, loss="cross_entropy")
    twin = copy.copy(problem)
    assert torch.equal(twin.hessian @ problem.gradient, problem.hessian @ problem.gradient)


@pytest.mark.parametrize("way", WAYS)
def test_given_matrices_come_back_the_same(way):
    def problem():
        return lq.LQRProblem(
            A=[normal(3, 3, seed=t) for t in range(3)],
            B=[normal(3, 2, seed=9 + t) for t in range(3)],
            Q=[None, None, None, torch.eye(3).double()],
            R=[0.1, torch.eye(2).double(), 0.3],
            x0=normal(3),
            f=[normal(3, seed=5), None, None],
        )

    made, again = problem(), way(problem())
    for one, two in ((made, again), (made.hessian, way(made.hessian))):
        if one is made:
            assert torch.equal(lq.solve(one).step, lq.solve(two).step)
            one, two = one.hessian, two.hessian
        assert torch.equal(one.to_dense(), two.to_dense())
    v = normal(3)
    for one in (made.value(1), made.gain(1), made.A[2]):
        assert torch.equal(one @ v, way(one) @ v)


@pytest.mark.parametrize("way", WAYS)
def test_solutions_losses_metrics_and_kernels(way):
    model = mlp(4, 5, 3)
    problem = lq.LQRProblem.from_network(lq.split(model), X, Y, loss="cross_entropy")
    for method in ("cg", "dual", "riccati"):
        solution = lq.solve(problem, method)
        again = way(solution)
        assert torch.equal(again.step, solution.step)
        assert again.status == solution.status and again.residual_norm == solution.residual_norm
    unformed = way(lq.solve(problem, "dual", form_step=False))
    assert unformed.status.ok
    metric = way(lq.metrics.StateCosts({"0": 0.3}, base=lq.metrics.Renyi(0.3)))
    assert metric.costs == {"0": 0.3} and metric.base == lq.metrics.Renyi(0.3)
    posterior = Laplace(problem)
    with pytest.raises(TypeError, match="make the problem again"):
        way(posterior)
    if way is not copy.deepcopy:  # a deep copy shares the network, as fantasies need it
        with pytest.raises(TypeError, match=r"Call split\(\)"):
            way(NeuralTangentKernel(model))
