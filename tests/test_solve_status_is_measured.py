"""What a solve says of itself is what its measured residual says, and bad numbers are refused."""

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from linear_operator.operators import DiagLinearOperator
from llqr_mf.solvers import Code, Status, cg
from llqr_mf.solvers import dual as dual_solver
from llqr_mf.solvers.dots import row_dots
from llqr_mf.solvers.dual import FactorizationError, safe_cholesky
from llqr_mf.solvers.status import SEVERITY
from small_models import F64, mlp, normal, relative
from torch import nn

import llqr_mf as lq
from llqr_mf.judge import default_rtol
from llqr_mf.methods import METHODS

EVERY = [*METHODS, "auto"]


def problem_of(dtype=F64, damping=1e-2, **options):
    model = mlp(4, 6, 3, dtype=dtype)
    inputs, targets = normal(8, 4, seed=1, dtype=dtype), torch.arange(8) % 3
    options = {"loss": "cross_entropy", **options}
    return lq.LQRProblem.from_network(lq.split(model), inputs, targets, damping=damping, **options)


def residual(problem, step):
    b = -problem.gradient.double()
    left = problem.hessian.to_dense().double() @ step.double() - b
    return float(left.norm() / b.norm())


# ---- the status


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("code", [Code.CONVERGED, Code.STAGNATED, Code.MAX_ITERATIONS])
@pytest.mark.parametrize("wrong, expected", [(1.0, Code.CONVERGED), (0.9, None), (math.nan, None)])
def test_a_method_is_not_taken_at_its_word(monkeypatch, method, code, wrong, expected):
    problem = problem_of()
    step = torch.linalg.solve(problem.hessian.to_dense(), -problem.gradient) * wrong

    def lies(options):
        found = METHODS_BEFORE[method](options)
        return replace(found, step=step, status=Status(code, "!"), relative=None, decrease=None)

    METHODS_BEFORE = dict(METHODS)
    monkeypatch.setitem(METHODS, method, lies)
    solution = lq.solve(problem, method, rtol=1e-6)
    if expected is None:
        expected = code if code is Code.MAX_ITERATIONS else Code.STAGNATED
        expected = Code.NOT_FINITE if math.isnan(wrong) else expected
    assert solution.status.code is expected
    if expected is Code.STAGNATED and code is Code.CONVERGED:
        assert "1.00e-01 > rtol = 1.00e-06" in solution.status.message


@pytest.mark.parametrize("code", [c for c in SEVERITY if c.name in ("TRUST_REGION", "INDEFINITE")])
def test_answers_to_other_questions_keep_their_name(monkeypatch, code):
    problem, by_cg = problem_of(), METHODS["cg"]
    monkeypatch.setitem(METHODS, "cg", lambda o: replace(by_cg(o), status=Status(code, "!")))
    assert lq.solve(problem, "cg").status.code is code


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("rtol", [0.0, 1e-30, 1e-12, 1e-7, 1e-3, 2.0])
def test_converged_is_a_residual_within_the_tolerance(method, rtol, dtype):
    """And the residual is the dense one, to the rounding of a product with |H| |u| / |g|."""
    problem = problem_of(dtype)
    solution = lq.solve(problem, method, rtol=rtol)
    assert (solution.status.code is Code.CONVERGED) == (solution.residual_norm <= rtol)
    size = float(problem.hessian.to_dense().norm() * solution.step.norm() / problem.gradient.norm())
    slack = 20 * torch.finfo(dtype).eps * max(1.0, size)
    assert abs(solution.residual_norm - residual(problem, solution.step)) <= slack


def test_the_dense_recursion_says_what_it_has_reached():
    """Rounding of gains along six stages leaves a residual over the tolerance."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=F64)  # noqa: E731
    problem = lq.LQRProblem(
        A=[3 * draw(3, 3) for _ in range(6)],
        B=[draw(3, 2) for _ in range(6)],
        Q=[None] * 6 + [torch.eye(3, dtype=F64)],
        R=[1e-4] * 6,
        x0=torch.ones(3, dtype=F64),
    )
    for rtol in (1e-3, 1e-17):
        solution = lq.solve(problem, "riccati", rtol=rtol)
        assert solution.status.ok == (solution.residual_norm <= rtol)


@pytest.mark.parametrize("method", ["cg", "minres", "dual", "low_rank", "auto"])
def test_what_float32_allows_is_converged_by_default(method):
    """The residual that is left is the rounding of the products: more than 1e-5, or about it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 10))
    x, y = torch.randn(64, 20), torch.randint(0, 10, (64,))
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy", damping=1e-4)
    solution = lq.solve(problem, method)
    assert solution.status.ok and solution.residual_norm < 3e-4, solution.status
    literal = lq.solve(problem, method, rtol=solution.residual_norm / 10)
    assert not literal.status.ok or literal.residual_norm <= solution.residual_norm / 10


def test_default_tolerances_leave_room_for_rounding():
    for dtype in (F64, torch.float32, torch.bfloat16, torch.float16):
        assert torch.finfo(dtype).eps < default_rtol(dtype) <= 1e-2


def test_a_poor_step_is_not_excused_by_its_precision(monkeypatch):
    """A tenth is missing, which no rounding takes."""
    problem, by_cg = problem_of(torch.float32), METHODS["cg"]
    monkeypatch.setitem(METHODS, "cg", lambda o: replace(by_cg(o), step=0.9 * by_cg(o).step))
    assert lq.solve(problem, "cg").status.code is Code.STAGNATED


# ---- numbers that make no sense


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize(
    "option, value",
    [
        *[("rtol", v) for v in (math.nan, -1.0, math.inf, -math.inf, "1e-6", True)],
        *[("rtol", torch.tensor(1e-6))],
        *[("max_iterations", v) for v in (0, -1, 2.0, True, math.nan, "5")],
        *[("momentum", v) for v in (1.0, -0.1, math.nan, True, None)],
        *[("radius", v) for v in (0.0, -1.0, math.nan, math.inf, True, "1")],
        *[("recurrence_dtype", v) for v in ("float64", torch.int64, torch.complex64)],
    ],
)
def test_numbers_that_make_no_sense_are_named(method, option, value):
    problem = problem_of()
    with pytest.raises(ValueError, match=f"^{option} is .*: give "):
        lq.solve(problem, method, **{option: value})


def test_what_is_no_problem():
    with pytest.raises(ValueError, match=r"problem is a Linear: give an lq\.LQRProblem"):
        lq.solve(nn.Linear(2, 2))


# ---- complex numbers


def test_complex_vectors_and_operators_are_refused():
    b = torch.ones(3, dtype=torch.complex128)
    with pytest.raises(ValueError, match="view_as_real"):
        row_dots(b.unsqueeze(0), b.unsqueeze(0))
    with pytest.raises(ValueError, match=r"b is torch\.complex128: give real"):
        cg(lambda v: v, b)
    with pytest.raises(ValueError, match="it must stay real"):
        cg(lambda v: v * 1j, torch.ones(3))
    with pytest.raises(ValueError, match=r"preconditioner is torch.complex128"):
        cg(lambda v: v, torch.ones(3), preconditioner=DiagLinearOperator(b))


# ---- factorizations


def psd(largest, least, size=20):
    q, _ = torch.linalg.qr(normal(size, size, seed=1))
    values = torch.logspace(math.log10(least), math.log10(largest), size, dtype=F64)
    return (q * values) @ q.mT


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("largest", [1e-3, 1e8, 1e18, 1e35, 1e200])
def test_any_finite_gram_matrix_is_factored(monkeypatch, largest, broken):
    """F F' is I + G to the rounding of G's largest entry, also where LAPACK gives up."""
    gram = psd(largest, largest * 1e-30)
    gram = (gram + gram.mT) / 2
    if broken:
        failing = mock.Mock(side_effect=torch._C._LinAlgError("did not converge"))
        monkeypatch.setattr(dual_solver.torch.linalg, "eigh", failing)
    factor = safe_cholesky(gram)
    wanted = gram + torch.eye(len(gram), dtype=F64)
    assert bool(factor.isfinite().all()) and torch.equal(factor, factor.tril())
    assert relative(factor / largest**0.5 @ factor.mT / largest**0.5, wanted / largest) < 1e-12


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gram_matrix_that_overflows_names_the_remedy(bad):
    gram = psd(1.0, 1e-3)
    gram[0, 0] = bad
    with pytest.raises(FactorizationError, match="raise the damping"):
        safe_cholesky(gram)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("damping", [1e-7, 1e-10, 1e-14, 1e-18, 1e-25, 1e-40, 1e-300, 1e-310])
def test_tiny_damping(damping, dtype):
    """What auto ends with is as good as cg's; nobody sees LAPACK's own errors."""
    problem = problem_of(dtype, damping)
    auto, by_cg = (lq.solve(problem, method, max_iterations=400) for method in ("auto", "cg"))
    assert auto.status.ok or not by_cg.status.ok, auto.status
    for method in ("dual", "low_rank"):
        try:
            solution = lq.solve(problem, method, max_iterations=50)
        except ValueError as error:
            assert "damping" in str(error) and "method='cg'" in str(error)
        else:
            assert (
                solution.status.ok
                or "method='cg'" in solution.status.message
                or not (math.isfinite(solution.residual_norm))
            )


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_right_or_refused_clearly(dtype, damping, method):
    """Where the status says converged, so does the residual with H in float64.

    Beside the tolerance there is the rounding of the products that measured it, of |H| |u| / |g|.
    """
    problem = problem_of(dtype, damping)
    try:
        solution = lq.solve(problem, method)
    except ValueError as error:
        assert "damping" in str(error) and "method='cg'" in str(error)
        return
    if solution.status.ok:
        assert bool(solution.step.isfinite().all())
        wide = problem_of(F64, damping)
        size = float(wide.hessian.to_dense().norm() * solution.step.double().norm())
        size /= float(wide.gradient.norm())
        allowed = default_rtol(dtype) + 4 * torch.finfo(dtype).eps * (1 + size)
        rounded = problem.hessian.to_dense().double() @ solution.step.double()
        left = (rounded + problem.gradient.double()).norm() / problem.gradient.double().norm()
        assert float(left) <= allowed
