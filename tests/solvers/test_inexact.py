"""Refinement with coarse products against dense solves, and its guard."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from linear_operator.operators import DenseLinearOperator
from llqr_mf.solvers.cg import cg
from llqr_mf.solvers.inexact import RefinedResult, refined_cg
from llqr_mf.solvers.status import Code
from torch import Tensor

F64 = torch.float64


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def spd(n: int, condition: float) -> Tensor:
    q, _ = torch.linalg.qr(normal(n, n, seed=0))
    values = condition ** -torch.linspace(0, 1, n, dtype=F64)
    a = (q * values) @ q.mT
    return (a + a.mT) / 2


class Rows:
    """Products with rows, counted; rounded to bfloat16 on demand."""

    def __init__(self, a: Tensor, *, rounded: bool = False) -> None:
        self.a, self.rounded, self.count = a, rounded, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.count += 1
        if self.rounded:
            product = v.bfloat16().to(v.dtype) @ self.a.bfloat16().to(v.dtype)
            return product.bfloat16().to(v.dtype)
        return v @ self.a


def residual(a: Tensor, x: Tensor, b: Tensor) -> float:
    """The worst column's."""
    return float(((b - a @ x).norm(dim=0) / b.norm(dim=0)).max())


def check(result: RefinedResult, a: Tensor, b: Tensor, rtol: float) -> None:
    assert result.status.ok, str(result.status)
    assert residual(a, result.x, b) <= rtol * (1 + 1e-6)
    assert float(result.residual_norm.max()) <= rtol
    expected = torch.linalg.solve(a, b)
    error = (result.x - expected).norm(dim=0) / expected.norm(dim=0)
    assert float(error.max()) <= rtol * float(torch.linalg.cond(a))


@pytest.mark.parametrize("condition", [2.0, 30.0, 100.0])
@pytest.mark.parametrize("columns", [None, 1, 3])
def test_full_accuracy_from_coarse_products(condition: float, columns: int | None) -> None:
    a = spd(120, condition)
    b = normal(120) if columns is None else normal(120, columns)
    exact, coarse = Rows(a), Rows(a, rounded=True)
    result = refined_cg(exact, coarse, b, rtol=1e-11)
    check(result, a, b, 1e-11)
    assert result.x.shape == b.shape and result.residual_norm.shape == b.shape[1:]
    assert (result.products, result.coarse_products) == (exact.count, coarse.count)
    assert result.left_to_plain == (None,) * (columns or 1)
    # A round gains a tenth at least, but for what rounding loses: 11 rounds would be ideal.
    assert result.products == result.rounds <= 16
    assert exact.count < coarse.count < 4 * cg(Rows(a), b, rtol=1e-11).products


def test_operators_serve_as_well_as_functions() -> None:
    a, b = spd(60, 30.0), normal(60, 2)
    coarse = a + 2e-3 * spd(60, 10.0)
    by_operator = refined_cg(DenseLinearOperator(a), DenseLinearOperator(coarse), b, rtol=1e-9)
    by_function = refined_cg(Rows(a), Rows(coarse), b, rtol=1e-9)
    check(by_operator, a, b, 1e-9)
    torch.testing.assert_close(by_operator.x, by_function.x, rtol=1e-9, atol=1e-9)


def test_float32_reaches_its_floor_and_stops() -> None:
    a = spd(120, 100.0).float()
    b = normal(120).float()
    result = refined_cg(Rows(a), Rows(a, rounded=True), b, rtol=1e-5)
    assert result.status.ok and result.x.dtype == torch.float32
    assert residual(a.double(), result.x.double(), b.double()) <= 1.2e-5
    floor = refined_cg(Rows(a), Rows(a, rounded=True), b, rtol=1e-12)
    # eps |A| |x| / |b| is 1e-5 at most.
    assert not floor.status.ok and float(floor.residual_norm) < 1e-5


# ---- the guard

USELESS: dict[str, Callable[[Tensor], Tensor]] = {
    "another": lambda v: v @ spd(v.shape[1], 1e3).flip(0, 1) * 3,
    "identity": lambda v: v,
    "zero": torch.zeros_like,
    "negative": lambda v: -v,
    "nan": lambda v: v * torch.nan,
    "noise": lambda v: v + 10 * torch.sin(1e3 * v),
}


@pytest.mark.parametrize("name", list(USELESS))
@pytest.mark.parametrize("columns", [None, 2])
def test_a_useless_coarse_operator(name: str, columns: int | None) -> None:
    a = spd(100, 1e3)
    b = normal(100) if columns is None else normal(100, columns)
    plain = cg(Rows(a), b, rtol=1e-10)
    result = refined_cg(Rows(a), USELESS[name], b, rtol=1e-10)
    check(result, a, b, 1e-10)
    assert all(result.left_to_plain)
    assert "plain CG finished" in result.status.message
    # At most one or two short rounds are lost.
    assert result.products <= plain.products + 4 + 0.1 * plain.products
    assert result.coarse_products <= 110


def test_negative_curvature_is_named() -> None:
    a, b = spd(30, 10.0), normal(30)
    result = refined_cg(Rows(a), lambda v: -v, b)
    assert result.left_to_plain == ("met negative curvature",)
    assert "negative curvature" in result.status.message and result.status.ok


def test_only_the_column_in_need_falls_back() -> None:
    """The coarse operator is right on the first half and useless on the second."""
    a = torch.block_diag(spd(40, 20.0), spd(40, 20.0))
    coarse = torch.block_diag(a[:40, :40], 50 * torch.eye(40, dtype=F64))
    b = torch.zeros(80, 3, dtype=F64)
    b[:40, 0], b[40:, 2] = normal(40), normal(40, seed=2)
    result = refined_cg(Rows(a), Rows(coarse), b, rtol=1e-9)
    assert result.left_to_plain[:2] == (None, None) and result.left_to_plain[2]
    assert "in 1 of 3 columns" in result.status.message and result.status.ok
    assert result.codes == (Code.CONVERGED,) * 3
    assert torch.equal(result.x[:, 1], torch.zeros(80, dtype=F64))
    assert residual(a, result.x[:, [0, 2]], b[:, [0, 2]]) <= 1e-9


def test_a_coarse_operator_that_turns_bad_late() -> None:
    """What was gained is kept: the plain finish starts from it."""
    a, b = spd(100, 1e2), normal(100)
    good = Rows(a, rounded=True)
    short = refined_cg(Rows(a), good, b, rtol=1e-4)

    def coarse(v: Tensor) -> Tensor:
        return good(v) if good.count < 2 * short.coarse_products else v * 1e3

    result = refined_cg(Rows(a), coarse, b, rtol=1e-10)
    check(result, a, b, 1e-10)
    assert result.left_to_plain[0] and result.rounds > 2
    assert result.products - result.rounds < 0.8 * cg(Rows(a), b, rtol=1e-10).products


def test_a_step_that_made_things_worse_is_taken_back() -> None:
    a, b, start = spd(60, 30.0), normal(60), normal(60, seed=4)
    result = refined_cg(Rows(a), lambda v: 1e-6 * v, b, initial=start)
    assert result.left_to_plain[0]
    # Up to the last bit, in which x + d - d may differ from x: d is 1e6 times as long.
    expected = cg(Rows(a), b, initial=start)
    assert result.status.ok and result.products <= expected.products + 3


def test_an_indefinite_exact_operator_is_reported() -> None:
    values = torch.linspace(0.5, 1, 30, dtype=F64)
    values[3] = -0.5
    a, b = torch.diag(values), normal(30)
    result = refined_cg(Rows(a), Rows(a, rounded=True), b)
    assert result.status.code is Code.NEGATIVE_CURVATURE and not result.status.ok
    assert torch.equal(result.x, cg(Rows(a), b).x)


# ---- options


def test_starts() -> None:
    a, b = spd(80, 50.0), normal(80, 2)
    cold = refined_cg(Rows(a), Rows(a, rounded=True), b, rtol=1e-8)
    again = refined_cg(Rows(a), Rows(a, rounded=True), b, rtol=1e-8, initial=cold.x)
    assert (again.products, again.coarse_products, again.rounds) == (1, 0, 0)
    assert torch.equal(again.x, cold.x) and again.status.ok
    near = refined_cg(Rows(a), Rows(a, rounded=True), b, rtol=1e-8, initial=cold.x + 1e-5)
    assert near.status.ok and near.coarse_products < cold.coarse_products
    spoiled = refined_cg(Rows(a), lambda v: -v, b, rtol=1e-8, initial=cold.x + 1e-5)
    check(spoiled, a, b, 1e-8)
    nothing = refined_cg(Rows(a), Rows(a), torch.zeros(80, dtype=F64))
    assert nothing.products == 0 and nothing.status.ok


def test_limits_and_tolerances() -> None:
    a, b = spd(80, 100.0), normal(80)
    short = refined_cg(Rows(a), Rows(a, rounded=True), b, rtol=1e-10, max_iterations=7)
    assert short.status.code is Code.MAX_ITERATIONS and short.iterations == 7
    assert float(short.residual_norm) == pytest.approx(residual(a, short.x, b), rel=1e-6)
    loose = refined_cg(Rows(a), Rows(a, rounded=True), b, rtol=0, atol=1e-2)
    assert float(loose.residual_norm * b.norm()) <= 1e-2 and loose.rounds <= 4
    assert refined_cg(Rows(a), Rows(a), b, atol=2 * float(b.norm())).products == 0


def test_a_preconditioner_saves_coarse_products() -> None:
    d = 10.0 ** torch.linspace(-1, 1, 100, dtype=F64)
    a = d[:, None] * (spd(100, 5.0) + torch.eye(100, dtype=F64)) * d
    b = normal(100) * d
    inverse = 1 / a.diagonal()
    exact, coarse = Rows(a), Rows(a, rounded=True)
    result = refined_cg(exact, coarse, b, rtol=1e-9, preconditioner=lambda r: r * inverse)
    check(result, a, b, 1e-9)
    assert result.left_to_plain == (None,)
    without = refined_cg(Rows(a), Rows(a, rounded=True), b, rtol=1e-9)
    assert result.coarse_products + result.products < without.coarse_products + without.products
    bad = refined_cg(Rows(a), Rows(a), b, preconditioner=lambda r: -r)
    assert bad.status.code is Code.INDEFINITE


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scales(scale: float) -> None:
    a, b = scale * spd(60, 30.0), normal(60)
    check(refined_cg(Rows(a), Rows(a, rounded=True), b, rtol=1e-9), a, b, 1e-9)


def test_what_does_not_fit() -> None:
    a, b = spd(10, 2.0), normal(10)
    with pytest.raises(ValueError, match="operator"):
        refined_cg(Rows(a), DenseLinearOperator(spd(9, 2.0)), b)
    with pytest.raises(ValueError, match="float32"):
        refined_cg(Rows(a), DenseLinearOperator(a.float()), b)
    with pytest.raises(ValueError, match="NaN"):
        refined_cg(Rows(a), Rows(a), b * torch.nan)
