"""Traces of functions and effective dimensions against dense spectra."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from linear_operator.operators import DiagLinearOperator
from llqr_mf.operators.from_function import from_function
from memory import LiveBytes
from networks import ZOO
from scipy.stats import binom
from small_models import mlp, normal
from torch import Tensor

import llqr_mf as lq
from llqr_mf.probe.effective_dimension import effective_dimension
from llqr_mf.probe.spectral_density import spectral_density
from llqr_mf.probe.spectral_sum import spectral_sum

F64 = torch.float64
SEEDS = 80


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    a = (q * values) @ q.mT
    return (a + a.mT) / 2


N = 24
POSITIVE = torch.logspace(-1, 1, N, dtype=F64)


def share(x: Tensor) -> Tensor:
    return x / (x + 0.3)


FUNCTIONS = {"log": torch.log, "inverse": torch.reciprocal, "share": share, "sine": torch.sin}


@pytest.mark.parametrize(
    ("function", "probes"),
    [
        ("log", "rademacher"),
        ("inverse", "gaussian"),
        ("share", "spherical"),
        ("sine", "rademacher"),
    ],
)
def test_unbiased_and_as_sure_as_it_says(function: str, probes: str) -> None:
    """At all steps the quadrature is exact, and the error is that of the vectors alone."""
    f, a = FUNCTIONS[function], with_spectrum(POSITIVE)
    truth = float(f(POSITIVE).sum())
    values, covered = [], 0
    for seed in range(SEEDS):
        made = spectral_sum(a, f, vectors=12, steps=N, probes=probes, seed=seed)
        low, high = made.interval(0.95)
        covered += bool(low <= truth <= high)
        values.append(float(made))
        assert made.products == 12 * N and float(made.bias_bound) <= 1e-9 * abs(truth)
    values = torch.tensor(values, dtype=F64)
    assert abs(values.mean() - truth) < 4 * values.std() / SEEDS**0.5
    # Twelve nearly normal samples: 95 %, in 80 seeds between the 0.01 % points of a binomial.
    assert binom.ppf(1e-4, SEEDS, 0.95) <= covered <= binom.isf(1e-4, SEEDS, 0.95)


@pytest.mark.parametrize("function", ["log", "inverse", "share"])
@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("lower", [0.1, 0.05])
def test_the_bias_bound_holds(function: str, steps: int, lower: float) -> None:
    """The same vectors with all steps have no bias: the difference is the truncation."""
    f, a = FUNCTIONS[function], with_spectrum(POSITIVE)
    for seed in range(20):
        exact = spectral_sum(a, f, vectors=3, steps=N, seed=seed)
        made = spectral_sum(a, f, vectors=3, steps=steps, lower=lower, seed=seed)
        off = abs(float(made) - float(exact))
        assert off <= float(made.bias_bound) * (1 + 1e-9) + 1e-9
    assert float(made.bias_bound) > 1e-6


def test_the_estimate_of_the_truncation_covers_it() -> None:
    a = with_spectrum(POSITIVE)
    for f in (torch.log, torch.reciprocal, torch.sqrt):
        exact = spectral_sum(a, f, vectors=3, steps=N)
        for steps in (8, 12, 16):
            made = spectral_sum(a, f, vectors=3, steps=steps)
            assert abs(float(made) - float(exact)) <= float(made.bias_bound)


def test_polynomials_are_free_of_truncation() -> None:
    values = torch.linspace(-2, 3, N, dtype=F64)
    a = with_spectrum(values)
    for steps, degree in ((2, 3), (4, 7)):
        exact = spectral_sum(a, lambda x, k=degree: x**k, vectors=4, steps=N)
        made = spectral_sum(a, lambda x, k=degree: x**k, vectors=4, steps=steps)
        assert float(made) == pytest.approx(float(exact), rel=1e-11)
    for a in (torch.full((1, 1), 7.0, dtype=F64), torch.zeros(1, 1, dtype=F64)):
        assert float(spectral_sum(a, torch.exp)) == pytest.approx(math.exp(float(a)))


# ---- networks


def net_problem(name: str, metric: str, damping: float) -> lq.LQRProblem:
    model, inputs, targets, loss = ZOO[name]()
    return lq.LQRProblem.from_network(
        lq.split(model), inputs, targets, loss=loss, metric=metric, damping=damping
    )


@pytest.mark.parametrize("name", ["mlp", "convnet", "layer_and_rms_norm"])
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_gauss_newton_of_networks(name: str, reorthogonalize: bool) -> None:
    """Most eigenvalues sit on the bound."""
    problem = net_problem(name, "gauss_newton", 0.1)
    values = torch.linalg.eigvalsh(problem.hessian.to_dense())
    made = spectral_sum(
        problem, torch.log, vectors=40, steps=20, lower=0.1, reorthogonalize=reorthogonalize
    )
    low, high = made.interval(0.9999)
    assert low <= values.log().sum() <= high
    assert float(made.bias_bound) < 0.02 * float(made.standard_error)


@pytest.mark.parametrize("name", ["mlp", "layer_and_rms_norm"])
def test_newton_of_networks(name: str) -> None:
    problem = net_problem(name, "newton", 0.0)
    values = torch.linalg.eigvalsh(problem.hessian.to_dense())
    assert values[0] < -1e-4, "indefinite"
    made = spectral_sum(problem.hessian, torch.square, vectors=40, steps=10)
    low, high = made.interval(0.9999)
    assert low <= values.square().sum() <= high
    with pytest.raises(ValueError, match="function is not finite"):
        spectral_sum(problem, torch.log)
    with pytest.raises(ValueError, match="no bound of the spectrum"):
        spectral_sum(problem, torch.log1p, lower=0.0)


def test_float32() -> None:
    a = with_spectrum(POSITIVE)
    wide = spectral_sum(a, torch.log, lower=0.05, seed=3)
    for reorthogonalize in (True, False):
        made = spectral_sum(
            a.float(), torch.log, lower=0.05, seed=3, reorthogonalize=reorthogonalize
        )
        assert made.value.dtype == torch.float64
        # The signs are the same; T rounds to eps |A|, where |f'| is 10 at most.
        assert float(made) == pytest.approx(float(wide), abs=N * 10 * 10 * 1.2e-7)


# ---- bookkeeping


def test_the_seed_alone_decides() -> None:
    a = with_spectrum(POSITIVE)
    one, two = (spectral_sum(a, torch.log, steps=12, seed=5) for _ in range(2))
    assert torch.equal(one.value, two.value) and one.seed == 5
    other = spectral_sum(a, torch.log, steps=12, seed=6)
    assert float(one) != float(other)
    for columns in (1, 3, 20):
        made = spectral_sum(a, torch.log, steps=12, seed=5, columns=columns)
        assert float(made) == pytest.approx(float(one), rel=1e-10)
        assert float(made.standard_error) == pytest.approx(float(one.standard_error), rel=1e-8)
        assert made.products == one.products == 120
    assert json.loads(json.dumps(one.to_dict()))["products"] == 120


def test_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    a, path, calls = with_spectrum(POSITIVE), tmp_path / "runs.pt", []

    def times(v: Tensor) -> Tensor:
        calls.append(len(v))
        if len(calls) == 20:
            raise KeyboardInterrupt
        return v @ a

    operator = from_function(times, N, dtype=F64, rows=True)
    options = {"vectors": 6, "steps": 12, "columns": 2, "checkpoint": path}
    with pytest.raises(KeyboardInterrupt):
        spectral_sum(operator, torch.log, **options)
    # One for the fingerprint, twelve for the first chunk, some of the second.
    whole = spectral_sum(operator, torch.log, lower=0.1, **options)
    assert len(calls) == 20 + 1 + 24, "the first chunk was kept"
    alone = spectral_sum(operator, torch.log, lower=0.1, **{**options, "checkpoint": None})
    assert torch.equal(whole.value, alone.value) and whole.products == alone.products == 72
    # The same runs serve other functions, and the density.
    spent = len(calls)
    inverse = spectral_sum(operator, torch.reciprocal, **options)
    density = spectral_density(operator, **options)
    assert len(calls) - spent == 2
    assert float((density.weights / density.nodes).sum(1).mean()) == pytest.approx(float(inverse))
    with pytest.raises(ValueError, match="another computation"):
        spectral_sum(operator, torch.log, **{**options, "steps": 13})
    with pytest.raises(ValueError, match="another operator"):
        spectral_sum(2 * a, torch.log, **options)


@pytest.mark.parametrize(("reorthogonalize", "blocks"), [(True, 5 + 4), (False, 4)])
def test_memory(reorthogonalize: bool, blocks: int) -> None:
    n = 4_000_000
    operator = DiagLinearOperator(torch.linspace(1, 2, n))
    with LiveBytes() as memory:
        made = spectral_sum(
            operator,
            torch.log,
            vectors=2,
            steps=5,
            columns=1,
            lower=1.0,
            reorthogonalize=reorthogonalize,
        )
    assert memory.peak <= 1.01 * blocks * 4 * n
    # Of a diagonal operator, Rademacher vectors leave the rounding of T and the truncation.
    truth = n * (2 * math.log(2) - 1)
    assert abs(float(made) - truth) <= float(made.bias_bound) + 1e-5 * n


# ---- effective dimension


def test_effective_dimension_of_a_matrix() -> None:
    values = torch.cat([torch.zeros(30, dtype=F64), torch.logspace(-3, 2, 30, dtype=F64)])
    a, dampings = with_spectrum(values), [1e-2, 1.0, 30.0]
    truth = torch.stack([(values / (values + c)).sum() for c in dampings])
    covered = torch.zeros(3, dtype=torch.int64)
    for seed in range(SEEDS):
        several = effective_dimension(a, dampings, vectors=12, steps=25, seed=seed)
        low, high = several.interval()
        covered += (low <= truth) & (truth <= high)
    # Where the truncation counts, intervals are wider than 95 %.
    assert int(covered.min()) >= binom.ppf(1e-4, SEEDS, 0.95)
    made = effective_dimension(a, 30.0, vectors=12, steps=25, seed=seed)
    assert several.value.shape == several.standard_error.shape == (3,)
    assert float(several.value[2]) == pytest.approx(float(made), rel=1e-12)
    assert several.products == made.products == 12 * 25
    low, high = several.interval()
    assert low.shape == (3,) and bool((several.value.diff() < 0).all())


def test_effective_dimension_of_a_problem() -> None:
    """The damping in the Hessian is taken off."""
    problem = net_problem("convnet", "gauss_newton", 0.02)
    values = torch.linalg.eigvalsh(problem.hessian.to_dense()) - 0.02
    bare = problem.with_damping(0.0)
    for c in (None, 0.02, 0.5):
        truth = float((values / (values + (c or 0.02))).sum())
        made = effective_dimension(problem, c, vectors=40, steps=20)
        low, high = made.interval(0.9999)
        assert low <= truth <= high and float(made.standard_error) < 0.3 * truth
        same = effective_dimension(bare.hessian, c or 0.02, vectors=40, steps=20)
        assert float(same) == pytest.approx(float(made), rel=1e-8)
    trace = torch.linalg.inv(problem.hessian.to_dense()).trace()
    default = effective_dimension(problem, vectors=40, steps=20)
    assert abs(problem.size - 0.02 * trace - float(default)) < 5 * float(default.standard_error)


def test_a_zero_operator() -> None:
    zero = torch.zeros(N, N, dtype=F64)
    made = effective_dimension(zero, [0.1, 2.0])
    assert made.value.tolist() == [0, 0] and torch.as_tensor(made.bias_bound).tolist() == [0, 0]
    for lower in (None, 0.0):
        assert float(spectral_sum(zero, torch.sqrt, lower=lower)) == 0
        one = spectral_sum(zero, lambda x: (x + 3).log(), lower=lower)
        assert float(one) == pytest.approx(N * math.log(3), rel=1e-12) and one.bias_bound == 0


def test_dampings_as_tensors_and_arrays() -> None:
    a = with_spectrum(POSITIVE)
    wanted = effective_dimension(a, [0.5, 2.0], vectors=3)
    doubles = np.array([0.5, 2.0])
    for dampings in (doubles, torch.tensor([0.5, 2.0]), torch.from_numpy(doubles), (0.5, 2.0)):
        assert torch.equal(effective_dimension(a, dampings, vectors=3).value, wanted.value)
    for damping in (0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5)):
        made = effective_dimension(a, damping, vectors=3)
        assert made.value.shape == () and made.value == wanted.value[0]
    for wrong in (torch.ones(2, 2), torch.tensor([1.0, -1.0]), np.array([math.nan]), np.zeros(0)):
        with pytest.raises(ValueError, match="damping is"):
            effective_dimension(a, wrong)


def test_bad_input() -> None:
    a = with_spectrum(POSITIVE)
    for options, match in (
        ({"vectors": 0}, "vectors is 0"),
        ({"steps": 1}, "steps is 1"),
        ({"lower": math.nan}, "lower is nan"),
        ({"lower": 5.0}, "5 is no bound of the spectrum"),
        ({"probes": "uniform"}, "probes='uniform'"),
        ({"columns": 0}, "columns is 0"),
    ):
        with pytest.raises(ValueError, match=match):
            spectral_sum(a, torch.log, **options)
    with pytest.raises(ValueError, match="not symmetric"):
        spectral_sum(a.triu(), torch.log)
    with pytest.raises(ValueError, match="entry by entry"):
        spectral_sum(a, torch.sum)
    with pytest.raises(TypeError, match="from_function"):
        spectral_sum(lambda v: v, torch.log)
    with pytest.raises(ValueError, match="not finite"):
        spectral_sum(a - 0.1 * torch.eye(N, dtype=F64), torch.log, lower=0.0)
    problem = net_problem("mlp", "gauss_newton", 0.0)
    for wrong in (None, 0.0, -1.0, [], [1.0, math.inf]):
        with pytest.raises(ValueError, match="damping is"):
            effective_dimension(problem, wrong)
    with pytest.raises(ValueError, match="damping is missing"):
        effective_dimension(a)
    with pytest.raises(ValueError, match="no bound of the spectrum"):
        effective_dimension(a - torch.eye(N, dtype=F64), 0.1)
    layers = lq.split(mlp(3, 4, 3))
    x, y = normal(6, 3), torch.arange(6) % 3
    damping = [0.1 * i for i in range(len(layers))]
    uneven = lq.LQRProblem.from_network(layers, x, y, loss="cross_entropy", damping=damping)
    with pytest.raises(ValueError, match="no multiple of the identity"):
        effective_dimension(uneven)
