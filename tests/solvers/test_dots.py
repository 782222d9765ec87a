"""Dot products and updates of long rows against float64, in pieces and whole."""

from __future__ import annotations

import pytest
import torch
from llqr_mf.solvers import dots
from llqr_mf.solvers.dots import cross_dots, row_dots, row_norms, update_rows
from memory import LiveBytes
from torch import Tensor

DTYPES = [torch.bfloat16, torch.float32, torch.float64]

# Rows within a piece, of several pieces each, and several rows to a piece, with a ragged end.
SHAPES = [(1, 50), (1, 1000), (3, 1000), (7, 33), (2, 64), (3, 0), (0, 5)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dots, "CPU_CHUNK", 64)


def rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def expected(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a.double(), b.double())


def assert_same(found: Tensor, a: Tensor, b: Tensor) -> None:
    assert found.dtype == torch.float64 and found.shape == (len(a),)
    size = (expected(a, a) * expected(b, b)).sqrt()
    # Each of at most 1000 additions rounds to 1e-16 of a partial sum.
    assert bool(((found - expected(a, b)).abs() <= 1e-14 * size).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dots_of_every_shape(shape: tuple[int, int], dtype: torch.dtype) -> None:
    a, b = rows(*shape, dtype=dtype), rows(*shape, dtype=dtype, seed=1)
    assert_same(row_dots(a, b), a, b)
    assert_same(row_dots(a, a), a, a)
    assert_same(row_dots(a.double(), b), a, b)
    across, square = cross_dots(a, b)
    assert_same(across, a, b)
    assert_same(square, b, b)
    assert torch.equal(row_norms(a), row_dots(a, a).sqrt())


def test_rows_that_are_columns_of_a_matrix() -> None:
    a, b = rows(90, 2, dtype=torch.float32).mT, rows(90, 2, dtype=torch.float32, seed=1).mT
    assert_same(row_dots(a, b), a, b)
    target = a.clone()
    assert_same(update_rows(target, b, step=torch.ones(2)), a + b, a + b)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("steps", [False, True])
def test_updates(shape: tuple[int, int], decays: bool, steps: bool) -> None:
    a, b = rows(*shape, dtype=torch.float32), rows(*shape, dtype=torch.float32, seed=1)
    decay, step = rows(2, shape[0], dtype=torch.float64, seed=2)
    wanted = (decay.unsqueeze(-1) if decays else 1) * a + (step.unsqueeze(-1) if steps else 1) * b
    square = update_rows(a, b, decay=decay if decays else None, step=step if steps else None)
    # Two factors, two products and a sum of float32, each off by 6e-8.
    torch.testing.assert_close(a.double(), wanted.double(), rtol=3e-7, atol=1e-6)
    assert_same(square, a, a)


@pytest.mark.parametrize("value", [0.1, 1e-30, 1e30])
def test_float32_rows_neither_drift_nor_overflow(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal numbers, whose rounding errors add up: torch.dot in float32 is off by 1e-5 and more."""
    monkeypatch.undo()
    a = torch.full((1, 2**20), value)
    wanted = 2**20 * float(a[0, 0].double() ** 2)
    for found in (row_dots(a, a), row_dots(a, a.clone()), *cross_dots(a, a)):
        assert float(found) == pytest.approx(wanted, rel=1e-12)
    assert float(update_rows(a, a.clone(), step=torch.ones(1))) == pytest.approx(4 * wanted, 1e-12)


def test_nan_is_seen() -> None:
    a = torch.ones(2, 500)
    a[1, 300] = torch.nan
    assert row_norms(a).isnan().tolist() == [False, True]


@pytest.mark.parametrize("k", [1, 4])
def test_no_temporary_is_longer_than_a_piece(k: int) -> None:
    a, b, factor = torch.ones(k, 1000), torch.ones(k, 1000), torch.ones(k)
    with LiveBytes() as memory:
        row_dots(a, b)
        cross_dots(a, b)
        update_rows(a, b, decay=factor, step=factor)
        update_rows(a, b, decay=factor)
    assert memory.largest <= 8 * dots.CPU_CHUNK * torch.get_num_threads() + 16 * 1000 // 64
