"""`solve`: which method, its options and its words; damping rules; float32."""

import importlib
import math

import pytest
import torch
from linear_operator.operators import DiagLinearOperator
from llqr_mf.solvers.cg import NegativeCurvatureError
from llqr_mf.solvers.status import Code
from small_models import F64, dense_step, mlp, network, normal, relative
from torch import nn

import llqr_mf as lq
from llqr_mf.metrics import Divergence, StateCosts

FACTORS = importlib.import_module("llqr_mf.factors")
CHOOSE = importlib.import_module("llqr_mf.choose")
GRAM = importlib.import_module("llqr_mf.gram_matrix")
RICCATI = importlib.import_module("llqr_mf.methods.riccati")
METHODS = ("cg", "minres", "dual", "low_rank", "riccati")


def build(name="mlp", **options):
    model, inputs, targets = network(name)
    options = {"loss": "cross_entropy", "damping": 0.05} | options
    return lq.LQRProblem.from_network(lq.split(model), inputs, targets, **options)


def dense_solution(problem, b=None):
    return torch.linalg.solve(problem.hessian.to_dense(), -problem.gradient if b is None else b)


# ---- auto and its reasons


def kl(y, z):
    p = z.softmax(-1)
    return (p * (z.log_softmax(-1) - y.log_softmax(-1))).sum(-1).mean()


def coupled(y, z):
    """Samples move each other."""
    return kl(y, z) + (y - z).mean(0).square().sum()


@pytest.mark.parametrize(
    "options, method, reason",
    [
        ({}, "dual", "the dual costs as much as 5 iterations of cg"),
        ({"name": "conv_eval"}, "dual", "closed form"),
        ({"name": "conv_train"}, "cg", "a layer mixes samples or shares a weight"),
        ({"name": "tied"}, "cg", "a layer mixes samples or shares a weight"),
        ({"metric": "newton", "damping": 3.0}, "cg", "not one terminal cost with a known factor"),
        ({"metric": StateCosts({0: 0.1})}, "cg", "not one terminal cost with a known factor"),
        (
            {"metric": Divergence(lambda y, z: (y - z).square().mean())},
            *("dual", "the dual costs as much as 5 iterations of cg"),
        ),
        (
            {"metric": Divergence(coupled, stationary=True)},
            *("cg", "not one terminal cost with a known factor"),
        ),
        ({"damping": [0.1, 0, 0.1, 0, 0.0]}, "cg", "damping is an operator, or not positive"),
        (
            {"damping": DiagLinearOperator(torch.ones(73, dtype=F64))},
            *("cg", "damping is an operator, or not positive"),
        ),
    ],
)
def test_auto_says_what_it_took_and_why(options, method, reason):
    solution = lq.solve(build(**options), max_iterations=500)
    assert solution.method == method
    assert solution.status.message.startswith(f"auto chose {method}: ") and solution.status.ok
    assert reason in solution.status.message


def test_auto_with_options_that_only_cg_takes():
    problem = build()
    for option in ({"radius": 0.1}, {"preconditioner": lambda r: r}, {"initial": problem.gradient}):
        solution = lq.solve(problem, **option)
        assert solution.method == "cg" and "was given" in solution.status.message


def test_auto_when_the_gram_matrix_is_too_large(monkeypatch):
    monkeypatch.setattr(FACTORS, "DUAL_SIZE", 11)
    monkeypatch.setattr(GRAM, "GRAM_BY_PRODUCTS", 11)
    monkeypatch.setattr(CHOOSE, "AT_ONCE", 1e9)
    problem = build()
    solution = lq.solve(problem, rtol=1e-10)
    assert solution.method == "dual" and "of which a sketch" in solution.status.message
    assert "sketch of 1 columns" in solution.status.message
    assert relative(solution.step, dense_solution(problem)) < 1e-8
    monkeypatch.setattr(CHOOSE, "AT_ONCE", 0)
    monkeypatch.setattr(CHOOSE, "likely_iterations", lambda *_: 0.0)
    solution = lq.solve(problem)
    assert (
        solution.method == "cg"
        and "N r = 12 rows, of which a sketch is made" in solution.status.message
    )
    monkeypatch.setattr(CHOOSE, "SKETCHED_SIZE", 11)
    assert "N r = 12 > 11 unknowns" in lq.solve(problem).status.message
    monkeypatch.setattr(GRAM, "NYSTROM_COLUMNS", 0)
    free = lq.solve(problem, "dual", rtol=1e-10)
    assert "matrix-free dual CG" in free.status.message and free.iterations > 2
    assert relative(free.step, dense_solution(problem)) < 1e-8
    with pytest.raises(ValueError, match=r"N r = 12 > 11 columns: use method='cg'"):
        lq.solve(problem, "low_rank")


@pytest.mark.parametrize("method", METHODS)
def test_a_solution_reports_what_it_did(method):
    problem = build()
    solution = lq.solve(problem, method)
    assert solution.method == method and solution.status.ok and solution.products >= 1
    assert (solution.iterations == 0) == (method in ("dual", "low_rank", "riccati"))
    residual = problem.hessian @ solution.step + problem.gradient
    measured = float(residual.norm() / problem.gradient.norm())
    assert solution.residual_norm == pytest.approx(measured, rel=1e-3, abs=1e-14)
    torch.testing.assert_close(
        solution.model_decrease, -problem.objective(solution.step), rtol=1e-10, atol=0
    )
    assert (solution.values is None) == (method not in ("low_rank", "riccati"))
    if solution.values is not None:
        assert len(solution.values) == len(solution.gains) + 1 == problem.horizon + 1
    assert not solution.step.requires_grad


# ---- methods that do not apply


def test_an_unknown_method_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"method 'newton' is unknown: choose one of \['auto'"):
        lq.solve(build(), "newton")


@pytest.mark.parametrize("method", ["dual", "low_rank"])
@pytest.mark.parametrize(
    "options",
    [
        {"metric": "newton", "damping": 3.0},
        {"damping": 0.0},
        {"damping": [0.1, 0, 0.0, 0, 0.1]},
        {"metric": Divergence(lambda y, z: (y.square() * (1 + z)).mean())},
    ],
    ids=["newton", "no damping", "a layer without damping", "a gradient that stays"],
)
def test_methods_that_need_positive_costs_name_one_that_does_not(method, options):
    problem = build(**options)
    with pytest.raises(ValueError, match=r"use\s+method='cg'"):
        lq.solve(problem, method)


@pytest.mark.parametrize("divergence", [kl, coupled])
def test_methods_that_need_a_factor_find_that_of_a_small_matrix(divergence):
    """A user's convex divergence has one of its samples, or of the whole where they are coupled."""
    problem = build(metric=Divergence(divergence, stationary=True))
    for method in ("dual", "low_rank"):
        solution = lq.solve(problem, method, rtol=1e-10)
        assert relative(solution.step, dense_solution(problem)) < 1e-8


def test_sizes_that_are_too_large_are_said_before_anything_is_formed(monkeypatch):
    monkeypatch.setattr(RICCATI, "DENSE_SIZE", 29)
    with pytest.raises(ValueError, match=r"matrices of size 30 > 29: use method='cg' or 'dual'"):
        lq.solve(build(), "riccati")
    monkeypatch.setattr(FACTORS, "DUAL_SIZE", 11)
    problem = build(metric=Divergence(coupled, stationary=True))
    with pytest.raises(ValueError, match=r"small enough to factor \(at most 11\)"):
        lq.solve(problem, "dual")
    with pytest.raises(ValueError, match=r"too large \(12\) to be factored densely"):
        lq.solve(problem, "low_rank")


@pytest.mark.parametrize("method", ["minres", "dual", "low_rank", "riccati"])
@pytest.mark.parametrize("option", ["initial", "radius", "preconditioner", "flexible"])
def test_options_that_do_not_go_with_a_method(method, option):
    problem = build()
    given = {"initial": problem.gradient, "radius": 1.0, "flexible": True}
    given["preconditioner"] = lambda r: r
    if (method, option) == ("minres", "preconditioner"):
        assert lq.solve(problem, method, preconditioner=given[option]).status.ok
        return
    with pytest.raises(ValueError, match=f"`{option}` does not go with method='{method}'"):
        lq.solve(problem, method, **{option: given[option]})


# ---- right-hand sides


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_right_hand_sides_in_columns(method):
    problem = build()
    b = normal(problem.size, 3, seed=4)
    b[:, 2] = 0
    solution = lq.solve(problem, method, rhs=b, rtol=1e-10)
    expected = dense_solution(problem, b)
    assert solution.status.ok, str(solution.status)
    assert relative(solution.step, expected) < 1e-8
    assert bool((solution.step[:, 2] == 0).all())
    torch.testing.assert_close(
        solution.model_decrease, (b * expected).sum(0) / 2, rtol=1e-8, atol=1e-12
    )
    one = lq.solve(problem, method, rhs=b[:, 0], rtol=1e-10)
    assert one.step.shape == (problem.size,) and one.model_decrease.ndim == 0
    assert relative(one.step, expected[:, 0]) < 1e-8


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_right_hand_side(method):
    problem = build()
    solution = lq.solve(problem, method, rhs=torch.zeros(problem.size, dtype=F64))
    assert bool((solution.step == 0).all()) and solution.residual_norm == 0 and solution.status.ok


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_right_hand_sides_that_do_not_fit(method):
    problem = build()
    for shape in ((5,), (5, 73), (73, 2, 2), (), (73, 0)):
        with pytest.raises(ValueError, match=r"rhs has shape .*: give \(73,\) or \(73, k\)"):
            lq.solve(problem, method, rhs=torch.zeros(shape, dtype=F64))
    with pytest.raises(ValueError, match=r"rhs is torch.float32 .*convert rhs"):
        lq.solve(problem, method, rhs=torch.zeros(73))
    with pytest.raises(ValueError, match="rhs has entries that are NaN or infinite"):
        lq.solve(problem, method, rhs=torch.full((73,), math.nan, dtype=F64))


# ---- options of the iterative methods


@pytest.mark.parametrize("columns", [1, 2, None])
@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
def test_columns_per_pass_change_nothing(columns, metric):
    """With an operator as damping too, whose product is written into the same buffer."""
    diagonal = DiagLinearOperator(3 + normal(73, seed=2).abs())
    b = normal(73, 5, seed=3)
    for damping in (3.0, diagonal):
        problem = build(columns=columns, metric=metric, damping=damping)
        for method in ("cg", "minres"):
            step = lq.solve(problem, method, rhs=b, rtol=1e-11).step
            assert relative(step, dense_solution(problem, b)) < 1e-8


def test_a_warm_start_saves_iterations():
    problem = build(damping=1e-3)
    cold = lq.solve(problem, "cg", rtol=1e-8, max_iterations=500)
    warm = lq.solve(problem, "cg", initial=0.999 * cold.step, rtol=1e-8, max_iterations=500)
    exact = lq.solve(problem, "cg", initial=cold.step, rtol=1e-8)
    assert exact.iterations == 0 and torch.equal(exact.step, cold.step)
    assert 0 < warm.iterations < cold.iterations
    assert relative(warm.step, dense_solution(problem)) < 1e-4


def test_a_preconditioner_saves_iterations():
    scales = torch.logspace(-2, 2, 73, dtype=F64)
    problem = build(damping=DiagLinearOperator(scales))
    plain = lq.solve(problem, "cg", rtol=1e-8, max_iterations=500)
    inverse = DiagLinearOperator(1 / problem.hessian.diagonal())
    for method in ("cg", "minres"):
        for preconditioner in (inverse, lambda r: r / problem.hessian.diagonal()):
            solution = lq.solve(problem, method, preconditioner=preconditioner, rtol=1e-8)
            assert solution.iterations < plain.iterations / 2
            assert relative(solution.step, dense_solution(problem)) < 1e-5
    bad = lq.solve(problem, "cg", preconditioner=lambda r: -r)
    assert bad.status.code is Code.INDEFINITE
    assert "preconditioner is not positive definite" in bad.status.message


def test_a_trust_region_is_respected():
    problem = build(damping=1e-2)
    free = lq.solve(problem, "cg").step.norm()
    for share in (0.01, 0.5, 0.99):
        solution = lq.solve(problem, "cg", radius=share * float(free))
        assert solution.status.code is Code.TRUST_REGION and solution.status.ok
        assert float(solution.step.norm() / free) == pytest.approx(share, rel=1e-10)
        assert solution.model_decrease > 0
    inside = lq.solve(problem, "cg", radius=1.01 * float(free))
    assert inside.status.code is Code.CONVERGED


def test_max_iterations():
    problem = build(damping=1e-4)
    for method in ("cg", "minres"):
        solution = lq.solve(problem, method, max_iterations=3)
        assert solution.status.code is Code.MAX_ITERATIONS and not solution.status.ok
        assert solution.iterations == 3 and solution.residual_norm > 1e-6
        decrease = -problem.objective(solution.step)
        torch.testing.assert_close(solution.model_decrease, decrease, rtol=1e-10, atol=0)
        assert "Raise `max_iterations`" in solution.status.message
    free = build("tied", damping=1e-4)
    solution = lq.solve(free, "dual", max_iterations=1, rtol=1e-13)
    assert solution.status.code in (Code.MAX_ITERATIONS, Code.CONVERGED)
    assert solution.iterations <= 1


def test_residuals_fall_with_the_tolerance():
    problem = build(damping=1e-3)
    for rtol in (1e-1, 1e-4, 1e-9):
        for method in ("cg", "minres", "dual"):
            assert lq.solve(problem, method, rtol=rtol, max_iterations=300).residual_norm <= rtol


# ---- curvature that is negative


def saddle():
    problem = build(metric="newton", damping=0.0)
    assert torch.linalg.eigvalsh(problem.hessian.to_dense())[0] < -1e-3
    return problem


def test_negative_curvature_is_reported():
    problem = saddle()
    solution = lq.solve(problem, "cg")
    assert solution.status.code is Code.NEGATIVE_CURVATURE and not solution.status.ok
    assert solution.direction is None
    assert problem.gradient @ solution.step < 0  # still a step down
    found = lq.solve(problem, "cg", on_negative_curvature="direction").direction
    assert found @ (problem.hessian @ found) < 0
    assert float(found.norm()) == pytest.approx(1, rel=1e-12)
    with pytest.raises(NegativeCurvatureError, match="Add damping"):
        lq.solve(problem, "cg", on_negative_curvature="raise")
    bounded = lq.solve(problem, "cg", radius=0.1)
    assert bounded.status.ok and float(bounded.step.norm()) == pytest.approx(0.1, rel=1e-10)


def test_the_stationary_point_of_a_saddle():
    problem = build(metric="newton", damping=0.02)
    eigenvalues = torch.linalg.eigvalsh(problem.hessian.to_dense())
    assert eigenvalues[0] < 0 and eigenvalues.abs().min() > 1e-4
    expected = dense_solution(problem)
    solution = lq.solve(problem, "minres", rtol=1e-12, max_iterations=2000)
    assert solution.status.ok, str(solution.status)
    assert relative(solution.step, expected) < 1e-8
    by_recursion = lq.solve(problem, "riccati")
    assert by_recursion.status.code is Code.INDEFINITE
    assert "only its stationary point" in by_recursion.status.message
    assert relative(by_recursion.step, expected) < 1e-8


def test_values_where_the_tail_is_unbounded_are_refused():
    problem = build(metric="newton", damping=0.0)
    for operator in (problem.value(1), problem.gain(1), problem.gain(0).mT):
        with pytest.raises(ValueError, match="the tail problem has no solution: negative curv"):
            operator @ normal(operator.shape[1])


# ---- another damping


@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
def test_with_damping_shares_the_linearisation(metric):
    problem = build(metric=metric, damping=5.0)
    assert problem.gradient is problem.gradient
    for damping in (2.0, [1.0, 0, 2.0, 0, 3.0], {"0": 1.0, "2": 2.0, "4": 3.0}):
        other, fresh = problem.with_damping(damping), build(metric=metric, damping=damping)
        assert other.system.stages is problem.system.stages
        assert other.gradient is problem.gradient
        assert other.origin is problem.origin and other.names == problem.names
        assert relative(other.hessian.to_dense(), fresh.hessian.to_dense()) < 1e-14
        assert relative(other.R[0].to_dense(), fresh.R[0].to_dense()) < 1e-14
        assert relative(lq.solve(other).step, lq.solve(fresh).step) < 1e-12
    twice = problem.with_damping(1.0).with_damping(5.0)
    assert relative(twice.hessian.to_dense(), problem.hessian.to_dense()) < 1e-14


def test_steps_shrink_with_damping_towards_the_gradient():
    problem = build()
    steps = [lq.solve(problem.with_damping(d)).step for d in (1e-2, 1.0, 1e4)]
    assert steps[0].norm() > steps[1].norm() > steps[2].norm()
    # (H + d I)^{-1} g = g / d up to |H| / d.
    assert relative(-1e4 * steps[2], problem.gradient) < 1e-2


# ---- float32


def wide(damping, dtype=torch.float32, metric="gauss_newton"):
    model = mlp(64, 256, 256, 256, 10, activation=nn.ReLU, dtype=dtype)
    inputs, targets = normal(32, 64, seed=1, dtype=dtype), torch.arange(32) % 10
    return lq.LQRProblem.from_network(
        lq.split(model), inputs, targets, loss="cross_entropy", metric=metric, damping=damping
    )


@pytest.mark.parametrize("damping", [1e-1, 1e-3, 1e-5, 1e-6])
def test_the_dual_in_float32_refines_its_residual(damping):
    """One pass leaves eps |H| / damping, which is 1e-2 at 1e-5: the rest is refinement."""
    solution = lq.solve(wide(damping), "dual", rtol=1e-6)
    assert solution.status.code is Code.CONVERGED, str(solution.status)
    assert solution.residual_norm <= 1.5e-6  # measured anew, in float32 products
    assert solution.step.dtype == torch.float32


@pytest.mark.parametrize("damping", [1e-1, 1e-3])
def test_steps_in_float32_are_those_of_float64(damping):
    """A residual of 1e-6 leaves an error of up to |H| / damping times as much."""
    exact = lq.solve(wide(damping, F64), "dual", rtol=1e-12).step
    largest = 10.0
    for method in ("dual", "cg", "auto"):
        step = lq.solve(wide(damping), method, rtol=1e-6, max_iterations=500).step
        assert relative(step, exact) < 1e-6 * largest / damping, method


def test_the_low_rank_sweep_in_float32():
    solution = lq.solve(wide(1e-3), "low_rank", rtol=1e-6)
    assert solution.status.code is Code.CONVERGED and solution.residual_norm <= 1.5e-6


@pytest.mark.parametrize("method", ["dual", "low_rank", "cg"])
def test_a_tolerance_out_of_reach_is_said(method):
    solution = lq.solve(wide(1e-6), method, rtol=1e-9, max_iterations=400)
    assert solution.residual_norm > 1e-9
    assert solution.status.code in (Code.STAGNATED, Code.MAX_ITERATIONS)
    assert not solution.status.ok and "rtol" in solution.status.message


# ---- Levenberg-Marquardt


def test_levenberg_marquardt_follows_the_ratio():
    rule = lq.LevenbergMarquardt(1.0)
    assert math.isnan(rule.ratio) and not rule.accepted
    for actual, damping, accepted in (
        (1.0, 1 / 1.5, True),
        (0.76, 1 / 1.5, True),
        (0.75, 1.0, True),
        (0.5, 1.0, True),
        (0.25, 1.0, True),
        (0.2, 1.5, True),
        (0.0, 1.5, False),
        (-1.0, 1.5, False),
        (math.nan, 1.5, False),
        (math.inf, 1.5, False),
        (-math.inf, 1.5, False),
    ):
        after = rule.updated(actual=actual, predicted=1.0)
        assert after.damping == pytest.approx(damping) and after.accepted is accepted, actual
    for predicted in (0.0, -1.0, math.nan, math.inf):
        failed = rule.updated(actual=1.0, predicted=predicted)
        assert failed.damping == 1.5 and not failed.accepted and failed.ratio == -math.inf
    assert rule.damping == 1.0  # a rule is immutable
    assert rule.updated(actual=2.0, predicted=4.0).ratio == 0.5


def test_levenberg_marquardt_stays_within_its_bounds():
    rule = lq.LevenbergMarquardt(1.0, minimum=0.9, maximum=1.2, increase=2.0, decrease=3.0)
    assert rule.updated(actual=1.0, predicted=1.0).damping == 0.9
    assert rule.updated(actual=0.0, predicted=1.0).damping == 1.2
    strict = lq.LevenbergMarquardt(1.0, accept=0.1)
    assert not strict.updated(actual=0.1, predicted=1.0).accepted
    assert strict.updated(actual=0.2, predicted=1.0).accepted


@pytest.mark.parametrize(
    "wrong",
    [
        *({"damping": wrong} for wrong in (0.0, -1.0, math.nan, math.inf)),
        *({"low": 0.8}, {"increase": 1.0}, {"decrease": 0.5}),
    ],
)
def test_levenberg_marquardt_refuses_what_makes_no_rule(wrong):
    with pytest.raises(ValueError, match=r"damping is|need low < high"):
        lq.LevenbergMarquardt(**({"damping": 1.0} | wrong))


def test_damped_steps_with_the_rule_go_down():
    model, inputs, targets = network("mlp")
    rule, losses = lq.LevenbergMarquardt(1e-2), []
    for _ in range(8):
        problem = lq.LQRProblem.from_network(
            lq.split(model), inputs, targets, loss="cross_entropy", damping=rule.damping
        )
        losses.append(float(problem.origin.loss_value))
        solution = lq.solve(problem)
        with torch.no_grad():
            for name, part in problem.unflatten(solution.step).items():
                model.get_parameter(name).add_(part)
            after = float(nn.functional.cross_entropy(model(inputs), targets))
            rule = rule.updated(actual=losses[-1] - after, predicted=float(solution.model_decrease))
            if not rule.accepted:
                for name, part in problem.unflatten(solution.step).items():
                    model.get_parameter(name).sub_(part)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.1 * losses[0]


def test_the_step_solves_the_equations_it_should():
    problem = build()
    H, g = problem.hessian.to_dense(), problem.gradient
    assert relative(lq.solve(problem).step, dense_step(H, g)) < 1e-6
