"""K12 = J1 R^{-1} J2' between batches: lazy, in closed form, its blocks and its diagonal."""

from __future__ import annotations

import importlib

import pytest
import torch
from linear_operator.operators import DenseLinearOperator
from llqr_mf.operators import cross_kernel
from memory import LiveBytes
from oracle import dense_jacobian
from small_models import F64, TiedTransformer, Transformer, mlp, normal, relative, seeded
from torch import nn

import llqr_mf as lq
from llqr_mf.gaussian_process import kernel, kernel_matrix
from llqr_mf.gaussian_process.linearised import linearised

module = importlib.import_module("llqr_mf.gaussian_process.kernel_matrix")
TOLERANCE = 1e-12


def conv():
    head = nn.Conv2d(4, 4, 2, stride=2, groups=2), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), *head)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 2)

    def forward(self, tokens):
        return self.out(self.norm(self.embed(tokens)).mean(1))


def batch_norm():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


def tokens(n, seed=0):
    return (torch.arange(n * 5).reshape(n, 5) ** 2 + seed) % 9


# Model, two batches of other sizes, whether there is a closed form.
CASES = {
    "mlp": (lambda: mlp(4, 6, 5, 3), normal(7, 4, seed=1), normal(5, 4, seed=2), True),
    "one_output": (lambda: mlp(4, 6, 1), normal(7, 4, seed=1), normal(5, 4, seed=2), True),
    "conv": (
        lambda: seeded(conv).eval(),
        normal(4, 2, 4, 4, seed=1),
        normal(6, 2, 4, 4, seed=2),
        True,
    ),
    "tokens": (lambda: seeded(Tokens), tokens(7), tokens(5, 3), True),
    "attention": (
        lambda: seeded(lambda: Transformer(True)),
        normal(4, 3, 2, seed=1),
        normal(3, 3, 2, seed=2),
        None,
    ),
    "tied": (
        lambda: seeded(TiedTransformer),
        torch.tensor([[0, 3, 1], [4, 4, 2]]),
        torch.tensor([[1, 1, 3]]),
        False,
    ),
    "batch_norm": (
        lambda: seeded(batch_norm).train(),
        normal(7, 4, seed=1),
        normal(5, 4, seed=2),
        False,
    ),
}


@pytest.fixture(params=["whole", "parts"], autouse=True)
def parts(request, monkeypatch):
    """Columns of the output a few at a time, samples of the blocks two at a time."""
    if request.param == "parts":
        monkeypatch.setattr(module, "PULLED_ELEMENTS", 60)
        monkeypatch.setattr(module, "BLOCK_SAMPLES", 2)
        monkeypatch.setattr(cross_kernel, "CONTROL_ELEMENTS", 40)


def prepared(name, damping=0.5):
    make, x1, x2, closed = CASES[name]
    model = make()
    layers = lq.split(model)
    problems = [linearised(layers, x, damping=damping) for x in (x1, x2)]
    return problems, [dense_jacobian(model, x) for x in (x1, x2)], closed


@pytest.mark.parametrize("name", CASES)
def test_against_dense_jacobians(name):
    (p1, p2), (J1, J2), closed = prepared(name)
    expected = J1 @ J2.mT / 0.5
    lazy = kernel(p1, p2)
    assert lazy.shape == expected.shape
    assert relative(lazy @ torch.eye(len(J2), dtype=F64), expected) < TOLERANCE
    assert relative(lazy.mT @ torch.eye(len(J1), dtype=F64), expected.mT) < TOLERANCE
    assert relative(lazy @ normal(len(J2)), expected @ normal(len(J2))) < TOLERANCE
    assert relative(kernel_matrix(p1, p2), expected) < TOLERANCE
    itself = kernel_matrix(p1)
    assert relative(itself, J1 @ J1.mT / 0.5) < TOLERANCE
    found = module.closed_form_kernel(p1, p2)
    if closed is not None:
        assert (found is not None) == closed
    if found is not None:
        assert relative(found, expected) < TOLERANCE
        assert torch.equal(itself, itself.mT)


@pytest.mark.parametrize("name", CASES)
def test_blocks_and_diagonal(name):
    (p1, _), (J1, _), closed = prepared(name)
    K = J1 @ J1.mT / 0.5
    width = len(J1) // len(p1.origin.outputs)
    blocks, squares = module.output_blocks(p1), module.output_squares(p1)
    if closed is False:
        assert blocks is None and squares is None
    if blocks is not None:
        expected = K.unflatten(0, (-1, width)).unflatten(2, (-1, width))
        samples = torch.arange(len(expected))
        assert relative(blocks, expected[samples, :, samples]) < TOLERANCE
        assert relative(squares, K.diagonal()) < TOLERANCE


def test_other_dampings():
    """A number for every layer, an operator for every layer, one operator for all."""
    make, x1, x2, _ = CASES["mlp"]
    model = make()
    layers = lq.split(model)
    J1, J2 = dense_jacobian(model, x1), dense_jacobian(model, x2)
    sizes = [sum(p.numel() for p in layer.parameters.values()) for layer in layers]
    numbers = {layer.name: 0.1 * (t + 1) for t, layer in enumerate(layers)}
    spread = [torch.full((n,), 0.1 * (t + 1), dtype=F64) for t, n in enumerate(sizes)]
    blocks = []
    for t, n in enumerate(sizes):
        root = normal(n, n, seed=t)
        blocks.append(root @ root.mT / max(n, 1) + torch.eye(n, dtype=F64))
    whole = normal(sum(sizes), sum(sizes), seed=9)
    whole = whole @ whole.mT / len(whole) + torch.eye(len(whole), dtype=F64)
    dampings = {
        "numbers": (numbers, torch.diag(torch.cat(spread))),
        "blocks": ([DenseLinearOperator(b) for b in blocks], torch.block_diag(*blocks)),
        "whole": (whole, whole),
    }
    for damping, R in dampings.values():
        p1, p2 = (linearised(layers, x, damping=damping) for x in (x1, x2))
        expected = J1 @ torch.linalg.solve(R, J2.mT)
        assert relative(kernel(p1, p2).to_dense(), expected) < TOLERANCE
        assert relative(kernel(p1, p2).mT.to_dense(), expected.mT) < TOLERANCE
        assert relative(kernel_matrix(p1, p2), expected) < TOLERANCE


def test_bad_arguments():
    (p1, _), *_ = prepared("mlp")
    (other, _), *_ = prepared("mlp")
    with pytest.raises(ValueError, match="different models"):
        kernel(p1, other)
    free = lq.LQRProblem(A=[torch.eye(2, dtype=F64)], B=[torch.eye(2, dtype=F64)], R=[1.0])
    with pytest.raises(ValueError, match="from a network"):
        kernel(p1, free)
    with pytest.raises(ValueError, match="needs R"):
        kernel(p1, p1.with_damping(0.0)).to_dense()
    with pytest.raises(ValueError, match="other controls"):
        cross_kernel.CrossKernelOperator(
            torch.empty(0, dtype=F64), first=p1.system, second=free.system
        )


@pytest.mark.parametrize("parts", ["whole"], indirect=True)
def test_memory(parts):
    """Nothing of size N C x P, at P = 4.2 M: the matrix, cotangents, one layer's control."""
    width, samples, classes = 2048, 24, 5
    model = nn.Sequential(
        *(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()),
        nn.Linear(width, classes),
    )
    layers = lq.split(model)
    p1, p2 = (linearised(layers, normal(samples, 8, seed=s, dtype=torch.float32)) for s in (1, 2))
    P = sum(p.numel() for p in model.parameters())
    with LiveBytes() as memory:
        kernel_matrix(p1, p2)
    print(f"closed form: peak {memory.peak / 4 / P:.2f} P")
    assert memory.peak < 4 * P
    v = torch.ones(p2.system.output_size, 2)
    with LiveBytes() as memory:
        kernel(p1, p2) @ v
    print(f"product with two: peak {memory.peak / 4 / P:.2f} P")
    # u_t of the widest layer for two columns.
    assert memory.peak < 4 * 2.2 * P
