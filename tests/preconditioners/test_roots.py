"""Roots F F' = M, and spectra seen through them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_operator.operators import DiagLinearOperator
from networks import ZOO
from structure_cases import LAYOUTS, MAKERS, generator, randomise

import llqr_mf as lq
from llqr_mf.preconditioners import Layerwise, Structure
from llqr_mf.preconditioners.roots import inverse_root_of, logdet_of, root_of
from llqr_mf.probe.preconditioned import preconditioned

WITH_ROOT = sorted(set(MAKERS) - {"sum"})


def drawn(kind: str, like: Any) -> Structure:
    return randomise(MAKERS[kind](like), generator())


@pytest.mark.parametrize("layout", ["mlp", "conv", "mixed"])
@pytest.mark.parametrize("kind", WITH_ROOT)
def test_a_root_times_its_transpose_is_the_structure(kind: str, layout: str) -> None:
    M = drawn(kind, LAYOUTS[layout]())
    F, dense = M.root(), M.to_dense()
    eye = torch.eye(len(dense), dtype=dense.dtype)
    made = F @ (F.mT @ eye)
    torch.testing.assert_close(made, dense, rtol=1e-10, atol=1e-11 * float(dense.abs().max()))


@pytest.mark.parametrize("kind", ["kronecker", "low_rank", "direct_sum"])
def test_a_root_is_a_snapshot(kind: str) -> None:
    M = drawn(kind, LAYOUTS["mlp"]())
    F = M.root()
    before = F @ torch.ones(M.shape[0], 1, dtype=M.dtype)
    M.scale_(2.0)
    assert torch.equal(F @ torch.ones(M.shape[0], 1, dtype=M.dtype), before)


@pytest.mark.parametrize("kind", [k for k in WITH_ROOT if k != "identity"])
def test_the_preconditioned_spectrum(kind: str) -> None:
    model, inputs, targets, loss = ZOO["mlp"]()
    problem = lq.LQRProblem.from_network(lq.split(model), inputs, targets, loss=loss, damping=0.1)
    M = drawn(kind, model)
    seen = preconditioned(problem, M)
    dense, H = M.to_dense(), problem.hessian.to_dense()
    values, vectors = torch.linalg.eigh(dense)
    half = (vectors * values.sqrt()) @ vectors.mT
    expected = torch.linalg.eigvalsh(half @ H @ half)
    found = torch.linalg.eigvalsh(seen.to_dense())
    assert bool(((found - expected).abs() <= 1e-10 * expected.max()).all())


def test_a_dense_preconditioner_and_the_exact_inverse() -> None:
    model, inputs, targets, loss = ZOO["mlp"]()
    problem = lq.LQRProblem.from_network(lq.split(model), inputs, targets, loss=loss, damping=0.1)
    inverse = torch.linalg.inv(problem.hessian.to_dense())
    seen = preconditioned(problem, (inverse + inverse.mT) / 2).to_dense()
    torch.testing.assert_close(seen, torch.eye(problem.size).to(seen), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", WITH_ROOT)
def test_the_root_of_the_inverse_is_the_inverse_transposed_root(kind: str) -> None:
    M = drawn(kind, LAYOUTS["mlp"]())
    eye = torch.eye(M.shape[0], dtype=M.dtype)
    product = root_of(M).mT @ (inverse_root_of(M) @ eye)
    torch.testing.assert_close(product, eye, rtol=0, atol=1e-9)
    expected = torch.linalg.slogdet(M.to_dense())[1]
    assert logdet_of(M) == pytest.approx(float(expected), abs=1e-9)


def test_roots_of_matrices_and_diagonals() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    d = torch.rand(5, dtype=torch.float64, generator=generator) + 0.1
    eye = torch.eye(5).double()
    for M in (half @ half.mT + eye, DiagLinearOperator(d)):
        dense = M if isinstance(M, torch.Tensor) else torch.diag(d)
        F, inverse = root_of(M) @ eye, inverse_root_of(M) @ eye
        torch.testing.assert_close(F @ F.mT, dense, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(F.mT @ inverse, eye, rtol=0, atol=1e-11)
        assert logdet_of(M) == pytest.approx(float(torch.linalg.slogdet(dense)[1]))
    with pytest.raises(ValueError, match="diagonal is not positive"):
        root_of(DiagLinearOperator(-d))


def test_bad_input() -> None:
    model, inputs, targets, loss = ZOO["mlp"]()
    problem = lq.LQRProblem.from_network(lq.split(model), inputs, targets, loss=loss, damping=0.1)
    with pytest.raises(ValueError, match="shape"):
        preconditioned(problem, torch.eye(3))
    with pytest.raises(ValueError, match="positive definite"):
        preconditioned(problem, -torch.eye(problem.size, dtype=problem.dtype))
    with pytest.raises(ValueError, match="root"):
        preconditioned(problem, Layerwise(problem))
