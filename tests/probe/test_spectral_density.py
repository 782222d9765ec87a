"""Smoothed spectra and their bands against dense spectra."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from llqr_mf.operators.from_function import from_function
from networks import ZOO
from scipy.stats import binom
from small_models import normal
from torch import Tensor

import llqr_mf as lq
from llqr_mf.probe.spectral_density import SpectralDensity, spectral_density

F64 = torch.float64
N = 120


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    a = (q * values) @ q.mT
    return (a + a.mT) / 2


def smoothed(values: Tensor, grid: Tensor, width: float) -> Tensor:
    """The exact density with a Gaussian of this width."""
    z = (grid.unsqueeze(1) - values) / width
    return torch.exp(-z.square() / 2).sum(1) / (width * math.sqrt(2 * math.pi))


def stepped(values: Tensor, grid: Tensor, width: float) -> Tensor:
    return torch.special.ndtr((grid.unsqueeze(1) - values) / width).sum(1)


# Semicircle-like, and two outliers.
BULK = torch.cat([torch.sin(torch.linspace(-1.5, 1.5, N - 2, dtype=F64)), torch.tensor([3.0, 4.0])])
BULK = BULK.to(F64)


def integral(y: Tensor, x: Tensor) -> float:
    return float(torch.trapezoid(y, x))


def test_bands_hold_pointwise_and_means_are_unbiased() -> None:
    """At points under which there are many eigenvalues, for several kernels."""
    a, seeds = with_spectrum(BULK), 120
    grid = torch.linspace(-1.2, 1.2, 9, dtype=F64)
    widths = (None, 0.25)
    inside = torch.zeros(2 * len(widths), 9)
    means = [torch.zeros(0, 9, dtype=F64) for _ in widths]
    for seed in range(seeds):
        made = spectral_density(a, vectors=12, steps=30, seed=seed)
        for i, width in enumerate(widths):
            used = made.width() if width is None else width
            band = made.density(grid, width=width)
            truth = smoothed(BULK, grid, used)
            inside[2 * i] += (band.lower <= truth) & (truth <= band.upper)
            means[i] = torch.cat([means[i], (band.mean - truth).unsqueeze(0)])
            band = made.cumulative(grid, width=width)
            truth = stepped(BULK, grid, used)
            inside[2 * i + 1] += (band.lower <= truth) & (truth <= band.upper)
    # 36 counts of 120: within the 1e-5 points of the binomial, in which the truncation (a
    # percent of a kernel) and the skewness cost next to nothing.
    assert float(inside.min()) >= binom.ppf(1e-5, seeds, 0.95)
    assert float(inside.mean()) <= seeds * 0.975, "the bands are not needlessly wide"
    for sample in means:
        error = sample.std(0) / seeds**0.5
        # 4.5 standard errors in 18 numbers, and the kernel's truncation.
        assert bool((sample.mean(0).abs() <= 4.5 * error + 0.01 * N).all())


@pytest.mark.parametrize("probes", ["rademacher", "gaussian", "spherical"])
def test_mass(probes: str) -> None:
    a = with_spectrum(BULK)
    made = spectral_density(a, vectors=4, steps=20, probes=probes, seed=1)
    torch.testing.assert_close(made.weights.sum(1), torch.full((4,), float(N), dtype=F64))
    for width in (None, 0.01, 1.0):
        band = made.density(width=width)
        if width != 0.01:
            assert integral(band.mean, band.grid) == pytest.approx(N, rel=2e-4)
        total = made.cumulative(width=width).mean
        assert float(total[-1]) == pytest.approx(N, rel=1e-4) and bool((total.diff() >= 0).all())
    one = made.density(normalize=True)
    assert integral(one.mean, one.grid) == pytest.approx(1, rel=2e-4)
    assert float(made.cumulative(normalize=True).mean[-1]) == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(one.mean * N, made.density().mean)
    torch.testing.assert_close(one.upper * N, made.density().upper)


def test_the_cumulative_is_the_integral_of_the_density() -> None:
    made = spectral_density(with_spectrum(BULK), vectors=3, steps=20)
    grid = made.grid(4000)
    density, total = made.density(grid), made.cumulative(grid)
    running = torch.cumulative_trapezoid(density.mean, grid)
    torch.testing.assert_close(running, total.mean[1:] - total.mean[0], rtol=0, atol=1e-3 * N)


def test_all_steps_and_an_average_over_the_basis_give_the_spectrum() -> None:
    """Steps at width 0 count the eigenvalues exactly, weight and all."""
    values = torch.tensor([-2.0, -1.0, 0.5, 3.0, 7.0], dtype=F64)
    made = spectral_density(with_spectrum(values), vectors=4000, steps=5, columns=None)
    total = made.cumulative(torch.tensor([-3.0, -1.5, 0.0, 1.0, 5.0, 9.0]), width=0, level=0.9999)
    wanted = torch.arange(6, dtype=F64)
    assert bool((total.lower <= wanted + 1e-9).all() and (wanted - 1e-9 <= total.upper).all())
    assert float((total.upper - total.lower).max()) < 0.5
    torch.testing.assert_close(made.nodes, values.expand(4000, 5), rtol=0, atol=1e-9)


def test_moments() -> None:
    a = with_spectrum(BULK)
    made = spectral_density(a, vectors=5, steps=3, seed=2)
    z = torch.stack([_probe(seed=2, index=i) for i in range(5)])
    moments = made.moments(5)
    assert moments.value.shape == (5,)
    v = z
    for k in range(5):
        v = v @ a
        samples = (z * v).sum(1)
        assert float(moments.value[k]) == pytest.approx(float(samples.mean()), rel=1e-10)
        error = float(samples.std()) / 5**0.5
        assert float(moments.standard_error[k]) == pytest.approx(error, rel=1e-8)
    with pytest.raises(ValueError, match="give 1 to 2 steps - 1 = 5"):
        made.moments(6)
    with pytest.raises(ValueError, match="order is 0"):
        made.moments(0)


def _probe(seed: int, index: int) -> Tensor:
    from llqr_mf.probe.draws import draw

    return draw("rademacher", N, range(index, index + 1), seed, torch.empty(0, dtype=F64))[0]


def test_log_scale() -> None:
    """Eigenvalues per decade, those of each sign for themselves."""
    values = torch.cat(
        [torch.logspace(-4, 1, 60, dtype=F64), -torch.logspace(-3, -1, 40, dtype=F64)]
    )
    made = spectral_density(with_spectrum(values), vectors=60, steps=100)
    for sign, count in ((1, 60), (-1, 40)):
        own = values[values.sign() == sign].abs().log10()
        for width in (None, 0.4):
            band = made.density(log=True, sign=sign, width=width, level=0.9999)
            truth = smoothed(own, band.grid, width or 0.1)
            assert float(((band.lower <= truth) & (truth <= band.upper)).double().mean()) > 0.97
            share = integral(band.mean, band.grid)
            assert share == pytest.approx(count, rel=0.1)
            assert band.grid[0] < own.min() and own.max() < band.grid[-1]
    with pytest.raises(ValueError, match="no negative node"):
        spectral_density(with_spectrum(values.abs()), steps=5).density(log=True, sign=-1)


@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_hessians_of_networks(name: str, metric: str) -> None:
    model, inputs, targets, loss = ZOO[name]()
    problem = lq.LQRProblem.from_network(
        lq.split(model), inputs, targets, loss=loss, metric=metric, damping=1e-3
    )
    values = torch.linalg.eigvalsh(problem.hessian.to_dense())
    made = spectral_density(problem, vectors=40, steps=40)
    assert made.size == problem.size and made.products <= 1600
    # A kernel over which the rule is exact, so only the vectors are left.
    width = 0.1 * float(values.max() - values.min())
    grid = made.grid(40, width=width)
    truth = smoothed(values, grid, width)
    band = made.density(grid, width=width, level=0.99999)
    peak = float(truth.max())
    # Where a single eigenvalue lies the samples are chi-square: wide intervals, and their skew.
    assert bool((band.lower <= truth + 2e-3 * peak).all())
    assert bool((truth <= band.upper + 2e-3 * peak).all())
    assert float((made.nodes.min() - values.min()).abs()) < 1e-8
    assert float((made.nodes.max() - values.max()).abs()) < 1e-8


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_float32_and_no_basis(reorthogonalize: bool) -> None:
    """Copies share the weight of their eigenvalue, so the curves are the same."""
    a = with_spectrum(BULK)
    grid = torch.linspace(-2, 5, 50, dtype=F64)
    exact = spectral_density(a, vectors=5, steps=60, seed=1).density(grid, width=0.3)
    made = spectral_density(
        a.float(), vectors=5, steps=60, seed=1, reorthogonalize=reorthogonalize
    ).density(grid, width=0.3)
    torch.testing.assert_close(made.mean, exact.mean, rtol=0, atol=1e-4 * N)


def test_one_eigenvalue() -> None:
    made = spectral_density(3 * torch.eye(6, dtype=F64), vectors=2, steps=4)
    band = made.density()
    assert integral(band.mean, band.grid) == pytest.approx(6, rel=1e-3)
    assert float(band.grid[band.mean.argmax()]) == pytest.approx(3, rel=1e-3)
    zero = spectral_density(torch.zeros(6, 6, dtype=F64), vectors=2, steps=4)
    assert float(zero.cumulative(torch.tensor([-1.0, 1.0]), width=0).mean[1]) == pytest.approx(6)


def test_one_vector_has_no_band() -> None:
    band = spectral_density(with_spectrum(BULK), vectors=1, steps=4).density()
    assert bool(band.mean.isfinite().all() and band.lower.isnan().all())


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    a, calls = with_spectrum(BULK), []

    def times(v: Tensor) -> Tensor:
        calls.append(len(v))
        return v @ a

    operator = from_function(times, N, dtype=F64, rows=True)
    one, two = (spectral_density(operator, vectors=4, steps=8, seed=3) for _ in range(2))
    assert torch.equal(one.nodes, two.nodes) and torch.equal(one.weights, two.weights)
    assert one.products == 32 == sum(calls) // 2
    for columns in (1, 3):
        made = spectral_density(a, vectors=4, steps=8, seed=3, columns=columns)
        torch.testing.assert_close(made.nodes, one.nodes, rtol=1e-9, atol=1e-9)
    path = tmp_path / "density.pt"
    kept = spectral_density(operator, vectors=4, steps=8, seed=3, columns=2, checkpoint=path)
    calls.clear()
    again = spectral_density(operator, vectors=6, steps=8, seed=3, columns=2, checkpoint=path)
    assert sum(calls) == 1 + 2 * 8, "a fingerprint and the new vectors"
    assert torch.equal(again.nodes[:4], kept.nodes) and again.products == 48


def test_to_dict() -> None:
    made = spectral_density(with_spectrum(BULK), vectors=3, steps=5)
    again = SpectralDensity.from_dict(json.loads(json.dumps(made.to_dict())))
    assert torch.equal(again.nodes, made.nodes) and torch.equal(again.weights, made.weights)
    assert (again.size, again.products, again.seed) == (N, 15, 0)


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = spectral_density(with_spectrum(BULK), vectors=3, steps=20)
    ax = made.plot()
    assert ax.get_xlabel() == "eigenvalue" and ax.get_ylabel() == "eigenvalues per unit"
    assert ax.get_yscale() == "log" and len(ax.lines) == 1 and len(ax.collections) == 1
    both = made.plot(log=True, normalize=True)
    assert [text.get_text() for text in both.get_legend().get_texts()] == [
        "positive eigenvalues",
        "negative eigenvalues",
    ]
    assert both.get_ylabel() == "share of eigenvalues per decade"
    _, given = plt.subplots()
    assert made.plot(given, log=True, width=0.3) is given
    given.figure.canvas.draw()
    plt.close("all")


def test_bad_input() -> None:
    a = with_spectrum(BULK)
    for options, match in (
        ({"vectors": 0}, "vectors is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"probes": "no"}, "probes='no'"),
    ):
        with pytest.raises(ValueError, match=match):
            spectral_density(a, **options)
    made = spectral_density(a, vectors=2, steps=4)
    for width in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="width is"):
            made.density(width=width)
    with pytest.raises(ValueError, match="width is -1"):
        made.cumulative(torch.zeros(3), width=-1.0)
    with pytest.raises(ValueError, match="grid has shape"):
        made.density(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="level is 95"):
        made.density(level=95)
