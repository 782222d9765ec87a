"""Lanczos and Gauss rules against dense spectra."""

from __future__ import annotations

import math

import pytest
import torch
from linear_operator.operators import DiagLinearOperator
from llqr_mf.operators.from_function import from_function
from llqr_mf.solvers.product import CountedProduct
from llqr_mf.solvers.quadrature import (
    Tridiagonals,
    bracket,
    gauss,
    gauss_radau,
    tridiagonalize,
    values_on,
)
from memory import LiveBytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

F64 = torch.float64
EPS = torch.finfo(F64).eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    a = (q * values) @ q.mT
    return (a + a.mT) / 2


def forms(a: Tensor, rows: Tensor, function) -> Tensor:
    """z'f(A)z by eigh."""
    values, q = torch.linalg.eigh(a)
    return ((rows @ q).square() * function(values)).sum(1)


def run(a: Tensor, rows: Tensor, steps: int, **options) -> Tridiagonals:
    return tridiagonalize(lambda v: v @ a, rows.clone(), steps, **options)


SPECTRA = {
    "even": torch.linspace(0.5, 2, 40, dtype=F64),
    "log": torch.logspace(-3, 1, 40, dtype=F64),
    "a floor of many": torch.cat([torch.full((30,), 1e-3, dtype=F64), torch.arange(1.0, 11)]),
    "indefinite": torch.linspace(-3, 5, 40, dtype=F64),
}
POSITIVE = ["even", "log", "a floor of many"]


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_gauss_rules_are_exact_to_degree_2m_minus_1(name: str, steps: int) -> None:
    values = SPECTRA[name]
    a, rows = with_spectrum(values), normal(3, len(values), seed=1)
    made = run(a, rows, steps)
    assert made.diagonal.shape == (3, steps) and made.off.shape == (3, steps - 1)
    nodes, weights = made.rule()
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=F64))
    torch.testing.assert_close(made.square, rows.square().sum(1))
    top = float(values.abs().max())
    for degree in range(2 * steps + 1):
        rule = (weights * (nodes / top) ** degree).sum(1) * made.square
        exact = forms(a, rows, lambda x, k=degree: (x / top) ** k)
        error = ((rule - exact).abs() / made.square).max()
        if degree < 2 * steps:
            # All terms are at most 1; a dozen roundings of T each.
            assert error < 100 * EPS
        else:
            assert error > 1e-9, "the next degree is not exact"


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_one_start_at_a_time_and_all_together(reorthogonalize: bool) -> None:
    a, rows = with_spectrum(SPECTRA["log"]), normal(4, 40, seed=1)
    together = run(a, rows, 12, reorthogonalize=reorthogonalize)
    for j in range(4):
        alone = run(a, rows[j : j + 1], 12, reorthogonalize=reorthogonalize)
        torch.testing.assert_close(together.diagonal[j], alone.diagonal[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(together.off[j], alone.off[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(together.coupling[j], alone.coupling[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [40, 60])
def test_all_steps_give_all_of_it(steps: int) -> None:
    """e_1'f(T)e_1 is u'f(A)u, and T has the spectrum of A."""
    values = SPECTRA["even"]
    a, rows = with_spectrum(values), normal(3, 40, seed=1)
    made = run(a, rows, steps)
    assert made.diagonal.shape == (3, 40)
    for function in (torch.log, torch.sin, torch.reciprocal):
        value, error = made.form(function)
        torch.testing.assert_close(value, forms(a, rows, function), rtol=1e-11, atol=0)
        assert bool((error == 0).all()), "the space is invariant"
    nodes = gauss(made.diagonal, made.off)[0]
    torch.testing.assert_close(nodes, values.expand(3, -1), rtol=1e-11, atol=0)


def test_re_orthogonalisation_keeps_t_true_after_convergence() -> None:
    """An outlier converges in a few steps; without the basis its copies come back."""
    values = torch.cat([torch.linspace(0, 1, 99, dtype=F64), torch.tensor([100.0], dtype=F64)])
    a, rows = with_spectrum(values), normal(2, 100, seed=1)
    kept, lost = (run(a, rows, 60, reorthogonalize=x).rule() for x in (True, False))
    assert ((kept[0] - 100).abs() < 1e-9).sum(1).tolist() == [1, 1]
    assert ((lost[0] - 100).abs() < 1e-9).sum(1).min() >= 2
    # The copies share the weight of the one.
    share = [(w * ((x - 100).abs() < 1e-9)).sum(1) for x, w in (kept, lost)]
    torch.testing.assert_close(share[0], share[1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_breakdown_is_relative_and_by_start(reorthogonalize: bool, scale: float) -> None:
    """A start in an invariant subspace ends; one beside it goes on."""
    values = scale * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8], dtype=F64)
    rows = torch.zeros(4, 8, dtype=F64)
    rows[0, 4] = 3.0
    rows[1, :3] = 1.0
    rows[2] = 1.0
    rows[3, 5:7] = 1.0
    a = values.diag()
    made = run(a, rows, 6, reorthogonalize=reorthogonalize)
    assert (made.coupling == 0).tolist() == [True, True, False, True]
    assert [int((own != 0).sum()) for own in made.off] == [0, 2, 5, 1]
    assert bool(made.diagonal.isfinite().all())
    for f in (torch.log, lambda x: x):
        value, error = made.form(f)
        exact = forms(a, rows, f)
        torch.testing.assert_close(value[[0, 1, 3]], exact[[0, 1, 3]], rtol=1e-12, atol=0)
        assert error[0] == 0 and error[1] == 0 and error[3] == 0
    nodes = made.rule()[0]
    assert nodes.min() >= 0.999 * scale and nodes.max() <= 8.001 * scale


def test_all_starts_break_down() -> None:
    rows = torch.eye(5, dtype=F64)[:2]
    times = CountedProduct(lambda v: v * torch.arange(5.0, dtype=F64))
    made = tridiagonalize(times, rows.clone(), 4)
    assert times.vectors == 2 and bool((made.coupling == 0).all())
    torch.testing.assert_close(made.form(lambda x: x)[0], torch.tensor([0.0, 1.0], dtype=F64))
    zero = tridiagonalize(lambda v: 0 * v, rows.clone(), 4)
    assert bool((zero.coupling == 0).all()) and bool((zero.diagonal == 0).all())
    for lower in (None, 0.0):
        value, error = zero.form(torch.sqrt, lower=lower)
        assert value.tolist() == error.tolist() == [0, 0]


# ---- Gauss-Radau


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("end", ["lower", "upper"])
@pytest.mark.parametrize("steps", [2, 3, 6, 10])
def test_radau_has_its_node_and_degree(name: str, end: str, steps: int) -> None:
    values = SPECTRA[name]
    a, rows = with_spectrum(values), normal(3, len(values), seed=2)
    made = run(a, rows, steps)
    node = float(values.min() / 2) if end == "lower" else float(values.max() * 1.5)
    nodes, weights = gauss_radau(made.diagonal, made.off, node)
    assert nodes.shape == (3, steps)
    at = nodes[:, 0 if end == "lower" else -1]
    torch.testing.assert_close(at, torch.full_like(at, node), rtol=0, atol=1e-11)
    top = float(values.max())
    for degree in range(2 * steps - 1):
        rule = (weights * (nodes / top) ** degree).sum(1) * made.square
        exact = forms(a, rows, lambda x, k=degree: (x / top) ** k)
        # The node is moved by 200 roundings, and of a power of it by as many times the degree.
        bound = 400 * (degree + 1) * 1.5**degree * EPS
        assert ((rule - exact).abs() / made.square).max() < bound


FUNCTIONS = {
    "log": torch.log,
    "inverse": torch.reciprocal,
    "share": lambda x: x / (x + 0.01),
    "root": torch.sqrt,
    "decay": lambda x: torch.exp(-x),
}


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("tight", [True, False])
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_the_two_rules_bracket(
    name: str, function: str, tight: bool, reorthogonalize: bool
) -> None:
    """Always, with a bound on an eigenvalue (a damped curvature) as with one below."""
    values, f = SPECTRA[name], FUNCTIONS[function]
    lower = float(values.min()) * (1 if tight else 0.3)
    a, rows = with_spectrum(values), normal(8, len(values), seed=3)
    exact = forms(a, rows, f)
    before = float("inf")
    for steps in (1, 2, 4, 8, 16, 32, 40):
        made = run(a, rows, steps, reorthogonalize=reorthogonalize)
        value, error = made.form(f, lower=lower)
        # T is right to its rounding, which f turns into |f'| <= max |f'| of it.
        slack = 1000 * EPS * float(values.max()) * made.square * _slope(f, lower)
        assert bool(((value - exact).abs() <= error + slack).all()), steps
        assert error.sum() <= before * 1.0001 + slack.sum()
        before = float(error.sum())
        # One half of the bracket is Gauss: on the side that the derivatives say.
        plain = made.form(f)[0]
        torch.testing.assert_close((plain - value).abs(), error, rtol=1e-6, atol=float(slack.max()))
    if reorthogonalize:
        assert bool((error <= slack).all()), "no step is left"


def _slope(f, at: float) -> float:
    x = torch.tensor(at, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(f(x), x)
    return float(slope.abs())


def test_a_radau_node_without_coupling() -> None:
    """From a T alone, as CG leaves it: the last entry is given up."""
    values = SPECTRA["log"]
    a, rows = with_spectrum(values), normal(1, 40, seed=4)
    exact = forms(a, rows, torch.log)[0]
    for steps in (1, 2, 5, 10, 20):
        made = run(a, rows, steps)
        value, error = bracket(made.diagonal[0], made.off[0], torch.log, lower=5e-4)
        assert abs(value * made.square[0] - exact) <= error * made.square[0]


@pytest.mark.parametrize("name", POSITIVE)
def test_a_coupling_says_how_much_is_left(name: str) -> None:
    """Zero leaves nothing, twice the right one a bound, and an unknown one the most."""
    values = SPECTRA[name]
    a, rows = with_spectrum(values), normal(1, 40, seed=4)
    exact, lower = forms(a, rows, torch.log)[0], float(values.min()) / 2
    for steps in (1, 2, 5):
        made = run(a, rows, steps)
        t, square = (made.diagonal[0], made.off[0]), made.square[0]
        before = -1.0
        for factor in (0.0, 1.0, 2.0):
            coupling = factor * made.coupling[0]
            value, error = bracket(*t, torch.log, lower=lower, coupling=coupling)
            assert error > before or factor == 0
            if factor == 0:
                assert error < 1e-10
            else:
                assert abs(value * square - exact) <= error * square * (1 + 1e-9)
            before = float(error)
        assert before < bracket(*t, torch.log, lower=lower)[1] * (1 + 1e-9)


def test_one_step_alone_claims_nothing() -> None:
    one, none = torch.tensor([2.0], dtype=F64), torch.zeros(0, dtype=F64)
    assert bracket(one, none, torch.log)[1] == torch.inf
    for coupling, error in ((1.0, math.inf), (1e-2, math.inf), (1e-4, 1.25e-9), (0.0, 0.0)):
        made = bracket(one, none, torch.log, coupling=torch.tensor(coupling, dtype=F64))
        # f'' c^2 / 2 = (c / 2)^2 / 2.
        assert made[0] == math.log(2) and float(made[1]) == pytest.approx(error, rel=1e-4)


def test_a_bound_inside_the_spectrum_is_refused() -> None:
    values = SPECTRA["even"]
    made = run(with_spectrum(values), normal(2, 40), 10)
    with pytest.raises(ValueError, match="no bound of the spectrum"):
        made.form(torch.log, lower=1.0)
    with pytest.raises(ValueError, match="no bound"):
        gauss_radau(made.diagonal, made.off, 1.0)


# ---- dtypes, memory, synchronisations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_narrow_products(dtype: torch.dtype, reorthogonalize: bool) -> None:
    values = SPECTRA["even"]
    a, rows = with_spectrum(values).to(dtype), normal(3, 40, seed=1).to(dtype)
    made = tridiagonalize(lambda v: v @ a, rows.clone(), 10, reorthogonalize=reorthogonalize)
    assert made.diagonal.dtype == torch.float64
    value, error = made.form(torch.log, lower=0.4)
    exact = forms(a.double(), rows.double(), torch.log)
    # An error of T by a few roundings of |A| = 2, where |f'| <= 2; sums over 40 products.
    slack = 10 * torch.finfo(dtype).eps * 4 * made.square
    assert bool(((value - exact).abs() <= error + slack).all())


def test_a_function_that_gives_back_what_it_got_or_its_own_buffer() -> None:
    same = tridiagonalize(lambda v: v, normal(2, 5), 3)
    assert bool((same.coupling == 0).all()) and same.diagonal[0, 0] == pytest.approx(1)
    a, buffer = with_spectrum(SPECTRA["log"]), torch.empty(2, 40, dtype=F64)
    rows = normal(2, 40)
    own = tridiagonalize(lambda v: torch.mm(v, a, out=buffer), rows.clone(), 6)
    torch.testing.assert_close(own.diagonal, run(a, rows, 6).diagonal)


@pytest.mark.parametrize(("reorthogonalize", "blocks"), [(True, 8 + 3), (False, 3)])
def test_memory_at_four_million(reorthogonalize: bool, blocks: int) -> None:
    n, c, steps = 4_000_000, 1, 8
    operator = DiagLinearOperator(torch.linspace(1, 2, n))
    rows = torch.ones(c, n)
    with LiveBytes() as memory:
        tridiagonalize(operator, rows, steps, reorthogonalize=reorthogonalize)
    # The start itself is one of the three; a product makes one more.
    assert memory.peak <= 1.01 * blocks * 4 * n * c
    assert memory.largest <= 1.01 * 4 * n * c * (steps if reorthogonalize else 1)


class Reads(TorchDispatchMode):
    """Counts reads of the device by `bool`, `int`, `float` and `item`."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_one_product_and_one_read_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    times = CountedProduct(lambda v: v * torch.arange(1.0, 31, dtype=F64))
    lists, plain = [], Tensor.tolist

    def counted(self: Tensor):
        lists.append(1)
        return plain(self)

    monkeypatch.setattr(Tensor, "tolist", counted)
    counts = []
    for steps in (4, 14):
        times.vectors = 0
        lists.clear()
        with Reads() as reads:
            tridiagonalize(times, normal(3, 30), steps)
        assert times.vectors == 3 * steps
        counts.append(reads.count + len(lists))
    assert counts[1] - counts[0] == 10


# ---- bad input


def test_bad_input() -> None:
    a = with_spectrum(SPECTRA["even"])
    with pytest.raises(ValueError, match="rows have shape"):
        tridiagonalize(lambda v: v, normal(5), 3)
    with pytest.raises(ValueError, match="steps is 0"):
        run(a, normal(1, 40), 0)
    for bad in (0.0, torch.nan, torch.inf):
        rows = normal(2, 40)
        rows[1] = bad
        with pytest.raises(ValueError, match="start is zero"):
            run(a, rows, 3)
    with pytest.raises(ValueError, match="product with the operator gave NaN"):
        tridiagonalize(lambda v: v * torch.inf, normal(2, 40), 3)
    with pytest.raises(ValueError, match="one vector per row"):
        tridiagonalize(lambda v: v[:, :3], normal(2, 40), 3)
    with pytest.raises(ValueError, match="not finite at -1"):
        values_on(torch.tensor([1.0, -1.0], dtype=F64), torch.log)
    with pytest.raises(ValueError, match="entry by entry"):
        values_on(torch.ones(3, dtype=F64), torch.sum)
    columns = from_function(lambda v: v[:3], 40, dtype=F64)
    with pytest.raises(ValueError, match=r"must map \(n,\)"):
        tridiagonalize(columns, normal(2, 40), 3)
