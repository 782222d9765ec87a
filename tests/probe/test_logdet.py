"""Log-determinants against dense Cholesky factors."""

from __future__ import annotations

import contextlib
import importlib
import math
import re
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


def expecting_a_warning(expected: bool):
    if not expected:
        return contextlib.nullcontext()
    return pytest.warns(RuntimeWarning, match="Raise `max_iterations`")


@pytest.mark.parametrize("method", ["cg", "lanczos"])
def test_the_bias_bound_holds(method: str) -> None:
    """The same vectors without truncation, for few iterations, with `lower` on the least."""
    for seed in range(10):
        exact = float(logdet(SPD, vectors=3, method="lanczos", steps=N, seed=seed))
        for count in (2, 4, 8, 12):
            for lower in (0.1, 0.05):
                few = {"steps": count} if method == "lanczos" else {"max_iterations": count}
                with expecting_a_warning(method == "cg"):
                    made = logdet(SPD, vectors=3, method=method, lower=lower, seed=seed, **few)
                assert abs(float(made) - exact) <= float(made.bias_bound) * (1 + 1e-9)
    with pytest.raises(ValueError, match="no bound of the spectrum"):
        logdet(SPD, method=method, lower=1.0)


@pytest.mark.parametrize("rtol", [0.5, 0.1, 1e-3])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_bias_bound_holds_where_cg_converges(rtol: float, preconditioned: bool) -> None:
    """It falls with `rtol`, and its half above the Gauss rule as what is left does."""
    m = near_inverse(SPD, 0.5) if preconditioned else None
    lower = 0.49 if preconditioned else 0.1
    for seed in range(10):
        exact = logdet(SPD, vectors=3, preconditioner=m, rtol=1e-12, seed=seed)
        for columns in (1, 3):
            made = logdet(
                SPD, vectors=3, preconditioner=m, rtol=rtol, lower=lower, seed=seed, columns=columns
            )
            bias = float(made.bias_bound)
            assert abs(float(made) - float(exact)) <= bias * (1 + 1e-9)
            # |r|^2 / lower of a Gauss rule for 1 / x; log, with its integral, is no worse.
            assert bias <= rtol**2 * N * 32 / lower


def test_the_bias_bound_does_not_see_the_scale_of_the_preconditioner() -> None:
    m = near_inverse(SPD, 0.5)
    one, two = (
        logdet(SPD, vectors=3, preconditioner=c * m, rtol=0.1, lower=0.49 * c) for c in (1, 1e4)
    )
    assert float(two.bias_bound) == pytest.approx(float(one.bias_bound), rel=1e-6)
    assert float(two) == pytest.approx(float(one), rel=1e-9)


def test_an_early_end_of_cg_is_exact() -> None:
    """Radau's node then has no weight, however low it is."""
    for dtype in (F64, torch.float32):
        for lower in (None, 1e-3, 1.0):
            made = logdet(2 * torch.eye(80, dtype=dtype), lower=lower, rtol=1e-6)
            assert float(made) == pytest.approx(80 * math.log(2), rel=1e-6)
            assert float(made.bias_bound) < 1e-4
    inverse = torch.linalg.inv(SPD)
    inverse = (inverse + inverse.mT) / 2
    made = logdet(SPD, preconditioner=inverse, lower=0.1, vectors=3, rtol=1e-6)
    assert float(made) == pytest.approx(TRUTH, rel=1e-9) and float(made.bias_bound) < 1e-8
    three = with_spectrum(torch.tensor([1.0, 4.0, 9.0], dtype=F64).repeat(20))
    made = logdet(three, lower=0.01, vectors=3, rtol=1e-6)
    assert float(made.bias_bound) < 1e-6


def test_one_iteration_claims_nothing() -> None:
    with pytest.warns(RuntimeWarning, match="30 solves of 30 that did not converge"):
        made = logdet(SPD, max_iterations=1)
    assert made.bias_bound == math.inf
    # Converged, and one step all the same.
    easy = with_spectrum(torch.linspace(1, 2, N, dtype=F64))
    assert logdet(easy, rtol=0.5, vectors=3).bias_bound == math.inf


def test_a_solve_cut_short_warns_from_a_checkpoint_too(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="2 solves of 2"):
            logdet(SPD, vectors=2, max_iterations=4, checkpoint=tmp_path / "cut.pt")


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
    dense, made = (
        logdet(SPD, vectors=5, preconditioner=M, seed=3, rtol=1e-7)
        for M in (torch.diag(1 / d), DiagLinearOperator(1 / d))
    )
    assert float(made) == pytest.approx(float(dense), rel=1e-9)
    constant = ConstantDiagLinearOperator(torch.full((1,), 0.3, dtype=F64), N)
    made = logdet(SPD, vectors=5, preconditioner=constant, rtol=1e-7)
    plain = logdet(SPD, vectors=5, rtol=1e-7)
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
    damped = one.with_damping(1e-3 - 2 * float(values[0]))
    truth = torch.linalg.slogdet(damped.hessian.to_dense())[1]
    low, high = logdet(damped, method=method, vectors=40).interval(0.9999)
    assert low <= truth <= high
    with pytest.raises(ValueError, match=r"positive.definite"):
        logdet(torch.zeros(4, 4, dtype=F64), method=method)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("method", ["cg", "lanczos"])
def test_what_is_singular_to_rounding_is_refused(method: str, dtype: torch.dtype) -> None:
    """Positive by less than a rounding, in few enough eigenvalues that all are met."""
    eps = torch.finfo(dtype).eps
    values = torch.tensor([0.3 * eps, 1.0, 2.0, 3.0], dtype=dtype)
    for scale in (1.0, 1e6):
        operator = DiagLinearOperator(scale * values.repeat(5))
        with pytest.raises(ValueError, match=r"Add damping|add damping"):
            logdet(operator, method=method, steps=20, vectors=2)
    plain = DiagLinearOperator(torch.tensor([1e3 * eps, 1.0, 2.0, 3.0], dtype=dtype))
    made = logdet(plain, method=method, steps=4, vectors=2)
    assert float(made) == pytest.approx(math.log(6e3 * eps), rel=1e-2)


def test_a_singular_hessian_that_is_not_met_is_warned_of() -> None:
    """Curvature without damping whose eigenvalues fill up towards zero."""
    net, x = mlp(12, 16, 8), normal(60, 12)
    layers, y = lq.split(net), torch.arange(60) % 8
    one = lq.LQRProblem.from_network(layers, x, y, loss="cross_entropy", damping=0.0)
    values = torch.linalg.eigvalsh(one.hessian.to_dense())
    assert values[5] < 1e-14 * values[-1]
    with pytest.warns(RuntimeWarning, match=re.escape("`max_iterations` was reached")):
        logdet(one, vectors=3, max_iterations=100)
    with pytest.warns(RuntimeWarning, match="raise `steps`=30, or add damping"):
        logdet(one, vectors=3, steps=30, method="lanczos")


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
    options = {"vectors": 6, "seed": 7, "preconditioner": M, "rtol": 1e-7}
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


def test_memory_is_bounded_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 100_000
    operator = DiagLinearOperator(torch.linspace(1, 2, n, dtype=F64))
    module = importlib.import_module("llqr_mf.probe.spectral_sum")
    monkeypatch.setattr(module, "BASIS_ELEMENTS", 25 * n)
    for M in (None, DiagLinearOperator(torch.ones(n, dtype=F64))):
        with LiveBytes() as memory:
            made = logdet(operator, vectors=12, rtol=0.05, preconditioner=M, lower=1.0)
        # Four vectors at a time, of five or seven numbers to an entry.
        assert memory.peak <= 1.1 * 4 * (5 if M is None else 7) * 8 * n + 8 * n
        assert made.samples == 12
    with LiveBytes() as memory:
        logdet(operator, vectors=12, rtol=0.05, columns=12)
    assert memory.peak <= 1.1 * 12 * 5 * 8 * n


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
