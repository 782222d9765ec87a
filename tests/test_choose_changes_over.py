"""How auto begins with CG and changes to the dual, and back where the dual fails."""

import math

import pytest
import torch
from llqr_mf.solvers import Code, cg
from llqr_mf.solvers.dual import FactorizationError
from small_models import F64, images, mlp, normal, relative, seeded
from torch import nn

import llqr_mf as lq
from llqr_mf import choose, output_sweep
from llqr_mf.choose import dual_in_iterations, gives_up
from llqr_mf.methods import METHODS
from llqr_mf.output_sweep import calls


class Opaque(nn.Module):
    def __init__(self, inner, axes):
        super().__init__()
        self.inner, self.axes = inner, axes

    def forward(self, x):
        if x.ndim != self.axes:
            raise ValueError("a batch, please")
        return self.inner(x)


def problem_of(model, inputs, damping=1e-4, **options):
    options = {"loss": "cross_entropy", "damping": damping, **options}
    targets = torch.arange(len(inputs)) % 3
    return lq.LQRProblem.from_network(lq.split(model), inputs, targets, **options)


def small(damping=1e-4):
    return problem_of(mlp(4, 16, 3), normal(40, 4, seed=1), damping)


@pytest.fixture
def tried(monkeypatch):
    """As for a dual that costs 20 iterations of CG, and a spectrum that nobody can tell."""
    monkeypatch.setattr(choose, "AT_ONCE", 0.0)
    monkeypatch.setattr(choose, "likely_iterations", lambda *_: 0.0)
    monkeypatch.setattr(choose, "dual_in_iterations", lambda *_: 20.0)


# ---- when to give up


@pytest.mark.parametrize("rate", [0.5, 0.2])
def test_a_solve_that_ends_soon_goes_on(rate):
    give_up = gives_up(20.0, 1e-6)
    assert not any(give_up(k, rate**k) for k in range(1, math.ceil(math.log(1e-6, rate)) + 1))


@pytest.mark.parametrize("rate", [0.99, 1.0, 1.05])
def test_a_solve_that_takes_long_is_given_up_early(rate):
    """Before it has taken a third of what is instead; first residuals say nothing of a rate."""
    give_up = gives_up(100.0, 1e-6)
    ended = next(k for k in range(1, 1000) if give_up(k, rate**k))
    assert 4 <= ended <= 33


def test_a_solve_that_speeds_up_is_believed():
    """Slow at first, then ten times less each iteration: ten remain when it is looked at."""
    give_up = gives_up(60.0, 1e-9)
    residuals = [1.0, 0.9, 0.8, 0.5, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9]
    assert not any(give_up(k + 1, r) for k, r in enumerate(residuals))


def spent(residuals, patience, rtol):
    """Iterations' worth of a CG with these residuals that makes room for what costs `patience`."""
    give_up = gives_up(patience, rtol)
    for k, residual in enumerate(residuals, 1):
        if residual <= rtol:
            return k
        if give_up(k, residual):
            return k + patience
    raise AssertionError("neither ended nor given up")


@pytest.mark.parametrize("patience", [5.0, 20.0, 100.0, 1000.0])
def test_at_a_steady_rate_the_better_is_missed_by_half_at_most(patience):
    """From CG three hundred times quicker to one as much slower, on either side of a tie.

    Given up at half of the patience at the latest, with more than 0.7 of it to go; iterations
    before the first look come on top, which weigh where both costs are few.
    """
    rtol = 1e-6
    for taken in (3, 10, 0.5 * patience, 0.9 * patience, 1.2 * patience, 1.9 * patience, 1e5):
        rate = rtol ** (1 / taken)
        cost = spent((rate**k for k in range(1, 200_000)), patience, rtol)
        assert cost <= 1.5 * min(math.ceil(taken), patience) + 4


def test_what_takes_five_times_as_long_is_seen_in_a_tenth_of_the_time():
    taken, patience, rtol = 500.0, 100.0, 1e-6
    assert spent((rtol ** (k / taken) for k in range(1, 600)), patience, rtol) <= 1.1 * patience


@pytest.mark.parametrize("ahead", [3, 10])
def test_a_solve_that_comes_to_rest_is_given_up(ahead):
    """It falls by half each time at first: twice what the dual alone costs, at most."""
    patience = 40.0
    residuals = (0.5 ** min(k, ahead) for k in range(1, 10_000))
    assert spent(residuals, patience, 1e-12) <= 2 * patience + ahead


def test_cg_ends_where_it_is_told_to():
    """With an iterate and its true residual, in no more iterations."""
    matrix = torch.diag(torch.logspace(0, 6, 50, dtype=F64))
    b, seen = torch.ones(50, dtype=F64), []

    def give_up(iterations, residual):
        seen.append(residual)
        return iterations == 7

    found = cg(lambda v: v @ matrix, b, rtol=1e-12, give_up=give_up)
    assert found.status.code is Code.MAX_ITERATIONS and found.iterations == 7 == len(seen)
    assert relative(matrix @ found.x, b) == pytest.approx(float(found.residual_norm), rel=1e-9)


# ---- what auto does


def test_auto_changes_to_the_dual_and_says_so(tried):
    problem = small()
    solution = lq.solve(problem, rtol=1e-9)
    assert solution.method == "dual" and solution.status.ok
    assert "gives way if it looks slower; its residual was" in solution.status.message
    exact = torch.linalg.solve(problem.hessian.to_dense(), -problem.gradient)
    assert relative(solution.step, exact) < 1e-6
    alone = lq.solve(problem, "dual", rtol=1e-9)
    assert solution.iterations >= 4 and solution.products > alone.products + 4


def test_auto_stays_with_a_quick_cg(tried):
    solution = lq.solve(small(1.0), rtol=1e-4)
    assert solution.method == "cg" and solution.status.ok
    assert solution.iterations == lq.solve(small(1.0), "cg", rtol=1e-4).iterations


def test_the_iterations_that_were_allowed_are_all_that_is_done(tried):
    solution = lq.solve(small(), rtol=1e-9, max_iterations=3)
    assert solution.method == "cg" and solution.status.code is Code.MAX_ITERATIONS


@pytest.mark.parametrize("how", ["raises", "poor", "not finite"])
def test_cg_steps_in_where_the_dual_fails(monkeypatch, how):
    problem, by_dual = small(), METHODS["dual"]
    monkeypatch.setattr(choose, "AT_ONCE", math.inf)

    def fails(options):
        if how == "raises":
            raise FactorizationError("not finite")
        found = by_dual(options)
        scale = 0.5 if how == "poor" else math.nan
        found.step.mul_(scale)
        status = type(found.status)(Code.STAGNATED, "!")
        return type(found)(found.step, status)

    monkeypatch.setitem(METHODS, "dual", fails)
    solution = lq.solve(problem, rtol=1e-8)
    assert solution.method == "cg" and solution.status.ok
    assert ("not finite" if how == "raises" else "dual left a residual") in solution.status.message
    with pytest.raises(FactorizationError) if how == "raises" else pytest.MonkeyPatch.context():
        assert not lq.solve(problem, "dual").status.ok


@pytest.mark.parametrize(
    "patience, likely, begins",
    [
        (3.0, 0.0, "dual"),  # hardly a CG is as quick
        (6.0, 2.0, "cg"),
        (6.0, 4.0, "dual"),
        (14.0, 100.0, "cg"),  # which are often an overestimate: a look at CG costs little
        (14.0, 500.0, "dual"),
        (90.0, 5000.0, "cg"),
    ],
)
def test_where_auto_begins(monkeypatch, patience, likely, begins):
    monkeypatch.setattr(choose, "dual_in_iterations", lambda *_: patience)
    monkeypatch.setattr(choose, "likely_iterations", lambda *_: likely)
    # CG takes four iterations here: no rate is told before it ends.
    solution = lq.solve(small(1.0), rtol=1e-4)
    assert solution.method == begins and solution.status.ok
    told = solution.status.message
    assert f"costs as much as {patience:.2g} iterations of cg by a count of flops" in told
    assert ("cg begins, and gives way if it looks slower" in told) == (begins == "cg")


def test_an_estimate_is_made_only_where_it_may_decide(monkeypatch):
    """It costs half a product: nothing beside a long dual, and more than it's worth."""

    def never(*_):
        raise AssertionError("told")

    monkeypatch.setattr(choose, "likely_iterations", never)
    for patience in (3.0, 90.0):
        monkeypatch.setattr(choose, "dual_in_iterations", lambda *_, p=patience: p)
        assert lq.solve(small(1.0), rtol=1e-4).status.ok


@pytest.mark.parametrize("begins", [0.0, math.inf])
def test_samples_are_told_apart_once_for_a_problem(monkeypatch, begins):
    """By auto and by the Gram matrix, of the model of its layers, and in every solve."""
    asked = []
    keeps = output_sweep._keeps_rows

    def counted(problem, bound, *rest):
        asked.append(bound)
        return keeps(problem, bound, *rest)

    monkeypatch.setattr(output_sweep, "_keeps_rows", counted)
    monkeypatch.setattr(choose, "AT_ONCE", begins)
    problem = small()
    lq.solve(problem, rtol=1e-3)
    once = len(asked)
    lq.solve(problem, rtol=1e-6)
    lq.solve(problem, "dual")
    assert 0 < once == len(asked)
    lq.solve(small(), "dual")
    assert len(asked) == 2 * once


def test_memory_is_reckoned_with(monkeypatch):
    monkeypatch.setattr(choose.os, "sysconf", lambda _: 100)
    assert "half of the memory" in lq.solve(small()).status.message


def test_the_likely_iterations_grow_with_the_condition_number():
    taken = []
    for damping in (1.0, 1e-2, 1e-4):
        solution_of = small(damping)
        options = type("Options", (), {"problem": solution_of, "b": -solution_of.gradient})()
        options.rtol = 1e-6
        likely = choose.likely_iterations(options, damping)
        iterations = lq.solve(solution_of, "cg", rtol=1e-6).iterations
        assert likely / 6 <= iterations <= 6 * likely
        taken.append(likely)
    assert taken == sorted(taken)


# ---- work


@pytest.mark.parametrize(
    "model, inputs",
    [
        (lambda: mlp(4, 16, 8, 3), normal(10, 4)),
        (
            lambda: seeded(
                lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
            ),
            images(10),
        ),
    ],
)
def test_an_opaque_call_counts_the_flops_of_what_is_in_it(model, inputs):
    traced = problem_of(model(), inputs)
    opaque = problem_of(Opaque(model(), inputs.ndim), inputs)
    (bound,) = calls(opaque)
    work = bound.node.work()
    assert work.flops == sum(b.node.work().flops for b in calls(traced)) > 0
    assert work.kernels > 0 and work.elements > 0
    assert 0 < dual_in_iterations(opaque, 3, 10) < math.inf
