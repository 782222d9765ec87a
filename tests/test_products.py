"""CG's products run in other ways, and CG with a smaller batch's exact inverse."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from llqr_mf.operators.compiled import compiled
from small_models import mlp, network, normal, relative
from torch import nn

import llqr_mf as lq

KRYLOV = importlib.import_module("llqr_mf.methods.krylov")


def build(name="mlp", dtype=torch.float32, **options):
    model, inputs, targets = network(name)
    options = {"loss": "cross_entropy", "damping": 0.05} | options
    return lq.LQRProblem.from_network(
        lq.split(model.to(dtype)), inputs.to(dtype), targets, **options
    )


def test_low_precision_is_refined_to_the_exact_residual():
    problem = build()
    plain = lq.solve(problem, "cg", rtol=1e-5)
    solution = lq.solve(problem, products="bf16", rtol=1e-5)
    assert solution.method == "cg" and solution.residual_norm <= 1e-5
    assert "products in bf16" in solution.status.message
    assert relative(solution.step, plain.step) < 1e-3


def test_compiled_products(monkeypatch):
    """The default backend takes half a minute; test_compiled.py has a case of it."""
    monkeypatch.setattr(KRYLOV, "compiled", functools.partial(compiled, backend="aot_eager"))
    problem = build(dtype=torch.float64)
    solution = lq.solve(problem, products="compiled", rtol=1e-10)
    assert relative(solution.step, lq.solve(problem, "cg", rtol=1e-10).step) < 1e-8


def test_where_the_vectors_live_changes_nothing():
    problem = build()
    here = lq.solve(problem, "cg")
    there = lq.solve(problem, vector_device="cpu")
    assert torch.equal(here.step, there.step)


def test_products_that_do_not_apply_are_said():
    problem = build()
    streamed = lq.StreamedProblem(
        lq.split(mlp(4, 5, 3, dtype=torch.float32)),
        [(torch.randn(6, 4), torch.arange(6) % 3)],
        loss="cross_entropy",
    )
    for where, options, words in (
        (problem, {"products": "fp8"}, "choose one of"),
        (problem, {"products": "tf32"}, "products='bf16'"),
        (problem, {"products": "bf16", "radius": 1.0}, "`radius` does not go with"),
        (problem, {"products": "bf16", "method": "dual"}, "`products` does not go with"),
        (problem, {"products": "graphed"}, "CUDA|cuda"),
        (streamed, {"products": "compiled"}, "StreamedProblem"),
        (streamed, {"products": "bf16"}, "StreamedProblem"),
    ):
        with pytest.raises(ValueError, match=words):
            lq.solve(where, **options)


def digits(samples: int, model: nn.Module, damping: float) -> lq.LQRProblem:
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data[:samples] / 16, dtype=torch.float64)
    y = torch.tensor(data.target[:samples])
    return lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy", damping=damping)


def test_a_sub_samples_inverse_saves_iterations():
    pytest.importorskip("sklearn")
    model = mlp(64, 48, 10)
    whole, part = digits(1200, model, 1e-3), digits(300, model, 1e-3)
    M = lq.preconditioners.SubsampledDual(part)
    v = normal(part.size, 2, seed=1)
    assert relative(part.hessian @ (M @ v), v) < 1e-8
    plain = lq.solve(whole, "cg", rtol=1e-8)
    helped = lq.solve(whole, "cg", rtol=1e-8, preconditioner=M)
    assert relative(helped.step, plain.step) < 1e-5
    assert helped.iterations < plain.iterations / 2


def test_a_sketch_of_the_gram_matrix_saves_iterations(monkeypatch):
    pytest.importorskip("sklearn")
    factors = importlib.import_module("llqr_mf.factors")
    sketch = importlib.import_module("llqr_mf.gram_matrix")
    monkeypatch.setattr(factors, "DUAL_SIZE", 1000)
    problem = digits(600, mlp(64, 48, 10), 1e-4)
    exact = lq.solve(problem, "cg", rtol=1e-9, max_iterations=2000)
    found = {}
    for columns in (0, 600):
        monkeypatch.setattr(sketch, "NYSTROM_COLUMNS", columns)
        for rhs in (None, -problem.gradient):
            found[columns] = lq.solve(problem, "dual", rtol=1e-9, rhs=rhs)
            assert found[columns].status.ok, str(found[columns].status)
            assert relative(found[columns].step, exact.step) < 1e-5
    assert "sketch of 600 columns" in found[600].status.message
    assert found[600].iterations < found[0].iterations / 3
