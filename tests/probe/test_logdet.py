"""Log-determinants and inverse quadratic forms against dense Cholesky factors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from linear_operator.operators import ConstantDiagLinearOperator, DiagLinearOperator
from llqr_mf.operators.from_function import from_function
from memory import LiveBytes
from networks import ZOO
from scipy.stats import binom
from small_models import mlp, normal
from torch import Tensor

import llqr_mf as lq
from llqr_mf.preconditioners import (
    Diagonal,
    EKronecker,
    Identity,
    Kronecker,
    LowRank,
    Scalar,
    Scaled,
    Sum,
)
from llqr_mf.preconditioners.base import Structure
from llqr_mf.preconditioners.direct_sum import structure
from llqr_mf.probe.inverse_quadratic import inverse_quadratic
from llqr_mf.probe.logdet import logdet

F64 = torch.float64
N, SEEDS = 24, 100


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    a = (q * values) @ q.mT
    return (a + a.mT) / 2


SPD = with_spectrum(torch.logspace(-1, 1.5, N, dtype=F64))
TRUTH = float(torch.linalg.slogdet(SPD)[1])


def near_inverse(a: Tensor, error: float) -> Tensor:
    """A^{-1/2} (I + error E) A^{-1/2} for a symmetric E of norm 1: as good as one likes."""
    values, q = torch.linalg.eigh(a)
    root = (q * values.rsqrt()) @ q.mT
    e = with_spectrum(torch.linspace(-1, 1, len(a), dtype=F64), seed=5)
    m = root @ (torch.eye(len(a), dtype=F64) + error * e) @ root
    return (m + m.mT) / 2


@pytest.mark.parametrize("preconditioned", [False, True])
def test_unbiased_and_as_sure_as_it_says(preconditioned: bool) -> None:
    m = near_inverse(SPD, 0.5) if preconditioned else None
    values, covered = [], 0
    for seed in range(SEEDS):
        made = logdet(SPD, vectors=12, preconditioner=m, rtol=1e-8, seed=seed)
        low, high = made.interval()
        covered += bool(low <= TRUTH <= high)
        values.append(float(made))
    values = torch.tensor(values, dtype=F64)
    assert abs(values.mean() - TRUTH) < 4 * values.std() / SEEDS**0.5
    # The estimate of the truncation may widen an interval a little.
    assert binom.ppf(1e-4, SEEDS, 0.95) <= covered


def test_lanczos_and_cg_agree() -> None:
    by_cg = logdet(SPD, vectors=4, rtol=1e-10, seed=2)
    by_lanczos = logdet(SPD, vectors=4, method="lanczos", steps=N, seed=2)
    assert float(by_cg) == pytest.approx(float(by_lanczos), rel=1e-9)
    assert by_lanczos.products == 4 * N and by_lanczos.bias_bound == 0


def test_the_variance_falls_with_the_preconditioner() -> None:
    """As the spread of the logarithms of the eigenvalues of M A does."""
    before = float(logdet(SPD, vectors=200).standard_error)
    for error in (0.5, 0.05, 0.005):
        m = near_inverse(SPD, error)
        made = logdet(SPD, vectors=200, preconditioner=m)
        now = float(made.standard_error)
        # The variance of z'f z is at most 2 |f|_F^2, with f = log(I + error E).
        f = torch.log1p(error * torch.linspace(-1, 1, N, dtype=F64)).norm()
        assert now < 1.2 * math.sqrt(2 / 200) * float(f)
        assert now < before / 2
        assert abs(float(made) - TRUTH) < 5 * now + float(made.bias_bound)
        before = now
    exact = logdet(SPD, vectors=2, preconditioner=torch.linalg.inv(SPD))
    assert float(exact) == pytest.approx(TRUTH, rel=1e-11)


@pytest.mark.parametrize("method", ["cg", "lanczos"])
def test_the_bias_bound_holds(method: str) -> None:
    """The same vectors without truncation, for few iterations, with `lower` on the least."""
    for seed in range(10):
        exact = float(logdet(SPD, vectors=3, method="lanczos", steps=N, seed=seed))
        for count in (2, 4, 8, 12):
            for lower in (0.1, 0.05):
                few = {"steps": count} if method == "lanczos" else {"max_iterations": count}
                made = logdet(SPD, vectors=3, method=method, lower=lower, seed=seed, **few)
                assert abs(float(made) - exact) <= float(made.bias_bound) * (1 + 1e-9)
    with pytest.raises(ValueError, match="no bound of the spectrum"):
        logdet(SPD, method=method, lower=1.0)


# ---- structures


LAYERS = lq.split(mlp(3, 4, 3))


def problem(dtype: torch.dtype = F64, **options) -> lq.LQRProblem:
    layers = LAYERS if dtype == F64 else lq.split(mlp(3, 4, 3, dtype=dtype))
    x, y = normal(6, 3, dtype=dtype), torch.arange(6) % 3
    options = {"loss": "cross_entropy", "damping": 0.05, **options}
    return lq.LQRProblem.from_network(layers, x, y, **options)


def random_(made: Structure, seed: int = 0) -> Structure:
    """Writes something positive definite into every tensor."""
    for i, (name, tensor) in enumerate(made.tensors.items()):
        draw = normal(*tensor.shape, seed=100 * seed + i).to(tensor)
        if "factor" in name and tensor.ndim == 2:
            tensor.copy_(draw @ draw.mT / len(draw) + torch.eye(len(draw), dtype=tensor.dtype))
        elif "basis" in name and tensor.ndim == 2:
            tensor.copy_(torch.linalg.qr(draw)[0])
        else:
            tensor.copy_(draw.exp())
    return made


def low_rank(one: lq.LQRProblem) -> LowRank:
    made = LowRank(one, rank=4)
    made.set_diagonal(normal(one.size, seed=1).exp())
    made.set_basis(normal(3, one.size, seed=2))
    core = normal(3, 3, seed=3)
    made.core[:3, :3] = core @ core.mT + torch.eye(3, dtype=F64)
    return made


STRUCTURES = {
    "identity": Identity,
    "scalar": lambda p: random_(Scalar(p)),
    "diagonal": lambda p: random_(Diagonal(p)),
    "kronecker": lambda p: random_(Kronecker(p)),
    "kronecker, diagonal sides": lambda p: random_(Kronecker(p, max_side=3, biases="diagonal")),
    "ekronecker": lambda p: random_(EKronecker(p)),
    "low rank": low_rank,
    "direct sum": lambda p: random_(structure(p, [("*weight", "kronecker"), ("*", "diagonal")])),
    "scaled": lambda p: Scaled(random_(Diagonal(p), 1), random_(Kronecker(p), 2)),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_as_preconditioners(name: str) -> None:
    """Not good ones: the answer is right whatever M is."""
    one = problem()
    truth = torch.linalg.slogdet(one.hessian.to_dense())[1]
    M = STRUCTURES[name](one)
    made = logdet(one, vectors=60, preconditioner=M, seed=4)
    low, high = made.interval(0.9999)
    assert low <= truth <= high


def test_a_diagonal_operator_as_preconditioner() -> None:
    d = SPD.diagonal()
    dense = logdet(SPD, vectors=5, preconditioner=torch.diag(1 / d), seed=3)
    for M in (DiagLinearOperator(1 / d),):
        made = logdet(SPD, vectors=5, preconditioner=M, seed=3)
        assert float(made) == pytest.approx(float(dense), rel=1e-9)
    constant = ConstantDiagLinearOperator(torch.full((1,), 0.3, dtype=F64), N)
    made, plain = logdet(SPD, vectors=5, preconditioner=constant), logdet(SPD, vectors=5)
    assert float(made) == pytest.approx(float(plain), rel=1e-9)


# ---- networks


@pytest.mark.parametrize("name", ["mlp", "convnet", "layer_and_rms_norm"])
@pytest.mark.parametrize("method", ["cg", "lanczos"])
def test_gauss_newton_of_networks(name: str, method: str) -> None:
    model, inputs, targets, loss = ZOO[name]()
    layers = lq.split(model)
    one = lq.LQRProblem.from_network(layers, inputs, targets, loss=loss, damping=0.01)
    truth = torch.linalg.slogdet(one.hessian.to_dense())[1]
    made = logdet(one, vectors=40, method=method, steps=20, lower=0.01)
    low, high = made.interval(0.9999)
    assert low <= truth <= high
    assert float(made.bias_bound) < 0.05 * float(made.standard_error)


@pytest.mark.parametrize("method", ["cg", "lanczos"])
def test_an_indefinite_hessian_is_refused(method: str) -> None:
    model, inputs, targets, loss = ZOO["mlp"]()
    layers = lq.split(model)
    one = lq.LQRProblem.from_network(layers, inputs, targets, loss=loss, metric="newton")
    values = torch.linalg.eigvalsh(one.hessian.to_dense())
    assert values[0] < -1e-4
    with pytest.raises(ValueError, match=r"positive.definite"):
        logdet(one, method=method)
    with pytest.raises(ValueError, match="positive-definite"):
        inverse_quadratic(one, one.gradient)
    damped = one.with_damping(1e-3 - 2 * float(values[0]))
    truth = torch.linalg.slogdet(damped.hessian.to_dense())[1]
    low, high = logdet(damped, method=method, vectors=40).interval(0.9999)
    assert low <= truth <= high
    with pytest.raises(ValueError, match=r"positive.definite"):
        logdet(torch.zeros(4, 4, dtype=F64), method=method)


# ---- bookkeeping


def test_float32() -> None:
    wide = logdet(SPD, vectors=5, seed=3, rtol=1e-6)
    for method in ("cg", "lanczos"):
        made = logdet(SPD.float(), vectors=5, seed=3, method=method, steps=N)
        assert made.value.dtype == F64
        # CG ends at 1e-4, squared; T rounds to eps |A|, where |f'| is 10 at most.
        assert float(made) == pytest.approx(float(wide), abs=N * 1.2e-7 * 32 * 10 * 2)
    one = problem(torch.float32)
    truth = torch.linalg.slogdet(one.hessian.to_dense().double())[1]
    made = logdet(one, vectors=60, preconditioner=random_(Kronecker(one)))
    low, high = made.interval(0.9999)
    assert low <= truth <= high


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    calls = []

    def times(v: Tensor) -> Tensor:
        calls.append(len(v))
        return v @ SPD

    operator = from_function(times, N, dtype=F64, rows=True)
    M = DiagLinearOperator(1 / SPD.diagonal())
    options = {"vectors": 6, "seed": 7, "preconditioner": M}
    one, two = (logdet(operator, **options) for _ in range(2))
    assert torch.equal(one.value, two.value) and one.products == sum(calls) // 2
    for columns in (1, 4):
        made = logdet(operator, columns=columns, **options)
        assert float(made) == pytest.approx(float(one), rel=1e-9)
    path = tmp_path / "logdet.pt"
    kept = logdet(operator, columns=2, checkpoint=path, **options)
    calls.clear()
    again = logdet(operator, columns=2, checkpoint=path, **options)
    assert calls == [1] and torch.equal(again.value, kept.value)
    assert again.products == kept.products and torch.equal(
        again.standard_error, kept.standard_error
    )
    for other in ({"rtol": 1e-3}, {"preconditioner": None}, {"lower": 0.1}):
        with pytest.raises(ValueError, match="another computation"):
            logdet(operator, columns=2, checkpoint=path, **{**options, **other})


def test_memory() -> None:
    """Four vectors of CG a column, the right-hand sides twice, and what a product makes."""
    n = 4_000_000
    operator = DiagLinearOperator(torch.linspace(1, 2, n))
    with LiveBytes() as memory:
        made = logdet(operator, vectors=2, columns=1, rtol=0.05)
    block = 8 * n  # 2^22 < 2^24 numbers: CG takes float64
    assert memory.peak <= 9 * block
    assert abs(float(made) - n * (2 * math.log(2) - 1)) <= float(made.bias_bound) + 1e-5 * n


# ---- inverse quadratic forms


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


# ---- bad input


def test_bad_input() -> None:
    for options, match in (
        ({"method": "qr"}, "method='qr'"),
        ({"vectors": 0}, "vectors is 0"),
        ({"lower": 0.0}, "lower is 0"),
        ({"lower": -1.0}, "lower is -1"),
        ({"rtol": 1.5}, "rtol is 1.5"),
        ({"method": "lanczos", "steps": 1}, "steps is 1"),
        ({"method": "lanczos", "preconditioner": SPD}, "takes no preconditioner"),
        ({"preconditioner": SPD[:3, :3].contiguous()}, "preconditioner has shape"),
        ({"preconditioner": -SPD}, "'preconditioner' is not positive definite"),
        ({"preconditioner": DiagLinearOperator(-SPD.diagonal())}, "diagonal is not positive"),
        ({"preconditioner": from_function(lambda v: v, N, dtype=F64)}, "no root"),
    ):
        with pytest.raises(ValueError, match=match):
            logdet(SPD, **options)
    one = problem()
    with pytest.raises(ValueError, match="no root of a Sum"):
        logdet(one, preconditioner=Sum([Diagonal(one), Diagonal(one)]))
    with pytest.raises(ValueError, match="rtol is 1"):
        inverse_quadratic(SPD, normal(N), rtol=1.0)
    with pytest.raises(ValueError, match="lower is 0"):
        inverse_quadratic(SPD, normal(N), lower=0.0)
    with pytest.raises(ValueError, match="does not fit b"):
        inverse_quadratic(SPD, normal(N + 1))
    with pytest.raises(ValueError, match="convert one of them"):
        inverse_quadratic(SPD, normal(N).float())
