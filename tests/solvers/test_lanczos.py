"""Thick-restart Lanczos against dense eigenvalues."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llqr_mf.solvers.lanczos import lanczos
from llqr_mf.solvers.ritz import RitzPairs, default_rtol, orthonormalize_, project, rotate_
from memory import LiveBytes
from torch import Tensor

from llqr_mf.probe.draws import draw

F64 = torch.float64
N = 200
SPECTRA = {
    "geometric": 0.8 ** torch.arange(N, dtype=F64),
    "clustered": torch.cat([5 - 1e-3 * torch.arange(4, dtype=F64), torch.linspace(0, 1, N - 4)]),
    "halving": 0.5 ** torch.arange(N, dtype=F64),
    "indefinite": torch.linspace(-1, 1, N, dtype=F64) ** 3 * 4 + 0.5,
    "damped": torch.cat([torch.linspace(1, 10, 8), torch.full((N - 8,), 1e-2)]).double(),
}
ENDS = ("largest", "smallest", "both", "magnitude")


def matrix(values: Tensor, dtype: torch.dtype = F64) -> Tensor:
    n = len(values)
    generator = torch.Generator().manual_seed(3)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=generator))
    A = (q * values.double()) @ q.mT
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


def wanted(A: Tensor, k: int, which: str) -> Tensor:
    """The exact values, falling."""
    values = torch.linalg.eigvalsh(A.double()).flip(0)
    n = len(values)
    if which == "largest":
        return values[:k]
    if which == "smallest":
        return values[n - k :]
    if which == "both":
        return values if 2 * k >= n else torch.cat([values[:k], values[n - k :]])
    places = values.abs().argsort(descending=True)[:k]
    return values[places].sort(descending=True).values


def assert_pairs(found: RitzPairs, A: Tensor, expected: Tensor) -> None:
    """Values, true residuals and orthonormal vectors."""
    eps = torch.finfo(A.dtype).eps
    norm = float(torch.linalg.eigvalsh(A.double()).abs().max())
    assert bool(found.converged.all())
    # Linear in the residual at worst; rounding of a dense product adds some eps |A|.
    allowed = (default_rtol(A.dtype) + 50 * eps) * norm
    torch.testing.assert_close(found.values, expected, rtol=0, atol=allowed)
    x = found.rows.double()
    true = (x @ A.double() - found.values[:, None] * x).norm(dim=1)
    torch.testing.assert_close(found.residual_norm, true, rtol=1e-3, atol=50 * eps * norm)
    eye = torch.eye(len(x), dtype=F64)
    torch.testing.assert_close(x @ x.mT, eye, rtol=0, atol=100 * eps)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("name", ["clustered", "indefinite", "damped"])
def test_the_pairs_are_the_dense_ones(
    name: str, which: str, block: int, dtype: torch.dtype
) -> None:
    A = matrix(SPECTRA[name], dtype)
    times = Counted(A)
    found = lanczos(
        times, drawing(N, dtype), 4, which=which, block=block, basis=40, max_products=3000
    )
    assert_pairs(found, A, wanted(A, 4, which))
    assert found.products == times.vectors


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_a_geometric_spectrum(dtype: torch.dtype) -> None:
    A = matrix(SPECTRA["geometric"], dtype)
    for which in ("largest", "magnitude"):
        assert_pairs(lanczos(Counted(A), drawing(N, dtype), 8, which=which), A, wanted(A, 8, which))


def test_a_basis_that_restarts_often_stays_orthonormal() -> None:
    A = matrix(torch.linspace(0, 1, N, dtype=F64), torch.float32)
    found = lanczos(Counted(A), drawing(N, torch.float32), 2, basis=6, rtol=2e-5)
    assert found.restarts > 20
    assert_pairs(found, A, wanted(A, 2, "largest"))


def test_a_block_finds_the_copies_of_a_multiple_eigenvalue() -> None:
    A = matrix(torch.cat([torch.tensor([5.0, 5, 5, 4]), torch.linspace(0, 3, N - 4)]).double())
    found = lanczos(Counted(A), drawing(N), 4, block=3)
    assert_pairs(found, A, torch.tensor([5.0, 5, 5, 4], dtype=F64))
    # A single vector sees one copy until rounding brings in the others: a loose stop is too early.
    alone = lanczos(Counted(A), drawing(N), 2, rtol=1e-3)
    torch.testing.assert_close(alone.values, torch.tensor([5.0, 4], dtype=F64), rtol=0, atol=1e-3)


def test_few_distinct_eigenvalues_are_found_with_their_copies() -> None:
    A = matrix(torch.cat([torch.full((3,), 2.0), torch.full((N - 3,), -1.0)]).double())
    expected = torch.tensor([2.0, 2, 2, -1, -1, -1], dtype=F64)
    assert_pairs(lanczos(Counted(A), drawing(N), 6), A, expected)
    assert_pairs(lanczos(Counted(A), drawing(N), 3, which="both"), A, expected)
    # 8 large eigenvalues and 192 equal ones: the Krylov space ends after 9 steps.
    damped = matrix(SPECTRA["damped"])
    found = lanczos(Counted(damped), drawing(N), 5, which="smallest")
    assert_pairs(found, damped, torch.full((5,), 1e-2, dtype=F64))
    assert found.products < 40


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 9),
    share=st.floats(0, 1),
    block=st.integers(1, 4),
    which=st.sampled_from(ENDS),
    rank=st.integers(0, 9),
    seed=st.integers(0, 100),
)
def test_small_matrices(n: int, share: float, block: int, which: str, rank: int, seed: int) -> None:
    k = 1 + round(share * (n - 1))
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(min(rank, n), n, dtype=F64, generator=generator)
    signs = torch.randn(len(G), 1, dtype=F64, generator=generator).sign()
    A = G.mT @ (signs * G)
    found = lanczos(Counted(A), drawing(n, seed=seed), k, which=which, block=block)
    size = len(wanted(A, k, which))
    assert found.rows.shape == (size, n)
    if which == "magnitude" and k < n:
        expected = wanted(A, k, which).abs().sort().values
        norm = float(torch.linalg.eigvalsh(A).abs().max())
        torch.testing.assert_close(
            found.values.abs().sort().values, expected, rtol=0, atol=2e-8 * norm + 1e-30
        )
    else:
        assert_pairs(found, A, wanted(A, k, which))


def test_the_same_seed_gives_the_same_bits() -> None:
    A = matrix(SPECTRA["indefinite"])
    first, again = (lanczos(Counted(A), drawing(N), 3, block=2) for _ in range(2))
    assert torch.equal(first.values, again.values) and torch.equal(first.rows, again.rows)
    other = lanczos(Counted(A), drawing(N, seed=1), 3, block=2)
    assert not torch.equal(first.rows, other.rows)


@pytest.mark.parametrize(
    ("name", "k", "block", "basis"), [("indefinite", 3, 2, 14), ("halving", 6, 1, 26)]
)
def test_a_run_goes_on_from_any_restart(name: str, k: int, block: int, basis: int) -> None:
    A = matrix(SPECTRA[name])
    states: list[tuple[Tensor, ...]] = []

    def keep(state: tuple[Tensor, ...]) -> None:
        states.append(tuple(part.clone() for part in state))

    options = {"which": "both", "basis": basis, "block": block}
    whole = lanczos(Counted(A), drawing(N), k, on_restart=keep, **options)
    assert len(states) == whole.restarts >= 2
    # "halving" comes to an invariant space, to the tolerance, and goes on from there.
    assert bool(states[-1][3][5]) == (name == "halving")
    for state in [*states[:: len(states) // 2], states[-1]]:
        times = Counted(A)
        resumed = lanczos(times, drawing(N), k, state=state, **options)
        assert torch.equal(resumed.values, whole.values) and torch.equal(resumed.rows, whole.rows)
        assert resumed.products == whole.products and resumed.restarts == whole.restarts
        assert times.vectors < whole.products


@pytest.mark.parametrize("block", [1, 2])
def test_a_warm_start_takes_fewer_products(block: int) -> None:
    A = matrix(SPECTRA["indefinite"])
    change = matrix(torch.linspace(-1, 1, N, dtype=F64).flip(0) ** 5) * 1e-2
    before = lanczos(Counted(A), drawing(N), 4, block=block)
    cold = lanczos(Counted(A + change), drawing(N), 4, block=block)
    warm = lanczos(Counted(A + change), drawing(N), 4, block=block, initial=before.rows)
    assert_pairs(warm, A + change, wanted(A + change, 4, "largest"))
    assert warm.products < cold.products
    # Nothing is left to do but to mix the sums apart, the noise being 1 %.
    loose = {"block": block, "rtol": 1e-2}
    cold = lanczos(Counted(A), drawing(N), 4, **loose)
    warm = lanczos(Counted(A), drawing(N), 4, initial=before.rows, **loose)
    assert warm.products < cold.products / 2


def test_a_start_in_the_wrong_space_is_left() -> None:
    A = matrix(SPECTRA["indefinite"])
    wrong = torch.linalg.eigh(A).eigenvectors[:, :3].mT
    found = lanczos(Counted(A), drawing(N), 3, initial=wrong)
    assert_pairs(found, A, wanted(A, 3, "largest"))


def test_the_budget_ends_a_run_honestly() -> None:
    A = matrix(torch.linspace(0, 1, N, dtype=F64))
    times = Counted(A)
    found = lanczos(times, drawing(N), 3, block=2, max_products=30)
    assert found.out_of_products and found.products == times.vectors <= 30
    assert not bool(found.converged.all())
    x = found.rows
    true = (x @ A - found.values[:, None] * x).norm(dim=1)
    torch.testing.assert_close(found.residual_norm, true, rtol=1e-8, atol=0)


def test_rounding_that_hides_the_tolerance_is_reported() -> None:
    A = matrix(SPECTRA["indefinite"], torch.float32)
    found = lanczos(Counted(A), drawing(N, torch.float32), 2, rtol=1e-9, max_products=2000)
    assert not found.out_of_products and not bool(found.converged.all())


def test_each_pair_to_its_own_scale() -> None:
    values = torch.cat([torch.logspace(-4, 0, 50, dtype=F64)])
    A = matrix(values)
    found = lanczos(Counted(A), drawing(50), 1, which="both", rtol=1e-3, relative_to_each=True)
    assert abs(float(found.values[-1]) / 1e-4 - 1) <= 1e-3
    assert float(found.residual_norm[-1]) <= 1e-7


def test_half_precision_products_keep_a_float32_basis() -> None:
    A = matrix(SPECTRA["damped"], torch.bfloat16)
    found = lanczos(Counted(A), drawing(N, torch.bfloat16), 2)
    assert found.rows.dtype == torch.float32
    x = found.rows.double()
    torch.testing.assert_close(x @ x.mT, torch.eye(2, dtype=F64), rtol=0, atol=1e-5)
    exact = wanted(A, 2, "largest")
    torch.testing.assert_close(found.values, exact, rtol=0, atol=1e-2 * 10)


def test_an_operator_that_gives_its_argument_back() -> None:
    found = lanczos(lambda v: v, drawing(20), 3)
    torch.testing.assert_close(found.values, torch.ones(3, dtype=F64), rtol=1e-13, atol=0)
    assert bool(found.converged.all())
    zero = lanczos(torch.zeros_like, drawing(20), 3)
    assert zero.values.tolist() == [0.0, 0.0, 0.0] and bool(zero.converged.all())


def test_restarts_take_no_second_basis() -> None:
    n, basis, block, k = 4_000_000, 12, 2, 2
    diagonal = torch.linspace(0, 1, n)
    with LiveBytes() as memory:
        found = lanczos(
            lambda v: v * diagonal,
            drawing(n, torch.float32),
            k,
            basis=basis,
            block=block,
            max_products=24,
        )
    assert found.restarts >= 2
    # The basis and the block ahead, a product and its argument's room, one row that was drawn, and
    # the answer. A second basis would be 12 more.
    assert memory.peak <= (basis + block + block + 2 + k) * 4 * n


def test_long_rows_are_rotated_panel_by_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llqr_mf.solvers.ritz.CPU_PANEL", 24)
    generator = torch.Generator().manual_seed(0)
    rows, C = torch.randn(5, 31, dtype=F64, generator=generator), torch.randn(5, 3, dtype=F64)
    other = torch.randn(2, 31, dtype=F64, generator=generator)
    torch.testing.assert_close(project(other, rows), other @ rows.mT)
    expected = C.mT @ rows
    rotate_(rows, C)
    torch.testing.assert_close(rows[:3], expected)


def test_a_nearly_dependent_block_is_split_to_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(50, 8, dtype=F64, generator=generator)).Q.mT.contiguous()
    w = torch.randn(4, 8, dtype=F64, generator=generator) @ q
    w += 1e-9 * torch.randn(4, 50, dtype=F64, generator=generator)
    w[2] = w[0] + 1e-11 * torch.randn(50, dtype=F64, generator=generator)
    w[3] = w[1]
    before = w.clone()
    h, b = orthonormalize_(w, q, torch.tensor(1e-14, dtype=F64))
    torch.testing.assert_close(h @ q + b @ w, before, rtol=0, atol=1e-14)
    assert b.diagonal()[3] == 0 and bool((w[3] == 0).all())
    both = torch.cat([q, w[:3]])
    torch.testing.assert_close(both @ both.mT, torch.eye(11, dtype=F64), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 21}, "k is 21"),
        ({"which": "top"}, "which='top'"),
        ({"block": 0}, "block is 0"),
        ({"basis": 3}, "basis is 3"),
        ({"rtol": 0.0}, "rtol is 0.0"),
        ({"max_products": 5}, "max_products is 5"),
        ({"initial": torch.zeros(1, 20, dtype=F64)}, "initial has a column"),
    ],
)
def test_bad_input(options: dict, word: str) -> None:
    k = options.pop("k", 3)
    with pytest.raises(ValueError, match=word):
        lanczos(lambda v: v, drawing(20), k, **options)


def test_a_product_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="NaN"):
        lanczos(lambda v: v * torch.nan, drawing(20), 3)
