"""Eigenvalues and condition numbers of problems and operators against dense ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from llqr_mf.operators.from_function import from_function
from networks import ZOO
from torch import Tensor

import llqr_mf as lq
from llqr_mf.probe.condition import condition_number
from llqr_mf.probe.eigenvalues import Eigenpairs, eigenvalues

F64 = torch.float64
RTOL = 1.5e-8
"""The default in float64."""


def network(name: str, metric: str = "gauss_newton", damping: float = 1e-2) -> lq.LQRProblem:
    model, inputs, targets, loss = ZOO[name]()
    return lq.LQRProblem.from_network(
        lq.split(model), inputs, targets, loss=loss, metric=metric, damping=damping
    )


def matrix(values: Tensor, dtype: torch.dtype = F64) -> Tensor:
    n = len(values)
    generator = torch.Generator().manual_seed(3)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=generator))
    A = (q * values.double()) @ q.mT
    return ((A + A.mT) / 2).to(dtype)


def assert_pairs(found: Eigenpairs, A: Tensor, expected: Tensor) -> None:
    norm = float(torch.linalg.eigvalsh(A).abs().max())
    assert bool(found.converged.all()) and found.values.dtype == F64
    torch.testing.assert_close(found.values, expected, rtol=0, atol=RTOL * norm)
    x = found.vectors
    true = (A @ x - x * found.values).norm(dim=0)
    torch.testing.assert_close(found.residual_norm, true, rtol=1e-3, atol=1e-14 * norm)
    torch.testing.assert_close(x.mT @ x, torch.eye(len(expected), dtype=F64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_a_networks_hessian(name: str, metric: str) -> None:
    problem = network(name, metric)
    dense = problem.hessian.to_dense()
    dense = (dense + dense.mT) / 2
    exact = torch.linalg.eigvalsh(dense).flip(0)
    assert (float(exact[-1]) < 0) == (metric == "newton")
    assert_pairs(eigenvalues(problem, 3), dense, exact[:3])
    assert_pairs(eigenvalues(problem.hessian, 2, which="smallest", block=2), dense, exact[-2:])
    both = eigenvalues(problem, 2, which="both")
    assert_pairs(both, dense, torch.cat([exact[:2], exact[-2:]]))
    assert_pairs(eigenvalues(problem, 2, method="lobpcg"), dense, exact[:2])


def test_a_structure_preconditions_the_smallest_end() -> None:
    problem = network("mlp", damping=1e-3)
    A = problem.hessian
    dense = A.to_dense() + torch.diag(torch.linspace(0, 1, problem.size, dtype=F64))
    M = torch.linalg.inv(dense + 1e-3 * torch.diag(dense.diagonal()))
    options = {"which": "smallest", "method": "lobpcg", "max_products": 5000}
    plain = eigenvalues(dense, 3, **options)
    helped = eigenvalues(
        dense, 3, preconditioner=from_function(lambda v: M @ v, len(M), dtype=F64), **options
    )
    exact = torch.linalg.eigvalsh(dense).flip(0)[-3:]
    assert_pairs(plain, dense, exact)
    assert_pairs(helped, dense, exact)
    assert helped.products < plain.products / 2


@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
def test_products_are_counted_truly(method: str) -> None:
    values, calls = torch.linspace(-1, 2, 100, dtype=F64), []

    def product(v: Tensor) -> Tensor:
        calls.append(1)
        return values * v

    A = from_function(product, 100, dtype=F64)
    found = eigenvalues(A, 3, method=method)
    assert found.products == len(calls)


def test_the_interval_of_each_value_holds_an_eigenvalue() -> None:
    values = torch.linspace(0, 1, 100, dtype=F64)
    with pytest.warns(RuntimeWarning, match="max_products"):
        found = eigenvalues(matrix(values), 4, max_products=25)
    assert not bool(found.converged.all())
    low, high = found.intervals()
    inside = (values > low[:, None] - 1e-14) & (values < high[:, None] + 1e-14)
    assert bool(inside.any(1).all())


def test_rounding_is_told_from_a_small_budget() -> None:
    A = matrix(torch.linspace(0, 1, 100) ** 4, torch.float32)
    with pytest.warns(RuntimeWarning, match="rounding"):
        eigenvalues(A, 2, rtol=1e-9)


@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
def test_a_run_that_was_cut_off_goes_on(method: str, tmp_path: Path) -> None:
    dense, calls = matrix(torch.linspace(-1, 1, 120, dtype=F64) ** 3), []
    A = from_function(lambda v: (calls.append(1), dense @ v)[1], 120, dtype=F64)
    options = {"method": method, "basis": 8}
    whole = eigenvalues(A, 3, **options)
    path = tmp_path / "run.pt"
    with pytest.warns(RuntimeWarning, match="not converged"):
        eigenvalues(A, 3, checkpoint=path, max_products=whole.products * 2 // 3, **options)
    calls.clear()
    resumed = eigenvalues(A, 3, checkpoint=path, **options)
    assert len(calls) < whole.products * 2 // 3
    assert resumed.products == whole.products
    assert torch.equal(resumed.values, whole.values)
    assert torch.equal(resumed.vectors, whole.vectors)
    # No more in the file than the vectors that are kept, and their products.
    assert path.stat().st_size < 15 * 120 * 8 + 20_000
    with pytest.raises(ValueError, match="another computation"):
        eigenvalues(A, 2, checkpoint=path, **options)
    with pytest.raises(ValueError, match="another operator"):
        eigenvalues(2 * A, 3, checkpoint=path, **options)


@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
def test_vectors_of_before_and_seeds(method: str) -> None:
    A = matrix(torch.linspace(-1, 1, 120, dtype=F64) ** 3)
    first, again = (eigenvalues(A, 3, method=method, seed=4) for _ in range(2))
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors, eigenvalues(A, 3, method=method, seed=5).vectors)
    warm = eigenvalues(A, 3, method=method, initial=first.vectors)
    assert warm.products < first.products


def test_reading_the_result() -> None:
    found = eigenvalues(matrix(torch.arange(10, dtype=F64)), 3, which="both", seed=2)
    assert [round(x, 6) for x in found.values.tolist()] == [9, 8, 7, 2, 1, 0]
    told = json.loads(json.dumps(found.to_dict()))
    assert told["values"] == found.values.tolist() and told["converged"] == [True] * 6
    assert (told["products"], told["seed"], told["which"]) == (found.products, 2, "both")
    lines = str(found).splitlines()
    assert len(lines) == 8 and lines[1].split()[::2] == ["9", "yes"]
    assert f"{found.products} products" in lines[-1]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"method": "power"}, "method='power'"),
        ({"preconditioner": lambda v: v}, "no preconditioner"),
        ({"method": "lobpcg", "block": 2}, "basis="),
        ({"method": "lobpcg", "which": "magnitude"}, "which='magnitude'"),
        ({"initial": torch.ones(9, 1, dtype=F64)}, r"initial has shape \(9, 1\)"),
        ({"initial": torch.ones(10, dtype=F64)}, "initial has shape"),
        ({"k": 11}, "k is 11"),
    ],
)
def test_bad_input(options: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        eigenvalues(matrix(torch.arange(10, dtype=F64)), **{"k": 3, **options})
    with pytest.raises(TypeError, match="from_function"):
        eigenvalues(lambda v: v, 1)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("condition", [1.0, 30.0, 3e3])
def test_the_condition_number_lies_in_its_bounds(condition: float, dtype: torch.dtype) -> None:
    A = matrix(7 * condition ** -torch.linspace(0, 1, 60, dtype=F64), dtype)
    exact = torch.linalg.eigvalsh(A.double())
    true = float(exact[-1] / exact[0])
    found = condition_number(A)
    assert found.status == "converged"
    assert found.lower <= true <= found.upper
    # Rayleigh quotients of residuals of 1 %: about that, squared where there is a gap.
    assert float(found) == pytest.approx(true, rel=1e-2)
    assert found.upper / found.lower < 1.05
    assert found.products > 0


def test_the_condition_number_of_a_problem() -> None:
    problem = network("mlp", damping=1e-3)
    exact = torch.linalg.eigvalsh(problem.hessian.to_dense())
    found = condition_number(problem, rtol=1e-4)
    assert found.value == pytest.approx(float(exact[-1] / exact[0]), rel=1e-4)


def test_what_is_not_positive_definite_is_said() -> None:
    indefinite = condition_number(matrix(torch.linspace(-0.5, 1, 40, dtype=F64)))
    assert (indefinite.status, indefinite.value) == ("not_positive", math.inf)
    assert "-0.5" in indefinite.note
    newton = condition_number(network("mlp", "newton", damping=1e-6))
    assert newton.status == "not_positive"
    low_rank = torch.cat([torch.ones(5), torch.zeros(35)]).double()
    singular = condition_number(matrix(low_rank))
    assert (singular.status, singular.value, singular.upper) == ("singular", math.inf, math.inf)
    tiny = torch.logspace(-9, 0, 10)
    assert condition_number(matrix(tiny, torch.float32)).status == "singular"
    assert condition_number(torch.zeros(5, 5, dtype=F64)).status == "singular"
    assert condition_number(-torch.eye(5, dtype=F64)).status == "not_positive"
    one = condition_number(torch.full((1, 1), 3.0, dtype=F64))
    assert (one.value, one.status) == (1.0, "converged")
    told = json.loads(json.dumps(singular.to_dict()))
    assert told["value"] is None and told["status"] == "singular"
    assert "singular" in str(singular)


def test_a_condition_number_out_of_products_is_a_lower_bound(tmp_path: Path) -> None:
    values = torch.logspace(-6, 0, 300, dtype=F64)
    A = matrix(values)
    path = tmp_path / "run.pt"
    with pytest.warns(RuntimeWarning, match="max_products"):
        found = condition_number(A, max_products=60, checkpoint=path)
    assert found.status == "not_converged" and "lower bound" in found.note
    assert found.lower <= found.value < 1e6 and found.upper == math.inf
    with pytest.warns(RuntimeWarning, match="max_products"):
        more = condition_number(A, max_products=200, checkpoint=path)
    assert more.products > found.products and more.value > found.value
