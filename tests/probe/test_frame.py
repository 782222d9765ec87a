"""What all probes stand on: closures, seeded vectors, the journal, intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llqr_mf.operators import from_function
from small_models import mlp, normal
from torch import Tensor

import llqr_mf as lq
from llqr_mf.probe.draws import draw
from llqr_mf.probe.estimate import Estimate
from llqr_mf.probe.journal import Journal
from llqr_mf.probe.probed import Probed

F64 = torch.float64


def symmetric(n: int, seed: int = 0) -> Tensor:
    half = normal(n, n, seed=seed)
    return half + half.mT


# ---- closures


@pytest.mark.parametrize("rows", [False, True])
def test_a_function_that_uses_its_memory_again(rows: bool) -> None:
    A = symmetric(12)
    kept = torch.empty(0, dtype=F64)

    def product(v: Tensor) -> Tensor:
        kept.resize_(0)
        return torch.matmul(v, A, out=kept)

    operator = from_function(product, 12, dtype=F64, rows=rows, columns=2)
    v = normal(12, 5)
    torch.testing.assert_close(operator @ v, A @ v)
    torch.testing.assert_close(operator.to_dense(), A)


def test_a_product_by_double_backward() -> None:
    """As people write it: the loss and its graph inside, whatever the caller's grad mode."""
    model, x, y = mlp(3, 4, 2), normal(6, 3), normal(6, 2, seed=1)
    parameters = list(model.parameters())
    size = sum(p.numel() for p in parameters)

    def product(v: Tensor) -> Tensor:
        loss = (model(x) - y).square().mean()
        flat = torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)]
        )
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(flat @ v, parameters)])

    theirs = from_function(product, size, dtype=F64)
    ours = lq.LQRProblem.from_network(
        lq.split(model), x, y, loss="mse", metric="newton", damping=0.0
    )
    top = lq.probe.eigenvalues(theirs, 2, rtol=1e-8)
    torch.testing.assert_close(top.values, lq.probe.eigenvalues(ours, 2, rtol=1e-8).values)
    assert float(lq.probe.trace(theirs, products=size)) == pytest.approx(
        float(ours.hessian.to_dense().trace())
    )
    assert not (theirs @ torch.ones(size, dtype=F64)).requires_grad
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize("wrong", [lambda v: v[1:], lambda v: v.float()])
def test_a_function_that_does_not_fit(wrong: Any) -> None:
    with pytest.raises(ValueError, match="rows=True"):
        from_function(wrong, 4, dtype=F64) @ torch.ones(4, dtype=F64)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace", "xnystrace"])
def test_products_that_are_not_finite_are_refused(method: str) -> None:
    def product(v: Tensor) -> Tensor:
        return torch.where(torch.arange(len(v)) == 3, torch.nan, v)

    operator = from_function(product, 40, dtype=F64)
    with pytest.raises(ValueError, match="NaN or infinity"):
        lq.probe.trace(operator, products=12, method=method)
    with pytest.raises(ValueError, match="NaN or infinity"):
        lq.probe.diagonal(operator, products=12)
    with pytest.raises(ValueError, match="NaN or infinity"):
        lq.probe.frobenius_norm(operator, products=12)
    with pytest.raises(ValueError, match="NaN or infinity"):
        lq.probe.eigenvalues(operator, 2)


# ---- vectors


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "spherical"])
def test_vectors_have_unit_covariance_and_their_own_seeds(kind: Any) -> None:
    proto = torch.empty(0, dtype=F64)
    z = draw(kind, 5, range(20_000), 3, proto)
    # Entries of the sample covariance deviate by sqrt(2 / 20000) at most: four of that.
    assert float((z.mT @ z / len(z) - torch.eye(5)).abs().max()) < 0.04
    assert float(z.mean(0).abs().max()) < 0.03
    assert torch.equal(z[7:9], draw(kind, 5, range(7, 9), 3, proto))
    assert not torch.equal(z[:2], draw(kind, 5, range(2), 4, proto))
    if kind == "spherical":
        torch.testing.assert_close(z.square().sum(1), torch.full((20_000,), 5.0, dtype=F64))


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    lq.probe.trace(symmetric(30), products=10)
    lq.probe.eigenvalues(symmetric(30), 2)
    lq.probe.spectral_density(symmetric(30), vectors=2, steps=4)
    assert torch.equal(before, torch.get_rng_state())


# ---- the journal


def problem(damping: float, scale: float = 1.0) -> lq.LQRProblem:
    model = mlp(3, 4, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return lq.LQRProblem.from_network(
        lq.split(model), normal(6, 3), normal(6, 2, seed=1), loss="mse", damping=damping
    )


@pytest.mark.parametrize("other", [problem(2e-6), problem(1e-6, 1 + 1e-9)])
def test_another_operator_is_noticed_however_close(other: lq.LQRProblem, tmp_path: Path) -> None:
    asked = {"products": 8, "method": "hutchinson", "checkpoint": tmp_path / "kept"}
    first = lq.probe.trace(problem(1e-6), **asked)
    assert torch.equal(lq.probe.trace(problem(1e-6), **asked).value, first.value)
    with pytest.raises(ValueError, match="another"):
        lq.probe.trace(other, **asked)


def test_what_a_path_may_be(tmp_path: Path) -> None:
    A, asked = symmetric(30), {"products": 8, "method": "hutchinson"}
    deep = tmp_path / "not" / "there" / "yet"
    lq.probe.trace(A, checkpoint=deep, **asked)
    assert (deep / "header.pt").exists() and not list(deep.glob("*.new"))
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(ValueError, match="holds no computation"):
        lq.probe.trace(A, checkpoint=file, **asked)
    assert file.read_text() == "mine"
    with pytest.raises(ValueError, match="holds no computation"):
        lq.probe.trace(A, checkpoint=tmp_path, **asked)


def test_the_journal_says_which_option_differs(tmp_path: Path) -> None:
    A, asked = symmetric(30), {"products": 8, "method": "hutchinson"}
    lq.probe.trace(A, checkpoint=tmp_path / "t", **asked)
    with pytest.raises(ValueError, match=r"'seed': 0.*'seed': 5"):
        lq.probe.trace(A, seed=5, checkpoint=tmp_path / "t", **asked)


def test_a_part_is_written_without_what_it_is_a_view_of(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", {}, torch.zeros(1))
    journal.put("state", (torch.zeros(1000, 1000)[:2],))
    assert (tmp_path / "j" / "state.pt").stat().st_size < 20_000
    (found,) = journal.get("state") or ()
    assert found.shape == (2, 1000)
    assert journal.get("nothing") is None


def test_each_chunk_is_a_file_and_none_is_made_twice(tmp_path: Path) -> None:
    A, calls = symmetric(20), []

    def product(v: Tensor) -> Tensor:
        calls.append(len(v))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return v @ A

    operator = from_function(product, 20, dtype=F64, rows=True)
    asked = {"products": 8, "method": "hutchinson", "columns": 2, "checkpoint": tmp_path / "t"}
    with pytest.raises(KeyboardInterrupt):
        lq.probe.trace(operator, **asked)
    # The fingerprint and four chunks, of which the last was cut off.
    made = lq.probe.trace(operator, **asked)
    assert calls == [1, 2, 2, 2, 2, 1, 2] and made.products == 8
    whole = lq.probe.trace(operator, **{**asked, "checkpoint": None})
    assert torch.equal(made.value, whole.value)


# ---- options


def test_bad_options() -> None:
    A = symmetric(6)
    with pytest.raises(ValueError, match="seed"):
        Probed(A, seed=-1)
    with pytest.raises(ValueError, match="columns"):
        Probed(A, seed=0, columns=0)
    with pytest.raises(ValueError, match="probes"):
        Probed(A, seed=0, probes="cauchy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="symmetric"):
        Probed(normal(4, 4), seed=0)
    with pytest.raises(ValueError, match="square"):
        Probed(torch.zeros(0, 0), seed=0)
    with pytest.raises(ValueError, match="floating"):
        Probed(torch.ones(3, 3, dtype=torch.int64), seed=0)
    with pytest.raises(TypeError, match="from_function"):
        Probed(lambda v: v, seed=0)  # type: ignore[arg-type]


def test_intervals_and_plain_numbers() -> None:
    made = Estimate(torch.tensor(2.0).double(), torch.tensor(0.5).double(), 4, 4, 0, "m", 0.25)
    low, high = made.interval(0.9)
    # Student's t with 3 degrees of freedom: 2.3534.
    assert float(low) == pytest.approx(2 - 2.3534 * 0.5 - 0.25, abs=1e-4)
    assert float(high) == pytest.approx(2 + 2.3534 * 0.5 + 0.25, abs=1e-4)
    with pytest.raises(ValueError, match="level"):
        made.interval(95)
    nan = torch.tensor([torch.nan, 1.0]).double()
    assert Estimate(nan, nan, 1, 1, 0, "m").to_dict()["standard_error"] == [None, 1.0]
