"""The dual's Gram matrix, its columns, its diagonal and what it sees of a costate."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from memory import LiveBytes
from small_models import F64, Oracle, normal, relative, seeded
from torch import nn

import llqr_mf as lq
from llqr_mf.gram import closed_form_gram, cross_gram, gram_diagonal
from llqr_mf.output_sweep import terminal_factor
from llqr_mf.rules import gram

TOLERANCE = 1e-12


class Tokens(nn.Module):
    """Embeds, mixes positions within a sample, and puts out one distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6, padding_idx=0)
        self.norm = nn.LayerNorm(6)
        self.wide = nn.Linear(6, 7)
        self.scale = nn.Parameter(torch.rand(7))
        self.out = nn.Linear(7, 4)

    def forward(self, tokens):
        h = torch.tanh(self.wide(self.norm(self.embed(tokens))) * self.scale)
        return self.out(h.mean(1))


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False))


def conv():
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
    grouped = nn.Conv2d(4, 4, 2, stride=2, groups=2), nn.Flatten(), nn.Linear(16, 4)
    return nn.Sequential(*layers, *grouped)


MODELS = {
    "mlp": (mlp, normal(7, 5)),
    "conv": (conv, normal(7, 2, 4, 4)),
    "tokens": (Tokens, torch.arange(7 * 5).reshape(7, 5) ** 2 % 9),
}


@cache
def dense(name):
    """The problem, with another damping on every layer, R^{-1/2} J'L and R^{-1/2} J'."""
    make, inputs = MODELS[name]
    model = seeded(make).eval()
    layers = lq.split(model)
    damping = {layer.name: 0.1 * (t + 1) for t, layer in enumerate(layers)}
    targets = torch.arange(7) % 4
    problem = lq.LQRProblem.from_network(
        layers, inputs, targets, loss="cross_entropy", damping=damping, columns=3
    )
    J = Oracle(model, inputs).jacobian()
    damping_of = {name: damping[layer.name] for layer in layers for name in layer.parameters}
    every = [torch.full_like(p, damping_of[n]).flatten() for n, p in model.named_parameters()]
    factor = terminal_factor(problem)
    size = factor.rank * factor.samples
    L = factor.factor(torch.eye(size, dtype=F64).reshape(size, factor.rank, -1))
    B = J / torch.cat(every).detach().sqrt()
    return problem, L @ B


@pytest.fixture(params=["whole", "blocks"], autouse=True)
def blocks(request, monkeypatch):
    if request.param == "blocks":
        for name, size in {"TILE_ROWS": 6, "TILE_COLUMNS": 5, "CHUNK_ELEMENTS": 60}.items():
            monkeypatch.setattr(gram, name, size)


@pytest.mark.parametrize("name", MODELS)
def test_against_dense_jacobians(name):
    problem, rows = dense(name)
    G = rows @ rows.mT
    found = closed_form_gram(problem)
    assert relative(found, G) < TOLERANCE
    assert torch.equal(found, found.mT)
    assert relative(gram_diagonal(problem), G.diagonal()) < TOLERANCE


@pytest.mark.parametrize("chosen", [[0], [27, 3, 3, 10, 17, 24, 5], range(28), []])
@pytest.mark.parametrize("name", MODELS)
def test_chosen_columns(name, chosen):
    """In any order, twice, all four of one sample (3, 10, 17, 24), all, none."""
    problem, rows = dense(name)
    found = cross_gram(problem, torch.tensor(list(chosen), dtype=torch.int64))
    expected = rows @ rows[list(chosen)].mT
    assert found.shape == expected.shape
    assert not expected.numel() or relative(found, expected) < TOLERANCE


def test_bad_arguments():
    problem, *_ = dense("mlp")
    for chosen in (torch.tensor([28]), torch.tensor([-1]), torch.tensor([1.0]), torch.tensor(1)):
        with pytest.raises(ValueError, match="whole numbers j N \\+ n from 0 to 27"):
            cross_gram(problem, chosen)


def test_none_where_samples_interact():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).to(F64)
    problem = lq.LQRProblem.from_network(
        lq.split(model), normal(7, 3), torch.arange(7) % 4, loss="cross_entropy"
    )
    assert closed_form_gram(problem) is None and gram_diagonal(problem) is None
    assert cross_gram(problem, torch.tensor([0])) is None


@pytest.mark.parametrize("blocks", ["whole"], indirect=True)
def test_memory_of_chosen_columns(blocks):
    """Far less than N r squared: 400 columns of 20 000."""
    samples, width = 2000, 32
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 10))
    problem = lq.LQRProblem.from_network(
        lq.split(model), torch.ones(samples, 4), torch.arange(samples) % 10, loss="cross_entropy"
    )
    chosen = torch.arange(0, 20_000, 50)
    with LiveBytes() as memory:
        cross_gram(problem, chosen)
    columns, whole = 4 * 20_000 * 400, 4 * 20_000**2
    print(f"peak {memory.peak / columns:.2f} of the columns, {memory.peak / whole:.3f} of G")
    # The columns; cotangents of ten columns, of two or three widths at a time; blocks of 2 MB.
    assert memory.peak <= columns + 4 * 10 * samples * 3 * width + 4 * 4 * 256 * 2048
