"""The Frobenius norm from products."""

from __future__ import annotations

import pytest
import torch
from llqr_mf.operators.from_function import from_function
from memory import LiveBytes
from networks import ZOO
from spectra import F64, KINDS, SIZE, matrix
from torch import Tensor

import llqr_mf as lq
from llqr_mf.probe.frobenius import frobenius_norm


def powers(ratio: float) -> Tensor:
    return matrix(ratio ** torch.arange(SIZE, dtype=F64))


@pytest.mark.parametrize("probes", KINDS)
@pytest.mark.parametrize("ratio", [-0.98, 0.8])
def test_the_square_is_unbiased_and_the_bias_of_the_root_is_known(ratio, probes) -> None:
    A, products = powers(ratio), 40
    found = [frobenius_norm(A, products=products, probes=probes, seed=s) for s in range(400)]
    values = torch.stack([e.value for e in found])
    true = float(A.norm())
    squares = values.square()
    assert abs(float(squares.mean()) - true**2) <= 4 * float(squares.std()) / 20
    # The bias of second order; what is left is of order 1 / products of it.
    bias = -float(squares.var()) / (8 * true**3)
    known = 4 * float(values.std()) / 20
    assert abs(float(values.mean()) - true - bias) <= known + 0.2 * abs(bias)
    claimed = torch.stack([torch.as_tensor(e.bias_bound) for e in found])
    assert float(claimed.mean()) == pytest.approx(-bias, rel=0.2)
    # The delta method's standard error, of 400 runs.
    error = torch.stack([e.standard_error for e in found]).square().mean().sqrt()
    assert float(error / values.std()) == pytest.approx(1, abs=0.2)
    inside = [float(low) <= true <= float(high) for low, high in (e.interval() for e in found)]
    # 95 % +- 4 binomial deviations of 1.1 %, and the skew of a square's mean.
    assert sum(inside) >= 0.9 * 400


def test_the_variance_in_closed_form() -> None:
    A, products = powers(0.9), 30
    values = torch.stack([frobenius_norm(A, products=products, seed=s).value for s in range(400)])
    B = A @ A
    variance = 2 * float(B.square().sum() - B.diagonal().square().sum()) / products
    squares = (values.square() - A.square().sum()).square()
    assert abs(float(squares.mean()) - variance) <= 4 * float(squares.std()) / 20


def test_exact_where_it_should_be() -> None:
    A = powers(-0.9)
    found = frobenius_norm(A, products=SIZE, columns=7)
    assert float(found) == pytest.approx(float(A.norm()), rel=1e-13)
    assert float(found.standard_error) == 0 and found.method == "exact"
    found = frobenius_norm(torch.diag(A.diagonal()), products=5)
    assert float(found) == pytest.approx(float(A.diagonal().norm()), rel=1e-13)
    assert float(found.standard_error) <= 1e-15
    found = frobenius_norm(0 * A, products=5)
    assert (float(found), float(found.standard_error), float(found.bias_bound)) == (0, 0, 0)


@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
def test_hessians_of_networks(metric: str) -> None:
    model, inputs, targets, loss = ZOO["mlp"]()
    problem = lq.LQRProblem.from_network(
        lq.split(model), inputs, targets, loss=loss, metric=metric, damping=1e-3
    )
    true = float(problem.hessian.to_dense().norm())
    found = [frobenius_norm(problem, products=30, seed=s) for s in range(20)]
    far = [abs(float(e) - true) > 4 * float(e.standard_error) for e in found]
    assert sum(far) <= 1
    assert all(e.products == 30 for e in found)


def test_seeds_columns_and_resuming(tmp_path) -> None:
    A, left = powers(0.9), [10**6]

    def product(rows: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return rows @ A

    operator = from_function(product, SIZE, dtype=F64, rows=True)
    options = {"products": 20, "columns": 4}
    whole = frobenius_norm(operator, **options)
    assert float(whole) != float(frobenius_norm(operator, **options, seed=1))
    for columns in (1, 3, None):
        other = frobenius_norm(operator, products=20, columns=columns)
        assert float(other) == pytest.approx(float(whole), rel=1e-13)
    left[0] = 3
    with pytest.raises(KeyboardInterrupt):
        frobenius_norm(operator, **options, checkpoint=tmp_path / "f")
    left[0] = 10**6
    resumed = frobenius_norm(operator, **options, checkpoint=tmp_path / "f")
    assert 10**6 - left[0] == 1 + 5 - 2
    assert float(resumed) == float(whole)
    assert (resumed.products, float(resumed.standard_error)) == (20, float(whole.standard_error))


def test_float32() -> None:
    A = powers(0.8)
    wide, narrow = frobenius_norm(A, products=20), frobenius_norm(A.float(), products=20)
    assert narrow.value.dtype == F64
    assert float(narrow) == pytest.approx(float(wide), rel=1e-5)


def test_memory_at_four_million() -> None:
    n = 4_000_000
    d = torch.linspace(1, 2, n)
    operator = from_function(lambda rows: rows * d, n, rows=True)
    for products in (4, 8):
        with LiveBytes() as memory:
            found = frobenius_norm(operator, products=products, columns=2)
        # Two vectors, what the function makes of them, and the copy of that.
        assert memory.peak <= 6.5 * 4 * n
    assert float(found) == pytest.approx(float(d.double().norm()), rel=1e-6)


def test_bad_input() -> None:
    A = powers(0.9)
    with pytest.raises(ValueError, match="products=1 is too few for frobenius_norm"):
        frobenius_norm(A, products=1)
    with pytest.raises(ValueError, match="probes='normal'"):
        frobenius_norm(A, probes="normal")
    with pytest.raises(TypeError, match="from_function"):
        frobenius_norm(None)


def test_curvlinops_agrees() -> None:
    pytest.importorskip("curvlinops")
    from curvlinops import hutchinson_squared_fro

    A = powers(0.8)
    ours = torch.stack([frobenius_norm(A, products=20, seed=s).value.square() for s in range(100)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other = torch.stack([hutchinson_squared_fro(A, 20) for _ in range(100)])
    error = float(((ours.var() + other.var()) / 100).sqrt())
    assert abs(float(ours.mean() - other.mean())) <= 4 * error
