"""The minimal residual method against dense solves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_operator.operators import DenseLinearOperator, DiagLinearOperator
from llqr_mf.solvers.krylov import System
from llqr_mf.solvers.minres import _MinimalResiduals, minres
from llqr_mf.solvers.status import Code
from torch import Tensor
from tqdm import tqdm

DTYPES = [torch.float32, torch.float64]
SCALES = [1e-12, 1.0, 1e12]


def symmetric(eigenvalues: Tensor, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A dense symmetric matrix of given eigenvalues."""
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    a = (q * eigenvalues.double()) @ q.mT
    return ((a + a.mT) / 2).to(dtype)


def indefinite_spectrum(n: int, condition: float, scale: float = 1.0) -> Tensor:
    """Log-spaced sizes, every third of them negative."""
    eigenvalues = scale * condition ** -torch.linspace(0, 1, n, dtype=torch.float64)
    eigenvalues[::3] *= -1
    return eigenvalues


def vectors(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def true_residual(a: Tensor, x: Tensor, b: Tensor) -> Tensor:
    """|b - A x| / |b| of every column, in float64."""
    r = b.double() - a.double() @ x.double()
    return r.norm(dim=0) / b.double().norm(dim=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
def test_solves_indefinite_systems_at_every_scale(
    dtype: torch.dtype, scale: float, condition: float
) -> None:
    a = symmetric(indefinite_spectrum(60, condition, scale), dtype)
    b = vectors(60, dtype=dtype)
    # A float32 solution cannot have a residual below eps * cond; leave it a factor of 4.
    rtol = max(1e-8, 4 * torch.finfo(dtype).eps * condition)
    result = minres(lambda v: v @ a, b, rtol=rtol, max_iterations=600)
    assert result.status.ok, str(result.status)
    assert result.x.dtype == dtype and result.x.shape == b.shape
    assert result.residual_norm.shape == () and result.residual_norm <= rtol
    noise = torch.finfo(dtype).eps * condition
    assert abs(result.residual_norm - true_residual(a, result.x, b)) <= noise


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 30),
    k=st.integers(1, 4),
    power=st.integers(0, 3),
    scale=st.integers(-12, 12),
    seed=st.integers(0, 10**6),
)
def test_agrees_with_a_dense_solve(n: int, k: int, power: int, scale: int, seed: int) -> None:
    a = symmetric(indefinite_spectrum(n, 10.0**power, 10.0**scale), seed=seed)
    b = vectors(n, k, seed=seed + 1)
    rtol = 1e-12 * 10**power
    result = minres(lambda v: v @ a, b, rtol=rtol, max_iterations=100 * n)
    assert result.status.ok, str(result.status)
    expected = torch.linalg.solve(a, b)
    # A residual of size rtol is an error of at most cond * rtol, relative to |x| >= |b| / |A|.
    error = (result.x - expected).norm(dim=0) / expected.norm(dim=0)
    assert error.max() <= 2 * 10**power * rtol


def test_the_residual_is_minimal_in_the_krylov_space() -> None:
    a, b = symmetric(indefinite_spectrum(40, 30.0)), vectors(40)
    for steps in (1, 2, 5, 9):
        result = minres(lambda v: v @ a, b, max_iterations=steps)
        assert result.status.code is Code.MAX_ITERATIONS and result.iterations == steps
        powers = [b / b.norm()]
        for _ in range(steps - 1):
            powers.append(a @ powers[-1])
        basis = torch.linalg.qr(torch.stack(powers, 1))[0]
        y = torch.linalg.lstsq(a @ basis, b.unsqueeze(1), driver="gelsd").solution
        expected = (a @ basis @ y).squeeze(1)
        best = (b - expected).norm() / b.norm()
        # Nine powers of A have a condition number below 1e8: eight digits are left of sixteen.
        assert float(result.residual_norm) == pytest.approx(float(best), rel=1e-8)


@pytest.mark.parametrize("as_operator", [True, False])
def test_an_easy_a_hard_and_a_zero_column(as_operator: bool) -> None:
    a = symmetric(indefinite_spectrum(60, 100.0))
    _, basis = torch.linalg.eigh(a)
    b = torch.stack([basis[:, 7], vectors(60), torch.zeros(60, dtype=torch.float64)], 1)
    operator = DenseLinearOperator(a) if as_operator else lambda v: v @ a
    result = minres(operator, b, rtol=1e-8, max_iterations=400)
    assert result.codes == (Code.CONVERGED,) * 3
    assert result.residual_norm[:2].max() <= 1e-8
    assert true_residual(a, result.x, b)[:2].max() <= 1e-8
    assert torch.equal(result.x[:, 2], b[:, 2]) and result.residual_norm[2] == 0
    alone = minres(operator, b[:, 0], rtol=1e-8)
    assert alone.iterations == 1
    # Frozen: not bitwise, as a product with three rows may round otherwise.
    torch.testing.assert_close(result.x[:, 0], alone.x, rtol=1e-12, atol=1e-13)


def test_minus_identity_in_one_step() -> None:
    b = vectors(20, 2)
    result = minres(lambda v: -v, b)
    assert result.iterations == 1 and result.status.ok
    torch.testing.assert_close(result.x, -b, rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_singular(scale: float, dtype: torch.dtype) -> None:
    eigenvalues = indefinite_spectrum(60, 10.0, scale)
    eigenvalues[45:] = 0
    a = symmetric(eigenvalues, dtype)
    inside = (a.double() @ vectors(60) / scale).to(dtype)
    result = minres(lambda v: v @ a, inside, rtol=1e-5, max_iterations=400)
    assert result.status.ok and true_residual(a, result.x, inside) <= 2e-5

    outside = vectors(60, dtype=dtype)
    result = minres(lambda v: v @ a, outside, max_iterations=400)
    assert result.status.code is Code.STAGNATED and "least-squares" in result.status.message
    values, basis = torch.linalg.eigh(a.double())
    null = basis[:, values.abs() < 1e-3 * scale]
    best = (null.mT @ outside.double()).norm() / outside.double().norm()
    # The distance to the minimum is second order in sqrt(eps), where the recurrence stops.
    eps = torch.finfo(dtype).eps
    assert float(result.residual_norm) == pytest.approx(float(best), rel=100 * eps)
    assert result.iterations < 400


def test_a_right_hand_side_in_the_null_space() -> None:
    a = torch.diag(torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64))
    b = torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64)
    result = minres(lambda v: v @ a, b)
    assert result.status.code is Code.STAGNATED
    assert torch.equal(result.x, torch.zeros_like(b)) and float(result.residual_norm) == 1


def test_preconditioners() -> None:
    d = 10.0 ** torch.linspace(-3, 3, 100, dtype=torch.float64)
    a = symmetric(indefinite_spectrum(100, 3.0)) * d.sqrt() * d.sqrt()[:, None]
    b = vectors(100) * d.sqrt()
    jacobi = DiagLinearOperator(1 / d)
    result = minres(lambda v: v @ a, b, preconditioner=jacobi, rtol=1e-8)
    plain = minres(lambda v: v @ a, b, rtol=1e-8)
    assert result.status.ok and true_residual(a, result.x, b) <= 1e-8
    # Eigenvalues within +-[1/3, 1]: a factor of (3 - 1) / (3 + 1) for every two steps, so 54 for
    # 1e-8 in the norm of M, and 20 more for the 1e3 between that norm and the Euclidean.
    assert result.iterations <= 74
    assert not plain.status.ok
    plain = minres(lambda v: v @ a, b, max_iterations=5)
    same = minres(lambda v: v @ a, b, max_iterations=5, preconditioner=lambda r: r)
    assert torch.equal(plain.x, same.x)
    # Scaling the preconditioner changes nothing but rounding.
    wide = minres(lambda v: v @ a, b, preconditioner=1e8 * jacobi, rtol=1e-8)
    torch.testing.assert_close(wide.x, result.x, rtol=1e-5, atol=1e-8 * float(result.x.norm()))


def test_refuses_or_names_what_it_cannot_do() -> None:
    b = vectors(10)
    indefinite = minres(lambda v: v, b, preconditioner=lambda r: -r)
    assert indefinite.status.code is Code.INDEFINITE
    assert torch.equal(indefinite.x, torch.zeros_like(b))
    poisoned = b.clone()
    poisoned[3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        minres(lambda v: v, poisoned)


def test_a_product_that_is_not_finite() -> None:
    a, b = symmetric(indefinite_spectrum(40, 30.0)), vectors(40, 2)
    count = 0

    def fails_late(v: Tensor) -> Tensor:
        nonlocal count
        count += 1
        out = v @ a
        if count >= 5:
            out[0] = float("nan")
        return out

    result = minres(fails_late, b, max_iterations=300)
    assert result.codes == (Code.NOT_FINITE, Code.CONVERGED)
    expected = minres(lambda v: v @ a, b, max_iterations=4)
    torch.testing.assert_close(result.x[:, 0], expected.x[:, 0], rtol=1e-12, atol=1e-12)


def test_products_are_the_iterations_and_one_and_reads_are_one_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = symmetric(indefinite_spectrum(60, 100.0)), vectors(60, 3)
    counts = {"products": 0, "reads": 0}

    def product(v: Tensor) -> Tensor:
        counts["products"] += 1
        return v @ a

    def counting(original):  # type: ignore[no-untyped-def]
        def read(self, *args):  # type: ignore[no-untyped-def]
            counts["reads"] += 1
            return original(self, *args)

        return read

    result = minres(product, b, max_iterations=400)
    assert result.status.ok
    assert result.products == counts["products"] == result.iterations + 1
    reads = {}
    for limit in (10, 30):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "nonzero"):
                patch.setattr(Tensor, name, counting(getattr(Tensor, name)))
            counts["reads"] = 0
            minres(product, b, max_iterations=limit)
            reads[limit] = counts["reads"]
    assert reads[30] - reads[10] == 20


def test_the_recurred_residual_is_b_minus_ax() -> None:
    """With a preconditioner its sign matters: its parts are orthogonal in the norm of M only."""
    a, b = symmetric(indefinite_spectrum(30, 10.0)), vectors(30, 2)
    m = DiagLinearOperator(torch.linspace(0.1, 3, 30, dtype=torch.float64))
    system = System(lambda v: v @ a, b, preconditioner=m, rtol=0.0, atol=0.0, recurrence_dtype=None)
    x, r = system.start(None)
    _MinimalResiduals(system, tqdm(disable=True))(x, r, [0, 1], 7)
    torch.testing.assert_close(r, b.mT - x @ a, rtol=0, atol=1e-12)


def test_the_reported_residual_is_true() -> None:
    """Float32 vectors at condition 1e4 claim more than they have."""
    exponents = torch.linspace(0, 1, 150, dtype=torch.float64)
    a, b = symmetric(1e4**-exponents, torch.float32), vectors(150, dtype=torch.float32)
    result = minres(lambda v: v @ a, b, recurrence_dtype=torch.float32, max_iterations=1500)
    truth = float(true_residual(a, result.x, b))
    assert truth > 1e-5 and not result.status.ok
    # The product that measures it has an error of its own, below eps * cond = 1.2e-3.
    assert float(result.residual_norm) == pytest.approx(truth, rel=0.3)
