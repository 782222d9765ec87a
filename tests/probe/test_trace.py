"""Trace estimators against dense traces: their mean, their variance, their standard errors."""

from __future__ import annotations

import math

import pytest
import torch
from llqr_mf.operators.from_function import from_function
from memory import LiveBytes
from networks import ZOO
from spectra import F64, KINDS, SIZE, matrix, spectrum
from torch import Tensor

import llqr_mf as lq
from llqr_mf.probe.draws import draw
from llqr_mf.probe.trace import METHODS, trace
from llqr_mf.probe.xnystrace import _estimates as nystrom_estimates
from llqr_mf.probe.xtrace import directions_left_out, exchangeable_error


def network(name: str, **options) -> lq.LQRProblem:
    model, inputs, targets, loss = ZOO[name]()
    return lq.LQRProblem.from_network(lq.split(model), inputs, targets, loss=loss, **options)


def runs(A, seeds: int, **options) -> tuple[Tensor, Tensor]:
    found = [trace(A, seed=seed, **options) for seed in range(seeds)]
    return torch.stack([e.value for e in found]), torch.stack([e.standard_error for e in found])


def assert_unbiased(values: Tensor, true: float) -> None:
    """The mean over seeds is within four of its standard errors."""
    error = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean()) - true) <= 4 * error + 1e-12 * abs(true)


@pytest.mark.parametrize("probes", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_unbiased_with_every_distribution(method: str, probes: str) -> None:
    A = matrix(spectrum("exponential"))
    values, _ = runs(A, 120, method=method, probes=probes, products=8)
    assert_unbiased(values, float(A.trace()))


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_unbiased_on_an_indefinite_operator(method: str) -> None:
    A = matrix(spectrum("indefinite"))
    values, _ = runs(A, 120, method=method, products=8)
    assert_unbiased(values, float(A.trace()))


# Coverage of the 95 % intervals over 200 seeds: the binomial deviation is 1.5 %, and three of them
# leave 90 %. Where a spectrum decays the samples are not normal: 88 %. The error estimate without
# the covariance covers 46 to 80 % on most of these.
@pytest.mark.parametrize("name", ["flat", "exponential", "step"])
@pytest.mark.parametrize("method", METHODS)
def test_intervals_hold_the_trace(method: str, name: str) -> None:
    A = matrix(spectrum(name))
    products = {"hutchinson": 24, "hutch++": 24, "xtrace": 16, "xnystrace": 10}[method]
    found = [trace(A, method=method, products=products, seed=seed) for seed in range(200)]
    true = float(A.trace())
    inside = [
        float(lower) <= true <= float(upper) for lower, upper in (e.interval() for e in found)
    ]
    assert sum(inside) >= (180 if name == "flat" else 176)
    errors = torch.stack([e.value - true for e in found]).square().mean().sqrt()
    claimed = torch.stack([e.standard_error for e in found]).square().mean().sqrt()
    # The root mean square of 200 errors is known to 1 / sqrt(400), and to twice that where the
    # tails are heavy; a negative covariance taken as zero can only add.
    assert 0.8 <= float(claimed / errors) <= 2


@pytest.mark.parametrize("name", ["flat", "step"])
@pytest.mark.parametrize("method", ["xtrace", "xnystrace"])
def test_the_variance_estimate_is_unbiased(method: str, name: str) -> None:
    # With the covariance as it comes (not below zero on these), E SE^2 is the variance.
    A, products = matrix(spectrum(name)), 10 if method == "xtrace" else 6
    values, errors = runs(A, 250, method=method, products=products, probes="rademacher")
    squares = (values - A.trace()).square()
    difference = errors.square() - squares
    bound = 4 * float(difference.std()) / 250**0.5
    assert abs(float(difference.mean())) <= bound
    assert bound < 0.9 * float(squares.mean())


@pytest.mark.parametrize("probes", KINDS)
def test_the_variance_of_hutchinson_in_closed_form(probes: str) -> None:
    A = matrix(spectrum("polynomial"))
    products, seeds, n = 40, 400, SIZE
    values, errors = runs(A, seeds, method="hutchinson", probes=probes, products=products)
    frobenius, true = float(A.square().sum()), float(A.trace())
    variance = {
        "rademacher": 2 * (frobenius - float(A.diagonal().square().sum())),
        "gaussian": 2 * frobenius,
        "spherical": 2 * n / (n + 2) * (frobenius - true**2 / n),
    }[probes] / products
    for squares in ((values - true).square(), errors.square()):
        known = float(squares.std()) / seeds**0.5
        assert abs(float(squares.mean()) - variance) <= 4 * known


def test_signs_on_a_diagonal_matrix_have_no_variance() -> None:
    A = torch.diag(spectrum("polynomial"))
    found = trace(A, method="hutchinson", products=10)
    assert float(found) == pytest.approx(float(A.trace()), rel=1e-14)
    assert float(found.standard_error) <= 1e-15
    assert float(trace(A, method="hutchinson", products=10, probes="gaussian").standard_error) > 0.1


@pytest.mark.parametrize("probes", KINDS)
@pytest.mark.parametrize("method", ["hutch++", "xtrace", "xnystrace"])
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_a_low_rank_is_exact(method: str, probes: str, rank: int) -> None:
    values = torch.zeros(SIZE, dtype=F64)
    values[:rank] = torch.arange(1, rank + 1, dtype=F64)
    A = matrix(values)
    # Each has more than rank + 1 vectors in every sketch.
    found = trace(A, method=method, probes=probes, products=21)
    # Rounding: the shift of XNysTrace is eps |Y|_F / sqrt(n), and counts n times.
    assert float(found) == pytest.approx(float(A.trace()), abs=1e-12)
    assert float(found.standard_error) <= 1e-12


def test_the_order_of_the_methods() -> None:
    A = matrix(spectrum("exponential"))
    error = {
        method: float((runs(A, 40, method=method, products=24)[0] - A.trace()).square().mean())
        for method in METHODS
    }
    assert error["xnystrace"] < error["xtrace"] < error["hutch++"] < error["hutchinson"]


@pytest.mark.parametrize("method", METHODS)
def test_as_many_products_as_rows_are_exact(method: str) -> None:
    A = matrix(spectrum("indefinite"))
    for products in (SIZE, 1000):
        found = trace(A, method=method, products=products)
        assert float(found) == pytest.approx(float(A.trace()), rel=1e-13)
        assert float(found.standard_error) == 0
        assert (found.products, found.method) == (SIZE, "exact")
    assert float(trace(A[:1, :1], method=method, products=1)) == float(A[0, 0])


@pytest.mark.parametrize("method", METHODS)
def test_one_product_less_than_rows(method: str) -> None:
    # The last number of products that is not exact: sketches of n - 2 vectors, of signs too.
    for n in (3, 5, 8):
        A = matrix(1 + torch.arange(n, dtype=F64))
        if n - 1 < METHODS[method].least:
            continue
        for probes in KINDS:
            values, errors = runs(A, 30, method=method, products=n - 1, probes=probes)
            assert bool(values.isfinite().all() and errors.isfinite().all())
            assert abs(float(values.median()) - float(A.trace())) <= 0.5 * float(A.trace())


@pytest.mark.parametrize("method", METHODS)
def test_products_are_counted(method: str) -> None:
    A, calls = matrix(spectrum("exponential")), []

    def product(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return rows @ A

    operator = from_function(product, SIZE, dtype=F64, rows=True)
    for products in (4, 11, 30, 31, 32):
        calls.clear()
        found = trace(operator, method=method, products=products, columns=3)
        assert found.products == sum(calls)
        assert products - (method == "xtrace") <= found.products <= products
        assert max(calls) <= 3


@pytest.mark.parametrize("method", METHODS)
def test_seeds_and_columns(method: str) -> None:
    A = matrix(spectrum("polynomial"))
    one, again = (trace(A, method=method, products=20, seed=5) for _ in range(2))
    assert float(one) == float(again)
    assert float(one.standard_error) == float(again.standard_error)
    assert float(one) != float(trace(A, method=method, products=20, seed=6))
    for columns in (1, 3, 100):
        other = trace(A, method=method, products=20, seed=5, columns=columns)
        # Rounding of the products; XNysTrace amplifies it by the condition of its core, 1e3 here.
        assert float(other) == pytest.approx(float(one), rel=1e-11)
        assert float(other.standard_error) == pytest.approx(float(one.standard_error), rel=1e-9)


@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize("products", [20, SIZE])
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_goes_on(method: str, products: int, stop: int, tmp_path) -> None:
    A, left = matrix(spectrum("polynomial")), [10**6]

    def product(rows: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return rows @ A

    operator = from_function(product, SIZE, dtype=F64, rows=True)
    options = {"method": method, "products": products, "columns": 4}
    whole = trace(operator, **options)
    left[0] = stop
    with pytest.raises(KeyboardInterrupt):
        trace(operator, **options, checkpoint=tmp_path / "t")
    # The first product is the operator's fingerprint: stop - 1 chunks of 4 are on file.
    left[0] = 10**6
    resumed = trace(operator, **options, checkpoint=tmp_path / "t")
    needed = -(-products // 4) + (method in ("hutch++", "xtrace")) - (stop - 1)
    assert 10**6 - left[0] <= needed + 2
    assert float(resumed) == float(whole)
    assert float(resumed.standard_error) == float(whole.standard_error)
    assert resumed.products == whole.products
    with pytest.raises(ValueError, match="another computation"):
        trace(operator, **{**options, "products": 24}, checkpoint=tmp_path / "t")


@pytest.mark.parametrize("name", ["mlp", "layer_and_rms_norm"])
@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
def test_hessians_of_networks(name: str, metric: str) -> None:
    problem = network(name, metric=metric, damping=1e-3)
    dense = problem.hessian.to_dense()
    true, products = float(dense.trace()), 24
    for method in METHODS:
        indefinite = float(torch.linalg.eigvalsh(dense)[0]) < 0
        if method == "xnystrace" and indefinite:
            continue
        found = [trace(problem, method=method, products=products, seed=s) for s in range(12)]
        values = torch.stack([e.value for e in found])
        # Twelve values have heavier tails than normal ones: Student's t at 4 sigma is 0.2 %.
        assert abs(float(values.mean()) - true) <= 4 * float(values.std()) / 12**0.5 + 1e-12
        far = [abs(float(e) - true) > 6 * float(e.standard_error) + 1e-12 for e in found]
        assert sum(far) <= 1


def test_nystrom_refuses_an_indefinite_operator() -> None:
    A = matrix(spectrum("indefinite"))
    with pytest.raises(ValueError, match=r"A is indefinite.*'xtrace'"):
        trace(A, method="xnystrace", products=20)
    with pytest.raises(ValueError, match="A is indefinite"):
        trace(-matrix(spectrum("flat")), method="xnystrace", products=2)
    # Indefinite by rounding alone, in either dtype. What is added to the core's diagonal,
    # 8 m eps max w'Aw with m = 40 and w'Aw up to 20, is 1e-12, and may come once per vector.
    low = matrix(torch.cat([torch.ones(5, dtype=F64), torch.zeros(SIZE - 5, dtype=F64)]))
    for dtype, tolerance in ((F64, 4e-11), (torch.float32, 1e-3)):
        for seed in range(10):
            A = low.to(dtype)
            found = trace((A + A.mT) / 2, method="xnystrace", products=40, seed=seed)
            assert float(found) == pytest.approx(5, abs=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_float32(method: str) -> None:
    A = matrix(spectrum("exponential"))
    wide = trace(A, method=method, products=20, probes="rademacher")
    narrow = trace(A.float(), method=method, products=20, probes="rademacher")
    assert narrow.value.dtype == narrow.standard_error.dtype == F64
    # The same signs: 6e-8 by the size of 60 sqrt(20) numbers, and the core's condition of 100.
    assert float(narrow) == pytest.approx(float(wide), rel=1e-4)
    assert float(narrow.standard_error) == pytest.approx(float(wide.standard_error), rel=1e-2)


def test_bfloat16_and_the_shift() -> None:
    A = torch.eye(SIZE, dtype=torch.bfloat16)
    for method in ("hutchinson", "xtrace", "xnystrace"):
        found = trace(A, method=method, products=20)
        # Exact but for what is rounded to 2^-9: the vectors and a basis, and so their norms. The
        # shift of XNysTrace, which is taken off again, is 3.5 % of the trace.
        assert float(found) == pytest.approx(SIZE, rel=4e-3)


def test_the_formulas_against_projections() -> None:
    """One leave-one-out estimate of each X, written out with n x n matrices."""
    A, m, n = matrix(spectrum("polynomial")), 7, SIZE
    omega = draw("spherical", n, range(m), 0, A[:0, 0])
    x, nystrom = [], []
    for i in range(m):
        others = omega[torch.arange(m) != i]
        q, _ = torch.linalg.qr(A @ others.mT)
        rest = torch.eye(n, dtype=F64) - q @ q.mT
        v = rest @ omega[i]
        v = v * (n - m + 1) ** 0.5 / v.norm()
        x.append((q.mT @ A @ q).trace() + v @ A @ v)
        Y = A @ others.mT
        low = Y @ torch.linalg.solve(others @ Y, Y.mT)
        q, _ = torch.linalg.qr(others.mT)
        v = omega[i] - q @ (q.mT @ omega[i])
        scale = (n - m + 1) / (v @ v)
        nystrom.append(low.trace() + scale * (omega[i] @ (A - low) @ omega[i]))
    assert float(trace(A, products=2 * m)) == pytest.approx(float(torch.stack(x).mean()), rel=1e-12)
    found = trace(A, method="xnystrace", products=m)
    assert float(found) == pytest.approx(float(torch.stack(nystrom).mean()), rel=1e-10)
    Y = A @ omega.mT
    estimates = nystrom_estimates(Y, omega @ Y, omega @ omega.mT, n, True)
    assert torch.allclose(estimates, torch.stack(nystrom), rtol=1e-10)


def test_directions_left_out_of_a_singular_triangle() -> None:
    R = torch.triu(torch.randn(5, 5, dtype=F64, generator=torch.Generator().manual_seed(0)))
    R[3:, 3:] = 0
    S = directions_left_out(R)
    assert torch.allclose(S.norm(dim=0), torch.ones(5, dtype=F64))
    dots = S.mT @ R
    assert float((dots - torch.diag(dots.diagonal())).abs().max()) <= 1e-14
    assert bool(directions_left_out(torch.zeros(3, 3, dtype=F64)).isfinite().all())


def test_the_covariance_of_a_u_statistic() -> None:
    # g_i = w_i sum over j != i of w_j has mean zero, and its mean the variance 2 m (m - 1) / m^2.
    m, squares = 6, []
    for seed in range(400):
        w = torch.randn(m, dtype=F64, generator=torch.Generator().manual_seed(seed))

        def leave(j: int, w: Tensor = w) -> Tensor:
            rest = w[torch.arange(m) != j]
            return rest * (rest.sum() - rest)

        squares.append(exchangeable_error(w * (w.sum() - w), leave).square())
    found = torch.stack(squares)
    true = 2 * m * (m - 1) / m**2
    assert abs(float(found.mean()) - true) <= 4 * float(found.std()) / 20


FLAT_VECTORS = {"hutchinson": 6.5, "hutch++": 10.5, "xtrace": 7.5, "xnystrace": 12.5}
"""Vectors of n numbers alive, at two columns and six products: see the test."""


@pytest.mark.parametrize("method", METHODS)
def test_memory_at_four_million(method: str) -> None:
    n = 4_000_000
    d = torch.linspace(1, 2, n)
    operator = from_function(lambda rows: rows * d, n, rows=True)
    peaks = []
    for products in (4, 6) if method == "hutchinson" else (6,):
        with LiveBytes() as memory:
            trace(operator, method=method, products=products, columns=2)
        peaks.append(memory.peak / (4 * n))
    # Hutchinson: a block of two vectors, what the function makes of it, and the copy of that. The
    # others: two, three and six vectors, and as many that QR makes.
    assert max(peaks) <= FLAT_VECTORS[method]
    assert math.isclose(peaks[0], peaks[-1], rel_tol=0.01)


@pytest.mark.parametrize("products", [8, 16])
def test_xtrace_holds_one_vector_per_product(products: int) -> None:
    n = 4_000_000
    d = torch.linspace(1, 2, n)
    operator = from_function(lambda rows: rows * d, n, rows=True)
    with LiveBytes() as memory:
        trace(operator, method="xtrace", products=products, columns=2)
    # The m = products / 2 vectors and Q; small matrices besides.
    assert products <= memory.peak / (4 * n) <= products + 0.1


def test_bad_input() -> None:
    A = matrix(spectrum("flat"))
    with pytest.raises(ValueError, match="method='hutch'"):
        trace(A, method="hutch")
    with pytest.raises(ValueError, match="probes='normal'"):
        trace(A, probes="normal")
    with pytest.raises(ValueError, match="only square"):
        trace(A[:3])
    with pytest.raises(TypeError, match="from_function"):
        trace(lambda v: v)
    for method, least in (("hutchinson", 2), ("hutch++", 4), ("xtrace", 4), ("xnystrace", 2)):
        with pytest.raises(ValueError, match=f"products={least - 1} .*at least {least}"):
            trace(A, method=method, products=least - 1)
        assert math.isfinite(float(trace(A, method=method, products=least).standard_error))


def test_curvlinops_agrees() -> None:
    pytest.importorskip("curvlinops")
    from curvlinops import hutchinson_trace, hutchpp_trace, xtrace

    A = matrix(spectrum("exponential"))
    for method, theirs in (
        ("hutchinson", hutchinson_trace),
        ("hutch++", hutchpp_trace),
        ("xtrace", xtrace),
    ):
        ours, _ = runs(A, 60, method=method, products=24, probes="rademacher")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            other = torch.stack([theirs(A, 24) for _ in range(60)])
        error = float(((ours.var() + other.var()) / 60).sqrt())
        assert abs(float(ours.mean() - other.mean())) <= 4 * error
        # The ratio of two deviations of 60, tails as of these estimates.
        assert 0.5 <= float(ours.std() / other.std()) <= 2
