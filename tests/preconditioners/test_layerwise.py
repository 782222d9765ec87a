"""Layerwise against the inverse of the diagonal blocks of a dense Hessian."""

import pytest
import torch
from small_models import F64, network, normal
from torch import nn
from torch.testing import assert_close

import llqr_mf as lq
from llqr_mf.preconditioners import Diagonal, DirectSum, Layerwise
from llqr_mf.preconditioners.layerwise import DENSE_BLOCK


def problem_of(name, **options):
    model, inputs, targets = network(name)
    layers = lq.split(model)
    given = {"loss": "cross_entropy", "damping": 0.1} | options
    return lq.LQRProblem.from_network(layers, inputs, targets, **given)


def block_diagonal(problem):
    """The dense Hessian without what couples two layers; a tied parameter is its first layer's."""
    layer = torch.empty(problem.size, dtype=torch.long)
    offsets = torch.tensor([0, *problem.layout.sizes]).cumsum(0).tolist()
    first = {}
    for t, owned in enumerate(problem.system.owned):
        for i in owned:
            first.setdefault(i, t)
    for i, t in first.items():
        layer[offsets[i] : offsets[i + 1]] = t
    return problem.hessian.to_dense() * (layer.unsqueeze(1) == layer)


@pytest.mark.parametrize("name", ["mlp", "conv_train", "resnet_eval", "pre_norm", "tied"])
def test_is_the_inverse_of_the_blocks(name):
    problem = problem_of(name)
    # CG to 1e-12 at a condition number below 1e3.
    M = Layerwise(problem, rtol=1e-12)
    H = block_diagonal(problem)
    assert float((problem.hessian.to_dense() - H).norm()) > 0.01  # layers are coupled
    v = normal(problem.size, 3)
    assert_close(M @ v, torch.linalg.solve(H, v), rtol=1e-8, atol=1e-8)
    assert_close(M.inverse() @ v, H @ v)
    assert_close(M.inverse().inverse() @ v, M @ v)
    assert_close(M.logdet(), -torch.linalg.slogdet(H).logabsdet)
    assert_close(M.inverse().logdet(), torch.linalg.slogdet(H).logabsdet)
    assert M.symmetric
    parts = M.precondition(M.split(v.mT))
    assert_close(M.join(parts, v.mT), (M @ v).mT)


def test_of_given_matrices():
    F = [normal(3, 3, seed=i) for i in range(2)]
    B = [normal(3, n, seed=5 + n) for n in (2, 4)]
    problem = lq.LQRProblem(A=F, B=B, Q=[None, None, torch.eye(3, dtype=F64)], R=[0.5, 0.5])
    H = problem.hessian.to_dense()
    H[:2, 2:] = H[2:, :2] = 0
    assert_close(Layerwise(problem, rtol=1e-13).to_dense(), torch.linalg.inv(H))


def test_without_coupling_it_is_the_exact_step():
    model, inputs, targets = network("mlp")
    model[:-1].requires_grad_(False)
    problem = lq.LQRProblem.from_network(lq.split(model), inputs, targets, loss="cross_entropy")
    exact = lq.solve(problem, method="riccati").step
    assert_close(-(Layerwise(problem, rtol=1e-12) @ problem.gradient), exact, rtol=1e-6, atol=1e-6)


def test_has_no_state_and_refuses_what_it_cannot():
    problem = problem_of("mlp")
    M = Layerwise(problem)
    assert M.state_dict() == {"version": 1, "kind": "layerwise", "tensors": {}}
    assert not M.charts()
    for act in (lambda: M.scale_(2.0), lambda: M.blend_(M, 0.5)):
        with pytest.raises(NotImplementedError):
            act()
    other = Layerwise(problem_of("mlp", damping=1.0))
    copy = M.clone()
    copy.assign_(other)
    v = normal(problem.size)
    assert_close(copy @ v, other @ v, rtol=0, atol=0)
    assert not torch.equal(M @ v, copy @ v)


def test_a_solve_cut_short_warns_and_an_indefinite_block_raises():
    v = normal(problem_of("mlp").size)
    with pytest.warns(RuntimeWarning, match="max_iterations"):
        Layerwise(problem_of("mlp"), max_iterations=1) @ v
    concave = lq.LQRProblem(
        A=[torch.eye(2, dtype=F64)],
        B=[torch.eye(2, dtype=F64)],
        Q=[None, -torch.eye(2, dtype=F64)],
        R=[0.5],
    )
    with pytest.raises(ValueError, match=r"no inverse.*damping"):
        Layerwise(concave) @ v[:2]


def test_needs_layers_at_hand_and_a_dense_block_of_some_size():
    model, inputs, targets = network("mlp")
    batches = [(inputs, targets)]
    streamed = lq.StreamedProblem(lq.split(model), batches, loss="cross_entropy")
    with pytest.raises(TypeError, match="StreamedProblem"):
        Layerwise(streamed)
    assert Diagonal(streamed).layout == problem_of("mlp").layout
    wide = nn.Linear(2, DENSE_BLOCK // 2)
    problem = lq.LQRProblem.from_network(
        lq.split(nn.Sequential(wide)),
        torch.ones(1, 2),
        torch.zeros(1, DENSE_BLOCK // 2),
        loss="mse",
    )
    with pytest.raises(NotImplementedError, match=str(DENSE_BLOCK)):
        Layerwise(problem).logdet()


def test_stands_in_a_direct_sum():
    problem = problem_of("mlp")
    whole = DirectSum(problem, [Layerwise(problem, rtol=1e-12)])
    v = normal(problem.size)
    assert_close(whole.inverse() @ (whole @ v), v, rtol=1e-8, atol=1e-8)
