"""The low-rank preconditioner of the dual, against dense solves and in what it spares CG."""

from __future__ import annotations

import pytest
import torch
from llqr_mf.solvers import nystrom
from llqr_mf.solvers.cg import cg
from llqr_mf.solvers.dual import Dual
from llqr_mf.solvers.nystrom import Nystrom, diagonal_choice, uniform_choice
from torch import Tensor, nn

import llqr_mf as lq
from llqr_mf.gram import cross_gram, gram_diagonal
from llqr_mf.output_sweep import terminal_factor


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seed(sum(shape)))


def positive(n: int, rank: int, largest: float = 1.0) -> Tensor:
    q, _ = torch.linalg.qr(normal(n, rank))
    return (q * largest * 10 ** -torch.linspace(0, 4, rank, dtype=torch.float64)) @ q.mT


def dense_inverse(G: Tensor, chosen: Tensor, shift: float) -> Tensor:
    """Of I + C (W + shift)^{-1} C'."""
    C, eye = G[:, chosen], torch.eye(len(G), dtype=torch.float64)
    core = G[chosen][:, chosen] + shift * eye[: len(chosen), : len(chosen)]
    return torch.linalg.inv(eye + C @ torch.linalg.solve(core, C.mT))


@pytest.fixture(params=["whole", "chunks"])
def chunks(request, monkeypatch):
    if request.param == "chunks":
        monkeypatch.setattr(nystrom, "CHUNK_ELEMENTS", 50)


@pytest.mark.usefixtures("chunks")
def test_the_dense_inverse():
    G, chosen, y = positive(30, 30), torch.tensor([4, 0, 29, 17, 8, 11, 12]), normal(3, 30)
    M = Nystrom.of(G[:, chosen], chosen)
    before = y.clone()
    torch.testing.assert_close(M(y), y @ dense_inverse(G, chosen, M.shift), rtol=1e-9, atol=1e-12)
    assert torch.equal(y, before)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("count", [5, 12])
def test_all_of_a_low_rank_matrix(count):
    """As many columns as the rank are enough; more make W singular."""
    G, chosen, y = positive(30, 5, 1e3), uniform_choice(30, count, seed()), normal(2, 30)
    M = Nystrom.of(G[:, chosen], chosen)
    expected = torch.linalg.solve(G + torch.eye(30, dtype=torch.float64), y.mT).mT
    # Of eigenvalues from 1e3 to 0.1, a shift of 1e-13 loses 1e-12 of the least, at worst enlarged
    # by the condition of the 5 columns chosen.
    torch.testing.assert_close(M(y), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("largest", [1e2, 1e6, 1e10])
def test_float32_columns_keep_it_positive(largest):
    """Rounded columns, whose W is indefinite, of which float32 products would lose the sign."""
    G = positive(60, 20, largest)
    chosen = uniform_choice(60, 40, seed())
    M = Nystrom.of(G[:, chosen].float(), chosen)
    assert M.rows.dtype == torch.float32
    matrix = M(torch.eye(60, dtype=torch.float64))
    assert float((matrix - matrix.mT).abs().max()) < 1e-14 * 60
    # Eigenvalues from 1 / (1 + largest) to 1, to float64's rounding.
    values = torch.linalg.eigvalsh(matrix)
    assert values[0] > 0.5 / (1 + largest) and values[-1] < 1 + 1e-12
    assert M(torch.ones(1, 60)).dtype == torch.float32


def test_an_indefinite_block():
    """Of columns with a gross error: the shift grows until there is a Cholesky factor."""
    columns = normal(9, 2) / 100
    columns[:2] = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    M = Nystrom.of(columns, torch.arange(2))
    values = torch.linalg.eigvalsh(M(torch.eye(9, dtype=torch.float64)))
    assert M.shift > 2 and values[0] > 0 and values[-1] < 1 + 1e-12


def test_no_columns_and_zero_columns():
    y = normal(2, 9)
    none = torch.empty(0, dtype=torch.int64)
    assert torch.equal(Nystrom.of(torch.empty(9, 0, dtype=torch.float64), none)(y), y)
    zero = Nystrom.of(torch.zeros(9, 3, dtype=torch.float64), torch.arange(3))
    assert torch.equal(zero(y), y)


def test_bad_arguments():
    G, chosen = positive(9, 9), torch.arange(3)
    for wrong in (torch.arange(4), torch.tensor([1, 1, 2])):
        with pytest.raises(ValueError, match="one index for each column, and none twice"):
            Nystrom.of(G[:, :3], wrong)
    for columns in (-G[:, :3], G[:, :3] * torch.nan):
        with pytest.raises(ValueError, match="not finite, or negative on the diagonal"):
            Nystrom.of(columns, chosen)
    for value in (-1.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="give diag"):
            diagonal_choice(torch.tensor([1.0, value]), 1, seed())


# ---- choosing columns


def test_uniform_choice():
    chosen = uniform_choice(50, 20, seed(1))
    assert chosen.tolist() == sorted(set(chosen.tolist())) and len(chosen) == 20
    assert torch.equal(chosen, uniform_choice(50, 20, seed(1)))
    assert not torch.equal(chosen, uniform_choice(50, 20, seed(2)))
    assert torch.equal(uniform_choice(5, 9, seed()), torch.arange(5))


def test_diagonal_choice():
    """First draws in proportion, within 4 standard errors; never a zero; never one twice."""
    diagonal = torch.tensor([0.0, 1.0, 2.0, 0.0, 5.0])
    source = seed()
    first = torch.cat([diagonal_choice(diagonal, 1, source) for _ in range(4000)])
    share = first.bincount(minlength=5) / len(first)
    expected = diagonal / 8
    error = (expected * (1 - expected) / len(first)).sqrt()
    assert ((share - expected).abs() <= 4 * error).all()
    assert diagonal_choice(diagonal, 4, seed()).tolist() == [1, 2, 4]


# ---- what it spares CG


def digits_problem(samples: int, damping: float) -> lq.LQRProblem:
    """A small net after 30 steps of Adam on scikit-learn's digits."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(x[:samples]) / 16, torch.tensor(y[:samples])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy", damping=damping)


@pytest.mark.parametrize("damping", [1e-3, 1e-4])
@pytest.mark.parametrize("choice", ["uniform", "diagonal", "samples"])
def test_iterations_on_digits(damping, choice):
    """150 of 1500 columns: a third of the iterations, and the answer of a dense solve.

    On all 1797 images (17 970 unknowns, 64-64-64-10) 300 columns take 19 iterations where it was
    180, and 1000 take 7; with a damping of 1e-4 it is 48 and 12 for 462.
    """
    problem = digits_problem(150, damping)
    factor = terminal_factor(problem)
    size = factor.rank * factor.samples
    dual = Dual(problem.system, factor, None)
    h = dual._observe(problem.gradient.unsqueeze(0) / damping)[0]
    chosen = {
        "uniform": lambda: uniform_choice(size, 150, seed()),
        "diagonal": lambda: diagonal_choice(gram_diagonal(problem), 150, seed()),
        "samples": lambda: torch.arange(0, size, 10),
    }[choice]()
    M = Nystrom.of(cross_gram(problem, chosen), chosen)
    plain = cg(dual._matrix, h, rtol=1e-10, max_iterations=3000)
    helped = cg(dual._matrix, h, rtol=1e-10, max_iterations=3000, preconditioner=M)
    print(f"{choice}, damping {damping}: {plain.iterations} to {helped.iterations} iterations")
    assert helped.status.ok and 3 * helped.iterations <= plain.iterations
    G = cross_gram(problem, torch.arange(size))
    exact = torch.linalg.solve(G + torch.eye(size, dtype=torch.float64), h)
    # The condition of I + G is at most 1e7.
    assert float((helped.x - exact).norm() / exact.norm()) < 1e-3
