"""Diagonal estimators against dense diagonals."""

from __future__ import annotations

import pytest
import torch
from llqr_mf.operators.from_function import from_function
from memory import LiveBytes
from networks import ZOO
from spectra import F64, KINDS, SIZE, matrix, spectrum
from torch import Tensor

import llqr_mf as lq
from llqr_mf.probe.diagonal import diagonal
from llqr_mf.probe.draws import draw
from llqr_mf.probe.trace import trace

METHODS = ("hutchinson", "xdiag")


def runs(A, seeds: int, **options) -> tuple[Tensor, Tensor]:
    found = [diagonal(A, seed=seed, **options) for seed in range(seeds)]
    return torch.stack([e.value for e in found]), torch.stack([e.standard_error for e in found])


def assert_unbiased(values: Tensor, true: Tensor) -> None:
    """All means are within five of their standard errors, and their mean square is about one."""
    scaled = (values.mean(0) - true) / (values.std(0) / len(values) ** 0.5)
    # Of 60 normal numbers, one beyond 5 has probability 3e-5; the mean square is 1 +- 0.2 were
    # they independent, and they are correlated.
    assert float(scaled.abs().max()) <= 5
    assert float(scaled.square().mean()) <= 2.5


@pytest.mark.parametrize("probes", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["exponential", "indefinite"])
def test_every_method_is_unbiased_with_every_distribution(name, method, probes) -> None:
    A = matrix(spectrum(name))
    values, _ = runs(A, 150, method=method, probes=probes, products=12)
    assert_unbiased(values, A.diagonal())


@pytest.mark.parametrize("name", ["flat", "exponential", "polynomial"])
@pytest.mark.parametrize(
    ("method", "probes"),
    [("hutchinson", "rademacher"), ("hutchinson", "gaussian"), ("xdiag", "rademacher")],
)
def test_intervals_hold_the_entries(method: str, probes: str, name: str) -> None:
    A = matrix(spectrum(name))
    found = [diagonal(A, method=method, probes=probes, products=20, seed=s) for s in range(200)]
    inside = []
    for each in found:
        lower, upper = each.interval()
        inside.append(((lower <= A.diagonal()) & (A.diagonal() <= upper)).double().mean())
    share = torch.stack(inside)
    # Entries of one run are correlated: the runs' shares tell how well their mean is known.
    known = 4 * float(share.std()) / 200**0.5
    assert float(share.mean()) >= 0.93 - known
    assert float(share.mean()) <= 0.99 + known
    values = torch.stack([e.value for e in found])
    claimed = torch.stack([e.standard_error for e in found]).square().mean().sqrt()
    true = (values - A.diagonal()).square().mean().sqrt()
    # Of 200 correlated runs; a negative covariance taken as zero adds to XDiag's.
    assert 0.9 <= float(claimed / true) <= (1.1 if method == "hutchinson" else 1.6)


def test_students_t_is_exact_for_normals() -> None:
    # At m = 3 products Student's quantile is 4.3 and the normal one 1.96, which would cover 81 %.
    A = matrix(spectrum("flat"))
    inside = []
    for seed in range(300):
        lower, upper = diagonal(
            A, method="hutchinson", probes="gaussian", products=3, seed=seed
        ).interval()
        inside.append(((lower <= A.diagonal()) & (A.diagonal() <= upper)).double().mean())
    share = torch.stack(inside)
    assert abs(float(share.mean()) - 0.95) <= 4 * float(share.std()) / 300**0.5


def test_the_variance_of_hutchinson_in_closed_form() -> None:
    A, products, seeds = matrix(spectrum("polynomial")), 20, 300
    values, errors = runs(A, seeds, method="hutchinson", products=products)
    variance = (A.square().sum(1) - A.diagonal().square()) / products
    for squares in ((values - A.diagonal()).square(), errors.square()):
        known = squares.std(0) / seeds**0.5
        assert float(((squares.mean(0) - variance) / known).abs().max()) <= 5
    # Normals leave 1 / chi^2 with mean 1 / (m - 2) in place of 1 / m.
    values, errors = runs(A, seeds, method="hutchinson", products=products, probes="gaussian")
    for squares in ((values - A.diagonal()).square(), errors.square()):
        known = squares.std(0) / seeds**0.5
        more = variance * products / (products - 2)
        assert float(((squares.mean(0) - more) / known).abs().max()) <= 5


@pytest.mark.parametrize("probes", KINDS)
def test_a_diagonal_matrix_has_no_variance(probes: str) -> None:
    A = torch.diag(spectrum("indefinite"))
    found = diagonal(A, method="hutchinson", products=7, probes=probes)
    assert torch.allclose(found.value, A.diagonal(), rtol=1e-14)
    assert float(found.standard_error.max()) <= 1e-15


def test_the_ratio_is_that_of_bekas() -> None:
    A, m = matrix(spectrum("polynomial")), 9
    z = draw("gaussian", SIZE, range(m), 4, A[:0, 0])
    found = diagonal(A, method="hutchinson", products=m, seed=4, probes="gaussian")
    ratio = (z * (z @ A)).sum(0) / (z * z).sum(0)
    assert torch.allclose(found.value, ratio, rtol=1e-11)
    rest = (z @ A - ratio * z).square().sum(0) / (m - 1) / (z * z).sum(0)
    assert torch.allclose(found.standard_error, rest.sqrt(), rtol=1e-9)


@pytest.mark.parametrize("probes", KINDS)
def test_xdiag_against_projections(probes: str) -> None:
    """The leave-one-out estimates and their pairs, written out with n x n matrices."""
    A, m = matrix(spectrum("polynomial")), 6
    omega = draw(probes, SIZE, range(m), 0, A[:0, 0])

    def term(i: int, left_out: set[int]) -> Tensor:
        q, _ = torch.linalg.qr(A @ omega[[k for k in range(m) if k not in left_out]].mT)
        v = A @ omega[i]
        return (q @ q.mT @ A).diagonal() + omega[i] * (v - q @ (q.mT @ v))

    g = torch.stack([term(i, {i}) for i in range(m)])
    products = [
        (g[i] - term(i, {i, j})) * (g[j] - term(j, {i, j}))
        for i in range(m)
        for j in range(m)
        if i != j
    ]
    variance = g.var(0) / m + torch.stack(products).mean(0).clamp(min=0)
    for count in (2 * m, 2 * m + 1):
        found = diagonal(A, products=count, probes=probes)
        assert found.products == 2 * m
        assert torch.allclose(found.value, g.mean(0), rtol=1e-11, atol=1e-13)
        assert torch.allclose(found.standard_error, variance.sqrt(), rtol=1e-8)


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_a_low_rank_is_exact(rank: int) -> None:
    values = torch.zeros(SIZE, dtype=F64)
    values[:rank] = torch.arange(1, rank + 1, dtype=F64)
    A = matrix(values)
    found = diagonal(A, products=14)
    assert torch.allclose(found.value, A.diagonal(), atol=1e-13)
    assert float(found.standard_error.max()) <= 1e-13


def test_xdiag_is_better_where_the_spectrum_decays() -> None:
    A = matrix(spectrum("exponential"))
    error = [
        float((runs(A, 20, method=method, products=30)[0] - A.diagonal()).square().mean())
        for method in METHODS
    ]
    assert error[1] < error[0] / 10


@pytest.mark.parametrize("method", METHODS)
def test_as_many_products_as_rows_are_exact(method: str) -> None:
    A = matrix(spectrum("indefinite"))
    found = diagonal(A, method=method, products=SIZE + 3, columns=7)
    assert torch.allclose(found.value, A.diagonal(), rtol=1e-14)
    assert not found.standard_error.any()
    assert (found.products, found.method) == (SIZE, "exact")


@pytest.mark.parametrize("method", METHODS)
def test_the_sum_of_the_entries_is_a_trace(method: str) -> None:
    A = matrix(spectrum("polynomial"))
    total = diagonal(A, method=method, products=20).value.sum()
    if method == "hutchinson":
        other = trace(A, method=method, products=20)
        assert float(total) == pytest.approx(float(other), rel=1e-12)
    assert abs(float(total - A.trace())) <= 0.2 * float(A.trace())


@pytest.mark.parametrize("method", METHODS)
def test_seeds_columns_and_counts(method: str) -> None:
    A, calls = matrix(spectrum("polynomial")), []

    def product(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return rows @ A

    operator = from_function(product, SIZE, dtype=F64, rows=True)
    one = diagonal(operator, method=method, products=20, seed=5)
    assert one.products == sum(calls) == 20
    assert not torch.equal(one.value, diagonal(operator, method=method, products=20).value)
    for columns in (1, 3, 100):
        calls.clear()
        other = diagonal(operator, method=method, products=20, seed=5, columns=columns)
        assert max(calls) <= columns
        assert torch.allclose(other.value, one.value, rtol=1e-11, atol=1e-14)
        assert torch.allclose(other.standard_error, one.standard_error, rtol=1e-9)


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_goes_on(method: str, stop: int, tmp_path) -> None:
    A, left = matrix(spectrum("polynomial")), [10**6]

    def product(rows: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return rows @ A

    operator = from_function(product, SIZE, dtype=F64, rows=True)
    options = {"method": method, "products": 20, "columns": 4}
    whole = diagonal(operator, **options)
    left[0] = stop
    with pytest.raises(KeyboardInterrupt):
        diagonal(operator, **options, checkpoint=tmp_path / "d")
    left[0] = 10**6
    resumed = diagonal(operator, **options, checkpoint=tmp_path / "d")
    # A fingerprint, and the chunks of five or six that were not done.
    assert 10**6 - left[0] == 1 + (5 if method == "hutchinson" else 6) - (stop - 1)
    assert torch.equal(resumed.value, whole.value)
    assert torch.equal(resumed.standard_error, whole.standard_error)
    assert resumed.products == whole.products == 20


@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
@pytest.mark.parametrize("name", ["mlp", "layer_and_rms_norm"])
def test_hessians_of_networks(name: str, metric: str) -> None:
    model, inputs, targets, loss = ZOO[name]()
    problem = lq.LQRProblem.from_network(
        lq.split(model), inputs, targets, loss=loss, metric=metric, damping=1e-3
    )
    true = problem.hessian.to_dense().diagonal()
    for method in METHODS:
        values, errors = runs(problem, 12, method=method, products=24)
        # Entries beyond six claimed errors, of twelve runs: rounding apart, next to none.
        far = (values - true).abs() > 6 * errors + 1e-12
        assert float(far.double().mean()) <= 0.01


@pytest.mark.parametrize("method", METHODS)
def test_float32(method: str) -> None:
    A = matrix(spectrum("exponential"))
    wide = diagonal(A, method=method, products=20)
    narrow = diagonal(A.float(), method=method, products=20)
    assert narrow.value.dtype == narrow.standard_error.dtype == F64
    # The same signs: 6e-8 by the size of 60 sqrt(20) numbers.
    assert torch.allclose(narrow.value, wide.value, atol=2e-5)
    assert torch.allclose(narrow.standard_error, wide.standard_error, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_memory_at_four_million(method: str) -> None:
    n = 4_000_000
    d = torch.linspace(1, 2, n)
    operator = from_function(lambda rows: rows * d, n, rows=True)
    peaks = []
    for products in (4, 8) if method == "hutchinson" else (4,):
        with LiveBytes() as memory:
            found = diagonal(operator, method=method, products=products, columns=2)
        peaks.append(memory.peak / (4 * n))
    # Hutchinson: three sums in float64 are six float32 vectors, two vectors and their product four,
    # the result two. XDiag: six vectors, result four, and copies.
    assert max(peaks) <= (13 if method == "hutchinson" else 14)
    assert peaks[-1] == pytest.approx(peaks[0], rel=0.01)
    if method == "hutchinson":
        assert float((found.value - d).abs().max()) <= 1e-6
    print(f"{method}: {peaks} vectors")


@pytest.mark.parametrize("products", [6, 12])
def test_xdiag_holds_one_and_a_half_vectors_per_product(products: int) -> None:
    n = 4_000_000
    d = torch.linspace(1, 2, n)
    operator = from_function(lambda rows: rows * d, n, rows=True)
    with LiveBytes() as memory:
        diagonal(operator, method="xdiag", products=products, columns=2)
    # 3 m float32 vectors, m = products / 2, and two float64 results. Vectors are of 16 megabytes,
    # and of pieces of one for every thread there are a few.
    assert memory.peak / (4 * n) <= 1.5 * products + 4 + 1 + torch.get_num_threads() / 4


def test_bad_input() -> None:
    A = matrix(spectrum("flat"))
    with pytest.raises(ValueError, match="method='hutch'"):
        diagonal(A, method="hutch")
    with pytest.raises(ValueError, match="probes='normal'"):
        diagonal(A, probes="normal")
    with pytest.raises(ValueError, match="not symmetric"):
        diagonal(torch.triu(A))
    for method, least in (("hutchinson", 2), ("xdiag", 4)):
        with pytest.raises(ValueError, match=f"products={least - 1} .*at least {least}"):
            diagonal(A, method=method, products=least - 1)
        found = diagonal(A, method=method, products=least)
        assert bool(found.standard_error.isfinite().all())


def test_curvlinops_agrees() -> None:
    pytest.importorskip("curvlinops")
    from curvlinops import hutchinson_diag, xdiag

    A = matrix(spectrum("exponential"))
    for method, theirs in (("hutchinson", hutchinson_diag), ("xdiag", xdiag)):
        ours, _ = runs(A, 60, method=method, products=20)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            other = torch.stack([theirs(A, 20) for _ in range(60)])
        error = ((ours.var(0) + other.var(0)) / 60).sqrt()
        assert float(((ours.mean(0) - other.mean(0)) / error).abs().max()) <= 5
        assert 0.7 <= float(ours.std(0).norm() / other.std(0).norm()) <= 1.4
