"""Preconditioners side by side: where the answer is known in closed form."""

from __future__ import annotations

import json
import math

import pytest
import torch
from linear_operator.operators import DenseLinearOperator
from small_models import mlp, normal

import llqr_mf as lq
from llqr_mf.preconditioners import Diagonal, Identity, Kronecker
from llqr_mf.probe import compare

LAYERS = lq.split(mlp(3, 4, 3))


def problem(seed: int, dtype: torch.dtype = torch.float64, **options) -> lq.LQRProblem:
    layers = LAYERS if dtype == torch.float64 else lq.split(mlp(3, 4, 3, dtype=dtype))
    x, y = normal(6, 3, seed=seed, dtype=dtype), torch.arange(6) * (seed + 2) % 3
    options = {"loss": "cross_entropy", "damping": 0.1, **options}
    return lq.LQRProblem.from_network(layers, x, y, **options)


def test_the_exact_inverse_is_exact() -> None:
    one = problem(0)
    inverse = torch.linalg.inv(one.hessian.to_dense())
    table = compare(
        one,
        {
            "operator": DenseLinearOperator(inverse),
            "matrix": inverse,
            "function": lambda rows: rows @ inverse,
            "half": inverse / 2,
        },
        rtol=1e-12,
    )
    for name in ("operator", "matrix", "function"):
        row = table[name]
        # The exact step has a residual of 1e-12.
        assert row.fraction == pytest.approx(1, abs=1e-10)
        assert row.best_fraction == pytest.approx(1, abs=1e-10)
        assert row.multiple == pytest.approx(1, abs=1e-10)
        assert row.cosine == pytest.approx(1, abs=1e-10)
        assert row.falls and row.state_bytes is None
    assert table["half"].fraction == pytest.approx(0.75, abs=1e-10)
    assert table["half"].best_fraction == pytest.approx(1, abs=1e-10)
    assert table["half"].multiple == pytest.approx(2, abs=1e-10)
    assert table.optimum == pytest.approx(-float(one.gradient @ inverse @ one.gradient) / 2)


def test_a_multiple_of_the_identity_in_closed_form() -> None:
    problems = [problem(0), problem(1), problem(2)]
    M = Diagonal(problems[0])
    M.scale_(50.0)
    table = compare(problems, {"id": None, "I": Identity(problems[0]), "50": M}, rtol=1e-12)
    slope, bend, optimum, cosine = 0.0, 0.0, 0.0, 0.0
    for each in problems:
        g, H = each.gradient, each.hessian.to_dense()
        u = torch.linalg.solve(H, g)
        slope += float(g @ g) / 3
        bend += float(g @ H @ g) / 3
        optimum -= float(g @ u) / 6
        cosine += float(g @ u / (g.norm() * u.norm())) / 3
    for name, c in (("id", 1.0), ("I", 1.0), ("50", 50.0)):
        row = table[name]
        J = c * c * bend / 2 - c * slope
        assert row.fraction == pytest.approx(J / optimum, rel=1e-9)
        assert row.best_fraction == pytest.approx(-(slope**2) / (2 * bend) / optimum, rel=1e-9)
        assert row.multiple == pytest.approx(slope / bend / c, rel=1e-9)
        assert row.cosine == pytest.approx(cosine, rel=1e-9)
        assert row.falls == (J < 0)
    assert not table["50"].falls and table["50"].state_bytes == 31 * 8
    assert table.problems == 3


def test_an_indefinite_m_is_shown_as_it_is() -> None:
    one = problem(0)
    table = compare(one, {"up": -torch.eye(31, dtype=torch.float64), "zero": lambda v: 0 * v})
    assert table["up"].fraction < 0 and not table["up"].falls
    assert table["up"].multiple < 0 and table["up"].cosine < 0
    assert math.isnan(table["zero"].multiple) and math.isnan(table["zero"].cosine)
    json.dumps(table.to_dict(), allow_nan=False)
    assert "-" in str(table)


def test_it_solves_every_problem_once(monkeypatch) -> None:
    calls = []
    solve = lq.solve

    def counted(*args, **kwargs):
        calls.append(1)
        return solve(*args, **kwargs)

    monkeypatch.setattr("llqr_mf.fitting.measure.solve", counted)
    problems = [problem(0), problem(1)]
    candidates = {str(i): None for i in range(5)}
    table = compare(problems, candidates)
    assert len(calls) == 2
    solved = sum(solve(each).products for each in problems)
    assert table.products == solved + 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_and_streamed_problems(dtype) -> None:
    wide = compare(problem(0), {"k": Kronecker(problem(0))})["k"]
    one = problem(0, dtype)
    row = compare(one, {"k": Kronecker(one)})["k"]
    assert row.fraction == pytest.approx(wide.fraction, rel=1e-4 if dtype.itemsize == 4 else 0.2)
    chunks = lq.StreamedProblem.chunks(normal(6, 3), torch.arange(6) * 2 % 3, 3)
    streamed = lq.StreamedProblem(LAYERS, chunks, loss="cross_entropy", damping=0.1)
    row = compare(streamed, {"k": Kronecker(streamed)})["k"]
    assert row.fraction == pytest.approx(wide.fraction, rel=1e-5)


def test_the_table_and_json() -> None:
    table = compare(
        [problem(0), problem(1)], {"a long name of something": None, "D": Diagonal(problem(0))}
    )
    text = str(table)
    assert "a long name of something" in text and "fraction" in text and "2 problem" in text
    assert len({len(line) for line in text.splitlines()[1:]}) == 1
    back = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    assert [row["name"] for row in back["rows"]] == ["a long name of something", "D"]
    assert back["rows"][1]["state_bytes"] == 31 * 8
    with pytest.raises(KeyError, match="not compared"):
        table["E"]


def test_what_does_not_fit_is_named() -> None:
    one = problem(0)
    with pytest.raises(ValueError, match="at least one"):
        compare([], {"id": None})
    with pytest.raises(ValueError, match="at least one"):
        compare(one, {})
    with pytest.raises(ValueError, match="'M' has shape"):
        compare(one, {"M": torch.eye(3, dtype=torch.float64)})
    with pytest.raises(ValueError, match="other parameters"):
        compare(one, {"M": Diagonal({"x": torch.zeros(31, dtype=torch.float64)})})
    with pytest.raises(ValueError, match="'M' is a str"):
        compare(one, {"M": "kfac"})
    with pytest.raises(ValueError, match="rows of shape"):
        compare(one, {"M": lambda v: v[:, :3]})
    flat = lq.LQRProblem(
        A=[torch.eye(2)], B=[torch.zeros(2, 3)], R=[torch.eye(3)], r=[torch.zeros(3)]
    )
    with pytest.raises(ValueError, match="no exact step"):
        compare(flat, {"id": None})
