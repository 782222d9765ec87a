"""The dual's costate: what it is, steps left unformed, momentum, and no vector of P numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from llqr_mf.solvers.status import Code
from memory import LiveBytes
from networks import ZOO
from small_models import F64, mlp, network, normal, relative
from torch import nn

import llqr_mf as lq
from llqr_mf.metrics import Fisher


def build(name="mlp", dtype=F64, **options):
    model, inputs, targets = network(name)
    model = model.to(dtype)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    options = {"loss": "cross_entropy", "damping": 0.05} | options
    problem = lq.LQRProblem.from_network(lq.split(model), inputs, targets, **options)
    return model, problem


# Damping in numbers, one per layer or one for all; a factor that q lies outside of.
CASES = [
    {},
    {"damping": [0.1, 0.2, 0.3, 0.4, 0.5]},
    {"metric": "empirical_fisher"},
    {"metric": Fisher("monte_carlo", samples=2)},
    {"name": "tied"},
    {"name": "conv_train"},
]


@pytest.mark.parametrize("options", CASES)
def test_the_costate_gives_the_step(options):
    _, problem = build(**options)
    solution = lq.solve(problem, "dual", rtol=1e-12)
    u = solution.step
    p = problem.output_gradient[0] + problem.Q[-1] @ (problem.output_jacobian @ u)
    assert relative(solution.costate, p) < 1e-8
    pulled = problem.output_jacobian.mT @ solution.costate
    expected = torch.linalg.solve(problem.hessian.to_dense(), -problem.gradient)
    assert relative(u, expected) < 1e-8
    assert relative(problem.control_cost.product(u.unsqueeze(0))[0], -pulled) < 1e-8


@pytest.mark.parametrize("options", CASES)
def test_an_unformed_step_is_the_formed_one(options):
    model, problem = build(**options)
    formed = lq.solve(problem, "dual", rtol=1e-10)
    unformed = lq.solve(problem, "dual", rtol=1e-10, form_step=False)
    assert unformed.formed is None and unformed.status.ok
    with pytest.raises(ValueError, match="apply_step_"):
        _ = unformed.step
    torch.testing.assert_close(unformed.model_decrease, formed.model_decrease, rtol=1e-8, atol=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lq.apply_step_(problem, unformed, scale=0.5)
    for name, part in problem.unflatten(formed.step).items():
        moved = model.get_parameter(name).detach() - before[name]
        assert float((moved - 0.5 * part).norm()) < 1e-8 * float(formed.step.norm())
    with pytest.raises(RuntimeError):
        problem.hessian @ formed.step


def test_applying_a_formed_step():
    model, problem = build()
    twin = copy.deepcopy(model)
    solution = lq.solve(problem, "cg")
    lq.apply_step_(problem, solution)
    for name, part in problem.unflatten(solution.step).items():
        torch.testing.assert_close(model.get_parameter(name), twin.get_parameter(name) + part)


def test_what_cannot_be_applied_changes_nothing():
    model, problem = build()
    before = [p.detach().clone() for p in model.parameters()]
    good = lq.solve(problem, "dual", form_step=False)
    bad = copy.copy(good)
    object.__setattr__(bad, "costate", good.costate * float("nan"))
    with pytest.raises(ValueError, match="not applied"):
        lq.apply_step_(problem, bad)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="`form_step` does not go with method='cg'"):
        lq.solve(problem, "cg", form_step=False)
    with pytest.raises(ValueError, match="leave `rhs` out"):
        lq.solve(problem, "dual", form_step=False, rhs=problem.gradient)


@pytest.mark.parametrize("name", [n for n in ZOO if n != "lstm"][:12])
def test_the_streamed_residual_is_the_true_one(name):
    model, inputs, targets, loss = ZOO[name]()
    problem = lq.LQRProblem.from_network(lq.split(model), inputs, targets, loss=loss, damping=0.1)
    from llqr_mf.solvers.residual import measure

    u = normal(problem.size, seed=3)
    found = measure(problem.system, u.unsqueeze(0), problem.output_gradient)
    left = problem.hessian @ u + problem.gradient
    assert found.residual == pytest.approx(float(left.norm()), rel=1e-10)
    _, square = problem.tangent_kernel.rows_and_squares(problem.output_gradient)
    assert float(square[0]) == pytest.approx(float(problem.gradient.square().sum()), rel=1e-10)
    assert found.decrease == pytest.approx(-float(problem.objective(u)), rel=1e-8)


class Weights(nn.Module):
    """Weights that are inputs, products of weights, and weights read twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.z = nn.Parameter(0.3 * torch.randn(6, width))
        self.W = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.a = nn.Parameter(torch.randn(width, 5) / 3)
        self.b = nn.Parameter(torch.randn(width, 5))
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(nn.functional.linear(x, self.a * self.b))
        h = h + nn.functional.linear(self.z, self.W) + self.z.view(6, -1) @ (self.W * self.W)
        return self.head(torch.tanh(h))


@pytest.mark.parametrize("width", [8, 40])
def test_weights_that_meet_weights(width):
    """The wider one takes the kernel's fast path, where the layer's input is a weight."""
    torch.manual_seed(0)
    model = Weights(width).double()
    x, y = normal(6, 5, seed=1), torch.arange(6) % 3
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy", damping=0.2)
    J = problem.output_jacobian.to_dense()
    assert relative(problem.tangent_kernel.to_dense(), 5 * J @ J.mT) < 1e-10
    step = lq.solve(problem, "cg", rtol=1e-11).step
    unformed = lq.solve(problem, "dual", rtol=1e-11, form_step=False)
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    lq.apply_step_(problem, unformed)
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert relative(after - before, step) < 1e-8


def test_an_unformed_step_is_applied_once_and_with_its_own_damping():
    model, problem = build()
    solution = lq.solve(problem, "dual", rtol=1e-10, form_step=False)
    wanted = lq.solve(problem, "dual", rtol=1e-10).step
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    lq.apply_step_(problem.with_damping(7.0), solution)
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert relative(after - before, wanted) < 1e-7
    with pytest.raises(RuntimeError):
        lq.apply_step_(problem, solution)
    assert torch.equal(after, torch.cat([p.detach().reshape(-1) for p in model.parameters()]))


def test_a_stationary_point_in_float32():
    """J'q is zero to rounding where q is not: what is left of the costate is its rounding."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 5), torch.randn(64, 2)
    model = nn.Linear(5, 2)
    ones = torch.cat([x, torch.ones(64, 1)], 1).double()
    best = torch.linalg.lstsq(ones, y.double()).solution
    with torch.no_grad():
        model.weight.copy_(best[:5].mT)
        model.bias.copy_(best[5])
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="mse", damping=1e-3)
    solution = lq.solve(problem, "dual", form_step=False, rtol=1e-2)
    pulled = problem.output_jacobian.mT @ solution.costate
    left = problem.hessian @ (-1e3 * pulled) + problem.gradient
    assert float(left.norm() / problem.gradient.norm()) > 1
    assert not solution.status.ok and solution.residual_norm > 1


def test_an_operator_as_damping_is_measured():
    from linear_operator.operators import DiagLinearOperator

    _, problem = build(damping=DiagLinearOperator(torch.linspace(0.1, 2, 73, dtype=F64)))
    solution = lq.solve(problem, "dual", rtol=1e-9)
    left = problem.hessian @ solution.step + problem.gradient
    measured = float(left.norm() / problem.gradient.norm())
    assert solution.residual_norm == pytest.approx(measured, rel=1e-3, abs=1e-14)
    with pytest.raises(ValueError, match="damping by numbers"):
        lq.solve(problem, "dual", form_step=False)


def test_the_residual_of_an_unformed_step_is_the_plain_one():
    """Not that in the norm of R^{-1}, where dampings differ."""
    _, problem = build(damping=[1e-4, 0, 1.0, 0, 1e-2], dtype=torch.float32)
    solution = lq.solve(problem, "dual", rtol=1e-12, form_step=False)
    pulled = (problem.output_jacobian.mT @ solution.costate).unsqueeze(0)
    step = -problem.control_cost.inverse_product(pulled)[0]
    wide = build(damping=[1e-4, 0, 1.0, 0, 1e-2])[1]
    left = wide.hessian @ step.double() + wide.gradient
    true = float(left.norm() / wide.gradient.norm())
    # Both are rounding; they agree in size.
    assert solution.residual_norm < 1e-4 and true < 1e-3


class Root(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(min=0).sqrt()


def test_a_derivative_that_is_not_finite_is_said():
    model = nn.Sequential(nn.Linear(3, 4), Root(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    x, y = normal(5, 3, seed=1), torch.arange(5) % 2
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy", damping=0.1)
    for method in ("dual", "cg", "low_rank"):
        with pytest.raises(ValueError, match=r"finite|NaN or infinite"):
            lq.solve(problem, method)


# ---- momentum


@pytest.mark.parametrize("method", ["dual", "cg", "minres", "low_rank", "riccati", "auto"])
def test_momentum_solves_the_moved_problem(method):
    _, problem = build(damping=[0.1, 0, 0.2, 0, 0.3][:5])
    old = normal(problem.size, seed=5)
    solution = lq.solve(problem, method, previous=old, momentum=0.8, rtol=1e-11)
    pull = problem.control_cost.product(0.8 * old.unsqueeze(0))[0]
    expected = torch.linalg.solve(problem.hessian.to_dense(), pull - problem.gradient)
    assert solution.status.ok, str(solution.status)
    assert relative(solution.step, expected) < 1e-7
    decrease = -problem.objective(solution.step)
    torch.testing.assert_close(solution.model_decrease, decrease, rtol=1e-8, atol=1e-12)


def test_momentum_keeps_what_the_batch_does_not_see():
    """Steps that J and g do not reach decay by the momentum, and by nothing else."""
    _, problem = build()
    J = problem.output_jacobian.to_dense()
    old = normal(problem.size, seed=6)
    unseen = old - torch.linalg.pinv(J) @ (J @ old)
    u = lq.solve(problem, "dual", previous=unseen, momentum=0.5, rtol=1e-12).step
    plain = lq.solve(problem, "dual", rtol=1e-12).step
    assert relative(u, plain + 0.5 * unseen) < 1e-8


def test_momentum_that_does_not_fit():
    _, problem = build()
    old = normal(problem.size, seed=5)
    for given, words in (
        ({"previous": old[:3]}, "give the last step"),
        ({"previous": old.float()}, "give the last step"),
        ({"previous": old * float("inf")}, "NaN or infinite"),
        ({"previous": old, "momentum": 1.0}, r"number in \[0, 1\)"),
        ({"previous": old, "rhs": old}, "leave `rhs` out"),
        ({"previous": old, "radius": 1.0, "method": "cg"}, "`radius` bounds the whole step"),
    ):
        with pytest.raises(ValueError, match=words):
            lq.solve(problem, **({"method": "dual"} | given))


def test_momentum_with_a_warm_start():
    _, problem = build()
    old = normal(problem.size, seed=5)
    cold = lq.solve(problem, "cg", previous=old, rtol=1e-9)
    warm = lq.solve(problem, "cg", previous=old, initial=cold.step, rtol=1e-8)
    assert warm.iterations == 0 and relative(warm.step, cold.step) < 1e-12


# ---- memory


def wide(width=2048, depth=3):
    layers = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    torch.manual_seed(0)
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    x, y = torch.randn(16, width), torch.randint(0, 10, (16,))
    return lq.split(model), x, y


@pytest.mark.parametrize("form_step, vectors", [(True, 1.45), (False, 0.1)])
def test_memory_of_the_dual(form_step, vectors):
    """The step, and one layer of three besides for its residual; unformed, neither."""
    layers, x, y = wide()
    with LiveBytes() as memory:
        problem = lq.LQRProblem.from_network(layers, x, y, loss="cross_entropy", damping=1e-2)
        solution = lq.solve(problem, "dual", rtol=1e-4, form_step=form_step)
    assert solution.status.code is Code.CONVERGED
    assert memory.peak < vectors * 4 * problem.size


def test_float32_costates_of_float64():
    model = mlp(64, 256, 256, 10, activation=nn.ReLU, dtype=F64)
    inputs, targets = normal(32, 64, seed=1), torch.arange(32) % 10
    exact = lq.LQRProblem.from_network(
        lq.split(model), inputs, targets, loss="cross_entropy", damping=1e-4
    )
    narrow = lq.LQRProblem.from_network(
        lq.split(copy.deepcopy(model).float()),
        *(inputs.float(), targets),
        loss="cross_entropy",
        damping=1e-4,
    )
    wanted = lq.solve(exact, "dual", rtol=1e-12).costate
    got = lq.solve(narrow, "dual", rtol=1e-6, form_step=False).costate
    assert relative(got.double(), wanted) < 1e-3
