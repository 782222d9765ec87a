"""LOBPCG against dense eigenvalues and SciPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_operator.operators import DiagLinearOperator
from llqr_mf.solvers.lobpcg import lobpcg
from llqr_mf.solvers.ritz import RitzPairs, default_rtol
from memory import LiveBytes
from scipy.sparse.linalg import eigsh
from scipy.sparse.linalg import lobpcg as scipy_lobpcg
from torch import Tensor

from llqr_mf.probe.draws import draw

F64 = torch.float64
N = 150
SPECTRA = {
    "geometric": 0.7 ** torch.arange(N, dtype=F64),
    "multiple": torch.cat([torch.full((3,), -2.0), torch.linspace(0, 1, N - 3)]).double(),
    "indefinite": torch.linspace(-1, 1, N, dtype=F64) ** 3,
    "damped": torch.cat([torch.linspace(1, 10, 8), torch.full((N - 8,), 1e-2)]).double(),
}


def basis(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=generator)).Q


def matrix(values: Tensor, dtype: torch.dtype = F64) -> Tensor:
    q = basis(len(values))
    A = (q * values) @ q.mT
    return ((A + A.mT) / 2).to(dtype)


def drawing(n: int, dtype: torch.dtype = F64, seed: int = 0) -> Callable[[range], Tensor]:
    return lambda indices: draw("gaussian", n, indices, seed, torch.empty(0, dtype=dtype))


class Counted:
    """Products of a dense matrix with rows; the vectors counted."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.vectors = A, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.vectors += len(v)
        return v @ self.A


def assert_pairs(found: RitzPairs, A: Tensor, which: str) -> None:
    """Values, true residuals and orthonormal vectors."""
    eps, k = torch.finfo(A.dtype).eps, len(found.values)
    exact = torch.linalg.eigvalsh(A.double()).flip(0)
    norm = float(exact.abs().max())
    assert bool(found.converged.all())
    allowed = (default_rtol(A.dtype) + 50 * eps) * norm
    expected = exact[:k] if which == "largest" else exact[len(exact) - k :]
    torch.testing.assert_close(found.values, expected, rtol=0, atol=allowed)
    x = found.rows.double()
    true = (x @ A.double() - found.values[:, None] * x).norm(dim=1)
    torch.testing.assert_close(found.residual_norm, true, rtol=1e-3, atol=50 * eps * norm)
    torch.testing.assert_close(x @ x.mT, torch.eye(k, dtype=F64), rtol=0, atol=100 * eps)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("geometric", "largest"),
        ("multiple", "smallest"),
        ("indefinite", "smallest"),
        ("indefinite", "largest"),
        ("damped", "largest"),
        ("damped", "smallest"),
    ],
)
def test_the_pairs_are_the_dense_ones(name: str, which: str, dtype: torch.dtype) -> None:
    A = matrix(SPECTRA[name], dtype)
    times = Counted(A)
    found = lobpcg(times, drawing(N, dtype), 3, which=which)
    assert_pairs(found, A, which)
    assert found.products == times.vectors


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 9),
    share=st.floats(0, 1),
    which=st.sampled_from(["largest", "smallest"]),
    rank=st.integers(0, 9),
    seed=st.integers(0, 100),
)
def test_small_matrices(n: int, share: float, which: str, rank: int, seed: int) -> None:
    k = 1 + round(share * (n - 1))
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(min(rank, n), n, dtype=F64, generator=generator)
    A = G.mT @ (torch.randn(len(G), 1, dtype=F64, generator=generator).sign() * G)
    assert_pairs(lobpcg(Counted(A), drawing(n, seed=seed), k, which=which), A, which)


def test_scipy_finds_the_same() -> None:
    values = torch.logspace(-3, 0, N, dtype=F64)
    A = matrix(values)
    q = basis(N)
    M = (q / (values * (1 + torch.arange(N) % 3))) @ q.mT
    found = lobpcg(Counted(A), drawing(N), 3, preconditioner=lambda v: v @ M, rtol=1e-9)
    arpack = eigsh(A.numpy(), k=3, which="SA")[0][::-1].copy()
    start = np.random.default_rng(0).normal(size=(N, 3))
    other = scipy_lobpcg(A.numpy(), start, M=M.numpy(), largest=False, tol=1e-9, maxiter=200)[0]
    torch.testing.assert_close(found.values, torch.from_numpy(arpack), rtol=1e-9, atol=1e-12)
    other = np.sort(other)[::-1].copy()
    torch.testing.assert_close(found.values, torch.from_numpy(other), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_a_preconditioner_saves_products(dtype: torch.dtype) -> None:
    values = torch.logspace(-3, 0, N, dtype=F64)
    A, q = matrix(values, dtype), basis(N)
    M = ((q / (values * (1 + 0.5 * (torch.arange(N) % 3)))) @ q.mT).to(dtype)
    options = {"rtol": default_rtol(dtype), "max_products": 20_000}
    plain = lobpcg(Counted(A), drawing(N, dtype), 4, **options)
    helped = lobpcg(Counted(A), drawing(N, dtype), 4, preconditioner=lambda v: v @ M, **options)
    assert_pairs(plain, A, "smallest")
    assert_pairs(helped, A, "smallest")
    # By its own |A|, which the helped run hardly meets, it is the more exact one.
    assert float(helped.tolerance[0]) <= float(plain.tolerance[0]) * 1.01
    assert helped.products < plain.products / 3


def test_a_preconditioner_in_another_dtype() -> None:
    values = torch.linspace(1, 100, N, dtype=F64)
    inverse = DiagLinearOperator((1 / values).float())
    times = lambda v: v * values  # noqa: E731
    found = lobpcg(times, drawing(N), 2, preconditioner=inverse)
    torch.testing.assert_close(
        found.values, values[:2].flip(0), rtol=0, atol=default_rtol(F64) * 100
    )
    assert found.rows.dtype == F64


def test_locked_vectors_take_no_products() -> None:
    values = torch.cat([torch.tensor([-50.0, -20, -1]), torch.linspace(-0.9, 1, N - 3)]).double()
    widths: list[int] = []

    def times(v: Tensor) -> Tensor:
        widths.append(len(v))
        return v * values

    found = lobpcg(times, drawing(N), 3, iterated=3)
    assert widths[1] == 3 and min(widths[1:-1]) == 1
    assert found.products == sum(widths) and bool(found.converged.all())


def test_the_same_seed_gives_the_same_bits() -> None:
    A = matrix(SPECTRA["indefinite"])
    first, again = (lobpcg(Counted(A), drawing(N), 3) for _ in range(2))
    assert torch.equal(first.values, again.values) and torch.equal(first.rows, again.rows)


def test_a_run_goes_on_from_any_state() -> None:
    A = matrix(SPECTRA["indefinite"])
    states: list[tuple[Tensor, ...]] = []

    def keep(state: tuple[Tensor, ...]) -> None:
        states.append(tuple(part.clone() for part in state))

    whole = lobpcg(Counted(A), drawing(N), 3, on_state=keep)
    assert len(states) >= 2
    for state in states:
        times = Counted(A)
        resumed = lobpcg(times, drawing(N), 3, state=state)
        assert torch.equal(resumed.values, whole.values) and torch.equal(resumed.rows, whole.rows)
        assert resumed.products == whole.products > times.vectors


def test_a_warm_start_takes_fewer_products() -> None:
    A = matrix(SPECTRA["indefinite"])
    change = 1e-3 * matrix(torch.linspace(-1, 1, N, dtype=F64).flip(0) ** 5)
    before = lobpcg(Counted(A), drawing(N), 3)
    cold = lobpcg(Counted(A + change), drawing(N), 3)
    warm = lobpcg(Counted(A + change), drawing(N), 3, initial=before.rows)
    assert_pairs(warm, A + change, "smallest")
    assert warm.products < 0.8 * cold.products
    # Equal columns are no more than one.
    twice = before.rows[:1].expand(3, -1)
    assert_pairs(lobpcg(Counted(A), drawing(N), 3, initial=twice), A, "smallest")


def test_the_budget_ends_a_run_honestly() -> None:
    A = matrix(torch.linspace(0, 1, N, dtype=F64))
    times = Counted(A)
    found = lobpcg(times, drawing(N), 3, max_products=30)
    assert found.out_of_products and found.products == times.vectors <= 30
    x = found.rows
    true = (x @ A - found.values[:, None] * x).norm(dim=1)
    torch.testing.assert_close(found.residual_norm, true, rtol=1e-8, atol=0)
    assert not bool(found.converged.all())


def test_a_tolerance_below_rounding_ends() -> None:
    for n in (4, 30):
        A = torch.diag(torch.arange(1.0, n + 1))
        found = lobpcg(Counted(A), drawing(n, torch.float32), 2, rtol=1e-12, max_products=400)
        torch.testing.assert_close(
            found.values, torch.tensor([2.0, 1], dtype=F64), rtol=1e-5, atol=0
        )


def test_degenerate_operators() -> None:
    same = lobpcg(lambda v: v, drawing(20), 3)
    torch.testing.assert_close(same.values, torch.ones(3, dtype=F64), rtol=1e-13, atol=0)
    zero = lobpcg(torch.zeros_like, drawing(20), 3)
    assert zero.values.tolist() == [0.0, 0.0, 0.0] and bool(zero.converged.all())


def test_memory_of_long_vectors() -> None:
    n = 1_000_000
    diagonal = torch.linspace(1, 2, n)
    with LiveBytes() as memory:
        lobpcg(
            lambda v: v * diagonal,
            drawing(n, torch.float32),
            2,
            iterated=2,
            preconditioner=lambda v: v / diagonal,
            max_products=12,
        )
    # Six blocks and a product; two rows of room, and panels of 2^20 numbers (4 alive at most).
    assert memory.peak <= (7 * 2 + 2 + 4) * 4 * n


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 21}, "k is 21"),
        ({"which": "both"}, "which='both'"),
        ({"which": "largest", "preconditioner": lambda v: v}, "smallest end only"),
        ({"iterated": 2}, "2 iterated vectors"),
        ({"rtol": -1.0}, "rtol is -1"),
        ({"max_products": 5}, "max_products is 5"),
        ({"preconditioner": lambda v: v * torch.nan}, "not finite"),
    ],
)
def test_bad_input(options: dict, word: str) -> None:
    k = options.pop("k", 3)
    with pytest.raises(ValueError, match=word):
        lobpcg(lambda v: v * torch.arange(20), drawing(20), k, **options)


def test_a_product_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="NaN"):
        lobpcg(lambda v: v * torch.nan, drawing(20), 3)
