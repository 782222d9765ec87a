"""Conjugate gradients against dense solves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_operator.operators import DenseLinearOperator, DiagLinearOperator
from llqr_mf.solvers.cg import NegativeCurvatureError, cg
from llqr_mf.solvers.status import MESSAGES, Code, Status, worst_status
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = [torch.float32, torch.float64]
SCALES = [1e-12, 1.0, 1e12]


def with_spectrum(eigenvalues: Tensor, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A dense symmetric matrix of given eigenvalues."""
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    a = (q * eigenvalues.double()) @ q.mT
    return ((a + a.mT) / 2).to(dtype)


def spd(n: int, condition: float, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    exponents = torch.linspace(0, 1, n, dtype=torch.float64)
    return with_spectrum(scale * condition**-exponents, dtype)


def vectors(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def true_residual(a: Tensor, x: Tensor, b: Tensor) -> Tensor:
    """|b - A x| / |b| of every column, in float64."""
    r = b.double() - a.double() @ x.double()
    return r.norm(dim=0) / b.double().norm(dim=0)


class Counted:
    """Products of a dense matrix with rows, counted."""

    def __init__(self, a: Tensor) -> None:
        self.a, self.count = a, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.count += 1
        return v @ self.a


# ---- solutions


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3])
def test_solves_at_every_scale(dtype: torch.dtype, scale: float, condition: float) -> None:
    a, b = spd(100, condition, scale, dtype), vectors(100, dtype=dtype)
    # A float32 solution cannot have a residual below eps * cond; leave it a factor of 4.
    rtol = max(1e-8, 4 * torch.finfo(dtype).eps * condition)
    result = cg(lambda v: v @ a, b, rtol=rtol, max_iterations=300)
    assert result.status.ok, str(result.status)
    assert result.codes == (Code.CONVERGED,)
    assert result.x.dtype == dtype and result.x.shape == b.shape
    assert result.residual_norm.shape == () and result.residual_norm.dtype == torch.float64
    assert result.residual_norm <= rtol
    # The reported residual is that of x, up to the rounding of the product that measured it.
    noise = torch.finfo(dtype).eps * condition
    assert abs(result.residual_norm - true_residual(a, result.x, b)) <= noise


@pytest.mark.parametrize("scale", SCALES)
def test_scaling_the_equations_changes_nothing(scale: float) -> None:
    """Scaling A by a power of two scales every number of the recurrence exactly."""
    exact = 2.0 ** round(torch.log2(torch.tensor(scale)).item())
    a, b = spd(60, 1e3), vectors(60)
    plain, scaled = cg(lambda v: v @ a, b), cg(lambda v: v @ (exact * a), b)
    assert plain.iterations == scaled.iterations
    assert torch.equal(plain.x, scaled.x * exact)


@pytest.mark.parametrize("as_operator", [True, False])
def test_an_easy_and_a_hard_column(as_operator: bool) -> None:
    """99 eigenvectors converge in a step; the mean over columns would stop there."""
    eigenvalues = 1e3 ** -torch.linspace(0, 1, 120, dtype=torch.float64)
    a = with_spectrum(eigenvalues)
    _, basis = torch.linalg.eigh(a)
    b = torch.cat([basis[:, :99], vectors(120, 1)], dim=1)
    operator = DenseLinearOperator(a) if as_operator else lambda v: v @ a
    result = cg(operator, b, rtol=1e-6, max_iterations=400)
    assert result.residual_norm.shape == (100,)
    assert result.residual_norm.max() <= 1e-6
    assert true_residual(a, result.x, b).max() <= 1e-6
    assert result.codes == (Code.CONVERGED,) * 100
    alone = cg(operator, b[:, 99], rtol=1e-6, max_iterations=400)
    # A product of 100 rows rounds otherwise than one of one row: lost conjugacy shifts the end.
    assert abs(result.iterations - alone.iterations) <= 0.05 * alone.iterations


def test_a_converged_column_is_frozen() -> None:
    a = spd(60, 1e3)
    _, basis = torch.linalg.eigh(a)
    easy = basis[:, :3] @ torch.ones(3, dtype=torch.float64)
    alone = cg(lambda v: v @ a, easy, rtol=1e-4)
    together = cg(lambda v: v @ a, torch.stack([easy, vectors(60)], 1), rtol=1e-4)
    assert together.iterations > alone.iterations
    # Not bitwise: a product with two rows may round otherwise than one with one row.
    torch.testing.assert_close(together.x[:, 0], alone.x, rtol=1e-12, atol=1e-13)


def test_zero_columns() -> None:
    a = spd(20, 10.0)
    b = torch.stack([torch.zeros(20, dtype=torch.float64), vectors(20)], 1)
    result = cg(lambda v: v @ a, b, initial=torch.ones_like(b))
    assert torch.equal(result.x[:, 0], torch.zeros(20, dtype=torch.float64))
    assert result.residual_norm[0] == 0 and result.status.ok
    nothing = cg(lambda v: v @ a, torch.zeros(20))
    assert nothing.products == 0 and nothing.iterations == 0 and nothing.status.ok


def test_absolute_tolerance_stops_a_small_right_hand_side() -> None:
    a, b = spd(40, 100.0), vectors(40)
    assert cg(lambda v: v @ a, b, atol=2 * float(b.norm())).iterations == 0
    loose = cg(lambda v: v @ a, b, rtol=0, atol=1e-3)
    assert loose.residual_norm * b.norm() <= 1e-3


def test_warm_start() -> None:
    a, b = spd(80, 1e3), vectors(80)
    cold = cg(lambda v: v @ a, b, max_iterations=300)
    again = cg(lambda v: v @ a, b, initial=cold.x)
    assert again.iterations == 0 and again.products == 1
    assert torch.equal(again.x, cold.x)
    near = cg(lambda v: v @ a, b, initial=cold.x + 1e-4 * vectors(80, seed=2), max_iterations=300)
    assert near.status.ok and near.iterations < cold.iterations


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 4),
    power=st.integers(0, 5),
    scale=st.integers(-12, 12),
    seed=st.integers(0, 10**6),
)
def test_agrees_with_a_dense_solve(n: int, k: int, power: int, scale: int, seed: int) -> None:
    exponents = torch.linspace(0, 1, n, dtype=torch.float64)
    a = with_spectrum(10.0**scale * 10.0 ** (-power * exponents), seed=seed)
    b = vectors(n, k, seed=seed + 1)
    result = cg(lambda v: v @ a, b, rtol=1e-13 * 10**power, max_iterations=20 * n + 20)
    assert result.status.ok, str(result.status)
    expected = torch.linalg.solve(a, b)
    # A residual of size rtol is an error of at most cond * rtol, relative to |x| >= |b| / |A|.
    error = (result.x - expected).norm(dim=0) / expected.norm(dim=0)
    assert error.max() <= 10**power * 2e-13 * 10**power


# ---- preconditioners


def badly_scaled(n: int = 200) -> tuple[Tensor, Tensor]:
    """A diagonal over eight decades around a well-conditioned matrix."""
    d = 10.0 ** torch.linspace(-4, 4, n, dtype=torch.float64)
    a = spd(n, 10.0) + torch.eye(n, dtype=torch.float64)
    a = d.sqrt()[:, None] * a * d.sqrt()
    return a, vectors(n) * d.sqrt()


def test_a_preconditioner_that_returns_its_argument() -> None:
    a, b = spd(80, 100.0), vectors(80)
    plain = cg(lambda v: v @ a, b)
    same = cg(lambda v: v @ a, b, preconditioner=lambda r: r)
    assert plain.iterations == same.iterations
    assert torch.equal(plain.x, same.x)


def test_an_operator_that_returns_its_argument() -> None:
    b = vectors(30, 2)
    result = cg(lambda v: v, b)
    assert result.iterations == 1 and torch.allclose(result.x, b, rtol=1e-14)


@pytest.mark.parametrize("flexible", [False, True])
def test_jacobi_cuts_the_iterations(flexible: bool) -> None:
    a, b = badly_scaled()
    jacobi = DiagLinearOperator(1 / a.diagonal())
    # The preconditioned matrix has a condition number below 11: 2 exp(-2 m / sqrt(11)) = 1e-8 at
    # m = 32 in its own norm; the Euclidean norm may lag by the square root of 1e8.
    result = cg(lambda v: v @ a, b, preconditioner=jacobi, rtol=1e-8, flexible=flexible)
    plain = cg(lambda v: v @ a, b, rtol=1e-8)
    assert result.status.ok and true_residual(a, result.x, b) <= 1e-8
    assert result.iterations <= 47
    assert plain.status.code is Code.MAX_ITERATIONS and "preconditioner" in plain.status.message


def test_a_preconditioner_in_a_narrower_dtype() -> None:
    a, b = badly_scaled()
    jacobi = DiagLinearOperator((1 / a.diagonal()).float())
    result = cg(lambda v: v @ a, b, preconditioner=jacobi, rtol=1e-8)
    assert result.status.ok and result.iterations <= 47


def test_flexible_stands_a_preconditioner_that_changes() -> None:
    """A few inner CG steps are not a linear map; Fletcher-Reeves' beta loses conjugacy."""
    a, b = spd(150, 1e4), vectors(150)

    def inner(r: Tensor) -> Tensor:
        return cg(lambda v: v @ a, r.mT, rtol=0.3, max_iterations=30).x.mT

    options = {"preconditioner": inner, "rtol": 1e-8, "max_iterations": 150}
    flexible = cg(lambda v: v @ a, b, flexible=True, **options)
    fixed = cg(lambda v: v @ a, b, flexible=False, **options)
    assert flexible.status.ok
    assert flexible.iterations < fixed.iterations or not fixed.status.ok
    with pytest.raises(ValueError, match="flexible"):
        flexible.tridiagonal()


def test_an_indefinite_preconditioner_is_named() -> None:
    result = cg(lambda v: v, vectors(10), preconditioner=lambda r: -r)
    assert result.status.code is Code.INDEFINITE and not result.status.ok
    assert torch.equal(result.x, torch.zeros_like(result.x))


# ---- negative curvature


@pytest.mark.parametrize("scale", SCALES)
def test_minus_identity(scale: float) -> None:
    b = vectors(20)
    result = cg(lambda v: -scale * v, b, on_negative_curvature="direction")
    assert result.status.code is Code.NEGATIVE_CURVATURE and not result.status.ok
    # The steepest-descent step with |curvature|: downhill, and of Newton's length.
    torch.testing.assert_close(result.x * scale, b, rtol=1e-12, atol=0)
    assert result.direction is not None and result.curvature is not None
    torch.testing.assert_close(result.direction, b / b.norm(), rtol=1e-12, atol=0)
    assert float(result.curvature) == pytest.approx(-scale, rel=1e-12)


def test_zero_operator() -> None:
    b = vectors(5)
    result = cg(lambda v: 0 * v, b)
    assert result.status.code is Code.NEGATIVE_CURVATURE
    assert torch.equal(result.x, b)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_indefinite(scale: float, dtype: torch.dtype) -> None:
    """One negative eigenvalue among fifty: some steps are taken before it shows."""
    eigenvalues = torch.linspace(0.1, 1, 50, dtype=torch.float64)
    eigenvalues[0] = -0.05
    a, b = with_spectrum(scale * eigenvalues, dtype), vectors(50, dtype=dtype)
    result = cg(lambda v: v @ a, b, on_negative_curvature="direction")
    assert result.status.code is Code.NEGATIVE_CURVATURE and result.iterations > 1
    d = result.direction
    assert d is not None and result.curvature is not None
    assert float(d.norm()) == pytest.approx(1, rel=1e-6)
    assert float(result.curvature) < 0
    rayleigh = float(d.double() @ a.double() @ d.double())
    # The product rounds to eps |A|.
    assert abs(rayleigh - float(result.curvature)) <= 4 * torch.finfo(dtype).eps * scale
    # The kept iterate is better than no step at all.
    x, a64, b64 = result.x.double(), a.double() / scale, b.double()
    assert 0.5 * scale * x @ a64 @ x - b64 @ x < 0
    plain = cg(lambda v: v @ a, b)
    assert torch.equal(plain.x, result.x) and plain.direction is None
    with pytest.raises(NegativeCurvatureError, match="column 0"):
        cg(lambda v: v @ a, b, on_negative_curvature="raise")


def test_negative_curvature_in_one_column_only() -> None:
    a = torch.diag(torch.tensor([2.0, 3.0, -1.0], dtype=torch.float64))
    b = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    result = cg(lambda v: v @ a, b, on_negative_curvature="direction")
    assert result.codes == (Code.CONVERGED, Code.NEGATIVE_CURVATURE)
    assert "1 of 2 columns" in result.status.message
    assert result.direction is not None and result.curvature is not None
    assert torch.equal(result.direction[:, 0], torch.zeros(3, dtype=torch.float64))
    assert result.curvature[0].isnan() and result.curvature[1] < 0


def test_a_warm_start_keeps_its_iterate_at_negative_curvature() -> None:
    b = vectors(8)
    start = vectors(8, seed=5)
    result = cg(lambda v: -v, b, initial=start)
    assert result.status.code is Code.NEGATIVE_CURVATURE
    assert torch.equal(result.x, start)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_singular(scale: float, dtype: torch.dtype) -> None:
    eigenvalues = torch.linspace(0, 1, 40, dtype=torch.float64).sub(0.25).clamp(min=0)
    a = with_spectrum(scale * eigenvalues, dtype)
    inside = (a.double() @ vectors(40) / scale).to(dtype)
    result = cg(lambda v: v @ a, inside, rtol=1e-5)
    assert result.status.ok and true_residual(a, result.x, inside) <= 2e-5
    outside = vectors(40, dtype=dtype)
    result = cg(lambda v: v @ a, outside, rtol=1e-5, max_iterations=200)
    assert result.status.code is Code.NEGATIVE_CURVATURE, str(result.status)


# ---- trust region


def trust_region_optimum(a: Tensor, b: Tensor, radius: float) -> Tensor:
    """The global minimiser of 1/2 x'Ax - b'x in a ball, by bisection on the multiplier."""
    values, basis = torch.linalg.eigh(a)
    c = basis.mT @ b
    low = max(0.0, -float(values[0]))
    if values[0] > 0 and (c / values).norm() <= radius:
        return basis @ (c / values)
    high = low + float(b.norm()) / radius
    for _ in range(200):
        middle = (low + high) / 2
        if (c / (values + middle)).norm() > radius:
            low = middle
        else:
            high = middle
    return basis @ (c / (values + high))


@pytest.mark.parametrize("lowest", [0.01, -0.5])
@pytest.mark.parametrize("radius", [0.1, 1.0, 30.0])
def test_trust_region(lowest: float, radius: float) -> None:
    a = with_spectrum(torch.linspace(lowest, 1, 60, dtype=torch.float64))
    b = vectors(60)

    def model(x: Tensor) -> float:
        return float(0.5 * x @ a @ x - b @ x)

    result = cg(lambda v: v @ a, b, radius=radius, rtol=1e-8)
    best = trust_region_optimum(a, b, radius)
    assert result.status.code is Code.TRUST_REGION and result.status.ok
    # Float64 rounding of a step cut at the boundary.
    assert float(result.x.norm()) == pytest.approx(radius, rel=1e-12)
    slope = float(b @ a @ b / (b @ b))
    length = radius / float(b.norm())
    cauchy = b * (min(1 / slope, length) if slope > 0 else length)
    assert model(result.x) <= model(cauchy) + 1e-12 * abs(model(cauchy))
    assert model(best) <= model(result.x) + 1e-12 * abs(model(best))
    if lowest > 0:
        # Steihaug's step has at least half the optimal decrease (Yuan 2000), for a convex model.
        assert model(result.x) <= 0.5 * model(best)


def test_a_wide_trust_region_changes_nothing() -> None:
    a, b = spd(60, 100.0), vectors(60)
    free = cg(lambda v: v @ a, b)
    held = cg(lambda v: v @ a, b, radius=1e6)
    assert held.status.code is Code.CONVERGED
    assert torch.equal(free.x, held.x)


def test_trust_region_in_the_norm_of_the_preconditioner() -> None:
    a, b = badly_scaled(60)
    scale = a.diagonal()
    free = cg(lambda v: v @ a, b, preconditioner=DiagLinearOperator(1 / scale), rtol=1e-8)
    radius = 0.5 * float((scale * free.x**2).sum().sqrt())
    result = cg(lambda v: v @ a, b, preconditioner=DiagLinearOperator(1 / scale), radius=radius)
    assert result.status.code is Code.TRUST_REGION
    # The norm follows from recurrences alone: some roundings per iteration.
    assert float((scale * result.x**2).sum().sqrt()) == pytest.approx(radius, rel=1e-10)
    # It is the step of the equations scaled to have a unit preconditioner.
    root = scale.sqrt()
    unit = a / root[:, None] / root
    expected = cg(lambda v: v @ unit, b / root, radius=radius)
    torch.testing.assert_close(result.x * root, expected.x, rtol=1e-8, atol=1e-8 * radius)


def test_trust_region_returns_the_negative_direction_too() -> None:
    b = vectors(10)
    result = cg(lambda v: -v, b, radius=2.0, on_negative_curvature="direction")
    assert result.status.code is Code.TRUST_REGION
    torch.testing.assert_close(result.x, 2 * b / b.norm(), rtol=1e-12, atol=0)
    assert result.curvature is not None and float(result.curvature) == pytest.approx(-1)


# ---- precision


def test_float64_vectors_help_float32_products() -> None:
    a, b = spd(200, 1e4, dtype=torch.float32), vectors(200, dtype=torch.float32)
    residuals = {}
    for dtype in DTYPES:
        result = cg(lambda v: v @ a, b, recurrence_dtype=dtype, max_iterations=2000)
        assert result.status.code is Code.STAGNATED and "precision" in result.status.message
        residuals[dtype] = float(true_residual(a, result.x, b))
    # Rounding x to float32 costs eps |A| |x| = 1e-5 or so; float32 recurrences add one such error
    # for every iteration, 600 of them, as a random walk: a factor of 24.
    assert residuals[torch.float64] < residuals[torch.float32] / 5
    default = cg(lambda v: v @ a, b, max_iterations=2000)
    assert float(true_residual(a, default.x, b)) == residuals[torch.float64]


def test_the_reported_residual_is_true() -> None:
    """Float32 throughout at condition 1e4: the recurrence claims 1e-6, the truth is above 1e-4."""
    a, b = spd(200, 1e4, dtype=torch.float32), vectors(200, dtype=torch.float32)
    result = cg(lambda v: v @ a, b, recurrence_dtype=torch.float32, max_iterations=2000)
    truth = float(true_residual(a, result.x, b))
    assert truth > 1e-4
    # The product that measures it has an error of its own, well below eps * cond = 1.2e-3.
    assert float(result.residual_norm) == pytest.approx(truth, rel=0.3)
    assert not result.status.ok


def test_a_restart_from_the_true_residual() -> None:
    """An operator that is off by 1e-3 for its first run: the second makes up for it."""
    a, b = spd(60, 100.0), vectors(60)
    first = cg(lambda v: v @ a, b).iterations
    counted = Counted(a)

    def drifting(v: Tensor) -> Tensor:
        out = counted(v)
        return out * (1 + 1e-3) if counted.count <= first - 5 else out

    result = cg(drifting, b, max_iterations=300)
    assert result.status.ok
    assert true_residual(a, result.x, b) <= 1e-6
    assert result.products == counted.count == result.iterations + 2


def test_a_restart_needs_progress() -> None:
    """Products with random errors of 1e-3: stagnation, after a bounded number of products."""
    a, b = spd(60, 10.0), vectors(60)
    generator = torch.Generator().manual_seed(0)

    def noisy(v: Tensor) -> Tensor:
        noise = torch.randn(v.shape, dtype=v.dtype, generator=generator)
        return v @ a + 1e-3 * noise * v.norm() / 60**0.5

    result = cg(noisy, b, rtol=1e-8, max_iterations=1000)
    assert result.status.code is Code.STAGNATED
    # The first run falls to the noise, the second cannot halve that: a product for each check.
    assert result.products == result.iterations + 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_half_precision_products(dtype: torch.dtype, scale: float) -> None:
    a = spd(40, 5.0)
    b = (scale * vectors(40)).to(dtype)
    eps = torch.finfo(dtype).eps
    result = cg(lambda v: v @ a.to(dtype), b, rtol=8 * eps)
    # Products of 40 terms, and x, round to a few eps at this condition.
    assert result.status.ok and result.x.dtype == dtype
    assert true_residual(a.to(dtype), result.x, b) <= 16 * eps


def test_products_that_would_underflow() -> None:
    """A p is of size 1e-42 here, where float32 has two digits: p is scaled before the product."""
    a, b = spd(40, 10.0, 1e-12, torch.float32), 1e-30 * vectors(40, dtype=torch.float32)
    result = cg(lambda v: v @ a, b, rtol=1e-5)
    assert result.status.ok and true_residual(a, result.x, b) <= 2e-5


# ---- Lanczos


def test_ritz_values() -> None:
    eigenvalues = torch.tensor([1.0, 2.0, 5.0, 9.0, 20.0], dtype=torch.float64)
    a, b = with_spectrum(eigenvalues), vectors(5, 2)
    result = cg(lambda v: v @ a, b, rtol=1e-13)
    for column in (0, 1):
        diagonal, off = result.tridiagonal(column)
        assert diagonal.dtype == off.dtype == torch.float64
        assert diagonal.shape == (5,) and off.shape == (4,)
        t = torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)
        # Five steps in five dimensions: all the eigenvalues, to rounding.
        torch.testing.assert_close(torch.linalg.eigvalsh(t), eigenvalues, rtol=1e-10, atol=0)


def test_ritz_values_of_a_long_run_reach_both_ends() -> None:
    a, b = spd(200, 1e3), vectors(200)
    diagonal, off = cg(lambda v: v @ a, b, rtol=1e-10, max_iterations=400).tridiagonal()
    ritz = torch.linalg.eigvalsh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    # Ghosts may appear, but never outside the spectrum. The upper end, where the gap to the next
    # eigenvalue is 35 times as wide, has converged; the lower lies between the last two.
    assert float(ritz[-1]) == pytest.approx(1.0, rel=1e-10)
    assert 1e-3 * (1 - 1e-9) <= float(ritz[0]) <= 1e-3 ** (198 / 199)


def test_preconditioned_ritz_values() -> None:
    a, _ = badly_scaled(6)
    d = a.diagonal()
    result = cg(lambda v: v @ a, vectors(6), preconditioner=DiagLinearOperator(1 / d), rtol=1e-13)
    diagonal, off = result.tridiagonal()
    t = torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)
    expected = torch.linalg.eigvalsh(a / d.sqrt() / d.sqrt()[:, None])
    torch.testing.assert_close(torch.linalg.eigvalsh(t)[-1], expected[-1], rtol=1e-6, atol=0)
    assert len(diagonal) == result.coefficients.shape[1]


def test_coefficients_of_a_column_end_with_it() -> None:
    a = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    b = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    result = cg(lambda v: v @ a, b)
    assert [len(result.tridiagonal(j)[0]) for j in (0, 1)] == [1, 3]
    assert [len(result.tridiagonal(j)[1]) for j in (0, 1)] == [0, 2]


# ---- statuses and refusals


def test_every_code_has_a_message() -> None:
    assert set(MESSAGES) == set(Code)
    for code, message in MESSAGES.items():
        status = Status(code, message)
        assert str(status) == f"{code.value}: {message}"
        assert status.ok == (code in (Code.CONVERGED, Code.TRUST_REGION))
    assert worst_status((Code.CONVERGED, Code.NOT_FINITE, Code.STAGNATED)).code is Code.NOT_FINITE
    assert worst_status(()).ok


def test_max_iterations() -> None:
    a, b = spd(100, 1e4), vectors(100)
    result = cg(lambda v: v @ a, b, max_iterations=7)
    assert result.iterations == 7 and result.products == 8
    assert result.status.code is Code.MAX_ITERATIONS
    assert "max_iterations" in result.status.message
    assert float(result.residual_norm) == pytest.approx(float(true_residual(a, result.x, b)))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite(poison: float) -> None:
    a, b = spd(60, 1e3), vectors(60, 2)
    counted = Counted(a)

    def fails_late(v: Tensor) -> Tensor:
        out = counted(v)
        if counted.count >= 5:
            out[0] = poison
        return out

    result = cg(fails_late, b, max_iterations=300)
    assert result.codes[0] is Code.NOT_FINITE and result.codes[1] is Code.CONVERGED
    assert result.status.code is Code.NOT_FINITE
    expected = cg(lambda v: v @ a, b, max_iterations=4)
    torch.testing.assert_close(result.x[:, 0], expected.x[:, 0], rtol=1e-12, atol=1e-12)
    assert true_residual(a, result.x, b)[1] <= 1e-6


def test_a_preconditioner_that_is_not_finite() -> None:
    a, b = spd(30, 10.0), vectors(30)
    result = cg(lambda v: v @ a, b, preconditioner=lambda r: r * float("nan"))
    assert result.status.code is Code.NOT_FINITE
    assert torch.equal(result.x, torch.zeros_like(b))


def test_refusals() -> None:
    a, b = spd(6, 10.0), vectors(6)

    def product(v: Tensor) -> Tensor:
        return v @ a

    for bad in (float("nan"), float("inf")):
        poisoned = b.clone()
        poisoned[2] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            cg(product, poisoned)
        with pytest.raises(ValueError, match="initial"):
            cg(product, b, initial=poisoned)
    with pytest.raises(ValueError, match="shape"):
        cg(product, b, initial=b[:3])
    with pytest.raises(ValueError, match="initial"):
        cg(product, b, radius=1.0, initial=b)
    with pytest.raises(ValueError, match="radius"):
        cg(product, b, radius=0.0)
    with pytest.raises(ValueError, match="negative"):
        cg(product, b, rtol=-1.0)
    with pytest.raises(ValueError, match="truncate"):
        cg(product, b, on_negative_curvature="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not fit"):
        cg(DenseLinearOperator(a), b[:3])
    with pytest.raises(ValueError, match="convert"):
        cg(DenseLinearOperator(a), b.float())
    with pytest.raises(ValueError, match=r"\(k, n\)"):
        cg(lambda v: v[0], b)


# ---- cost


@pytest.mark.parametrize("k", [None, 5])
def test_products_are_the_iterations_and_one(k: int | None) -> None:
    a = spd(80, 100.0)
    b = vectors(80) if k is None else vectors(80, k)
    counted = Counted(a)
    result = cg(counted, b)
    assert result.products == counted.count == result.iterations + 1
    counted.count = 0
    warm = cg(counted, b, initial=vectors(*b.shape, seed=3))
    assert warm.products == counted.count == warm.iterations + 2


def test_one_read_of_the_device_per_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0

    def counting(original):  # type: ignore[no-untyped-def]
        def read(self, *args):  # type: ignore[no-untyped-def]
            nonlocal reads
            reads += 1
            return original(self, *args)

        return read

    a, b = spd(80, 1e3), vectors(80, 3)
    shape = {}
    for limit in (10, 30):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "nonzero"):
                patch.setattr(Tensor, name, counting(getattr(Tensor, name)))
            reads = 0
            cg(lambda v: v @ a, b, max_iterations=limit, preconditioner=lambda r: r.clone())
            shape[limit] = reads
    assert shape[30] - shape[10] == 20


class LargeOutputs(TorchDispatchMode):
    """Counts the new tensors at least as long as a vector."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made, self.paused = size, 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        known |= {x.untyped_storage().data_ptr() for x in (kwargs or {}).values() if _is_tensor(x)}
        if not self.paused and _is_tensor(out) and out.numel() >= self.size:
            self.made += out.untyped_storage().data_ptr() not in known
        return out


def _is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


@pytest.mark.parametrize("recurrence_dtype", DTYPES)
@pytest.mark.parametrize("flexible", [False, True])
def test_iterations_allocate_nothing_long(recurrence_dtype: torch.dtype, flexible: bool) -> None:
    n = 1_000_000
    d = torch.linspace(0.1, 1, n)
    b = torch.ones(n)
    made = {}
    for limit in (2, 6):
        with LargeOutputs(n) as mode:

            def product(v: Tensor, mode: LargeOutputs = mode) -> Tensor:
                mode.paused = True
                out = v * d
                mode.paused = False
                return out

            cg(
                product,
                b,
                max_iterations=limit,
                rtol=0,
                preconditioner=lambda r: r,
                recurrence_dtype=recurrence_dtype,
                flexible=flexible,
            )
        made[limit] = mode.made
    assert made[6] == made[2]


def test_the_answer_carries_no_graph_and_leaves_b_alone() -> None:
    a = spd(20, 10.0)
    b = vectors(20).requires_grad_()
    before = b.detach().clone()
    result = cg(lambda v: v @ a, b, progress=True)
    assert not result.x.requires_grad
    assert torch.equal(b, before)
