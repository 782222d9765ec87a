"""b'A^{-1}b between its bounds, against dense solutions."""

from __future__ import annotations

import pytest
import torch
from networks import ZOO
from small_models import mlp, normal
from torch import Tensor

import llqr_mf as lq
from llqr_mf.preconditioners import Diagonal
from llqr_mf.probe.inverse_quadratic import inverse_quadratic

F64 = torch.float64
N = 24


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    a = (q * values) @ q.mT
    return (a + a.mT) / 2


SPD = with_spectrum(torch.logspace(-1, 1.5, N, dtype=F64))


def problem(dtype: torch.dtype = F64) -> lq.LQRProblem:
    layers = lq.split(mlp(3, 4, 3, dtype=dtype))
    x, y = normal(6, 3, dtype=dtype), torch.arange(6) % 3
    return lq.LQRProblem.from_network(layers, x, y, loss="cross_entropy", damping=0.05)


@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_inverse_quadratic(columns: int | None, preconditioned: bool) -> None:
    b = normal(N, *([] if columns is None else [columns]), seed=8)
    truth = (b * torch.linalg.solve(SPD, b)).sum(0)
    M = torch.diag(1 / SPD.diagonal()) if preconditioned else None
    for rtol in (0.5, 1e-2, 1e-5, 1e-10):
        made = inverse_quadratic(SPD, b, preconditioner=M, lower=0.1, rtol=rtol)
        assert made.value.shape == truth.shape and bool((made.standard_error == 0).all())
        low, high = made.interval()
        rounding = 1e-13 * truth
        assert bool((low <= truth + rounding).all() and (truth - rounding <= high).all())
        # r'r / lower, of which half is the bound.
        most = rtol**2 * b.square().sum(0) / 0.1 / 2
        assert bool((torch.as_tensor(made.bias_bound) <= most * (1 + 1e-9)).all())
        guess = inverse_quadratic(SPD, b, preconditioner=M, rtol=rtol)
        if rtol <= 1e-5:
            torch.testing.assert_close(guess.value, truth, rtol=1e-8, atol=0)
            assert bool((torch.as_tensor(guess.bias_bound) <= 20 * most).all())
            # The smallest Ritz value has converged, so that it is a bound too.
            low, high = guess.interval()
            assert bool((low <= truth + rounding).all() and (truth - rounding <= high).all())


def test_inverse_quadratic_is_better_than_the_product_with_x() -> None:
    a, b = with_spectrum(torch.logspace(0, 5, 200, dtype=F64)), normal(200)
    truth = b @ torch.linalg.solve(a, b)
    x = lq.solvers.cg(lambda v: v @ a, b, rtol=1e-6, max_iterations=2000).x
    made = inverse_quadratic(a, b, lower=1.0, rtol=1e-6, max_iterations=2000)
    # Both are below, by r'A^{-1}r and by what is lost of the orthogonality of r.
    assert abs(made.interval()[0] - truth) < 0.1 * abs(b @ x - truth)
    assert abs(float(made) - truth) <= float(made.bias_bound) + 1e-13 * truth


def test_the_radau_rule_is_closer_than_the_residual() -> None:
    a, b = with_spectrum(torch.logspace(0, 5, 200, dtype=F64)), normal(200)
    truth = b @ torch.linalg.solve(a, b)
    for count in (20, 100, 200, 300):
        made = inverse_quadratic(a, b, lower=0.9, max_iterations=count)
        low, high = made.interval()
        assert low - 1e-10 * truth <= truth <= high + 1e-10 * truth
        same = inverse_quadratic(
            a, b, preconditioner=torch.eye(200, dtype=F64), lower=0.9, max_iterations=count
        )
        # With M there is the residual alone, and it is far off before CG converges.
        assert float(made.bias_bound) < 0.5 * float(same.bias_bound)


def test_inverse_quadratic_stopped_early_and_zero() -> None:
    b = torch.stack([normal(N), torch.zeros(N, dtype=F64)], 1)
    truth = b[:, 0] @ torch.linalg.solve(SPD, b[:, 0])
    for count in (1, 2, 4, 8):
        made = inverse_quadratic(SPD, b, lower=0.1, max_iterations=count)
        low, high = made.interval()
        assert low[0] <= truth <= high[0] and high[1] == low[1] == 0
    # The iterations, the true residual of CG, and one more of each column.
    assert made.products == 2 * (8 + 2)
    guess = inverse_quadratic(SPD, b)
    assert guess.value[1] == 0 and guess.bias_bound[1] == 0


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_a_bound_above_an_eigenvalue_is_refused(dtype: torch.dtype, preconditioned: bool) -> None:
    b, a = normal(N, 2, seed=8).to(dtype), SPD.to(dtype)
    M = torch.diag(1 / a.diagonal()) if preconditioned else None
    with pytest.raises(ValueError, match=r"lower=0\.5 is no bound"):
        inverse_quadratic(a, b, preconditioner=M, lower=0.5)
    # On the eigenvalue itself it stays.
    made = inverse_quadratic(a, b, preconditioner=M, lower=0.1)
    truth = (b * torch.linalg.solve(SPD, b.double())).sum(0)
    torch.testing.assert_close(made.value, truth, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_bound_above_a_ritz_value_is_refused(dtype: torch.dtype) -> None:
    """Of a small eigenvalue that the solution hardly has."""
    a, b = torch.tensor([0.1, 10.0], dtype=dtype).diag(), torch.tensor([1e-3, 1.0], dtype=dtype)
    with pytest.raises(ValueError, match=r"at most 0\.1\. Give a lower one"):
        inverse_quadratic(a, b, lower=1.0)


def test_inverse_quadratic_of_a_problem_and_in_float32() -> None:
    one = problem()
    g = one.gradient
    truth = float(g @ torch.linalg.solve(one.hessian.to_dense(), g))
    made = inverse_quadratic(one, g, lower=0.05, rtol=1e-8)
    assert float(made) == pytest.approx(truth, rel=1e-10)
    narrow = problem(torch.float32)
    made = inverse_quadratic(
        narrow, narrow.gradient, lower=0.05, preconditioner=Diagonal(narrow), rtol=1e-4
    )
    # Rounding of the model and of the products, eps times the condition number.
    condition = float(torch.linalg.cond(one.hessian.to_dense()))
    assert float(made) == pytest.approx(truth, rel=10 * 1.2e-7 * condition)


def test_an_indefinite_hessian_is_refused() -> None:
    model, inputs, targets, loss = ZOO["mlp"]()
    layers = lq.split(model)
    one = lq.LQRProblem.from_network(layers, inputs, targets, loss=loss, metric="newton")
    with pytest.raises(ValueError, match="positive-definite"):
        inverse_quadratic(one, one.gradient)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="rtol is 1"):
        inverse_quadratic(SPD, normal(N), rtol=1.0)
    with pytest.raises(ValueError, match="lower is 0"):
        inverse_quadratic(SPD, normal(N), lower=0.0)
    with pytest.raises(ValueError, match="does not fit b"):
        inverse_quadratic(SPD, normal(N + 1))
    with pytest.raises(ValueError, match="convert one of them"):
        inverse_quadratic(SPD, normal(N).float())
