"""Products of per-sample gradients against those of dense per-sample Jacobians."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory import LiveBytes
from rule_cases import FIRST, Active, Reference, active, node_of, normal
from torch import Tensor
from torch.autograd.functional import jacobian

from llqr_mf.rules import gram
from llqr_mf.rules.gram import Deltas, Outer, mirror

COLUMNS, SAMPLES = 3, 7
TOKENS = torch.tensor([[1, 4, 1, 0], [4, 4, 4, 4], [0, 2, 3, 1], [0, 0, 0, 0]] + [[5, 6, 1, 2]] * 3)


@dataclass
class Call:
    """A call; `counted` inputs are parameters."""

    function: Any
    args: tuple[Any, ...]
    counted: tuple[int, ...]
    kwargs: dict[str, Any]


def linear(*lead: int, bias: bool = True, counted: tuple[int, ...] = (1, 2)) -> Call:
    args = active(SAMPLES, *lead, 5), active(6, 5, seed=1), active(6, seed=2) if bias else None
    return Call(F.linear, args, counted if bias else (1,), {})


def conv(function: Any, size: tuple[int, ...], groups: int = 1, **options: Any) -> Call:
    x = active(SAMPLES, 2 * groups, *size)
    args = x, active(3 * groups, 2, *[2] * len(size)), active(3 * groups)
    return Call(function, args, (1, 2), {"groups": groups, **options})


def embedding(tokens: Tensor, padding: int | None = None) -> Call:
    return Call(F.embedding, (tokens, active(7, 3), padding), (0,), {})


X = active(SAMPLES, 4, 3)
NORM = normal(4), normal(4).abs() + 1
CASES = {
    "linear": linear(),
    "linear, no bias": linear(bias=False),
    "linear, bias alone": linear(4, counted=(2,)),
    "linear, x counts too": linear(counted=(0, 1)),
    "positions": linear(4),
    "positions, no bias": linear(2, 3, bias=False),
    "conv1d": conv(F.conv1d, (9,), stride=2, padding=1),
    "conv2d": conv(F.conv2d, (5, 6), padding=(1, 0), dilation=(1, 2), stride=(2, 1)),
    "conv2d, groups": conv(F.conv2d, (3, 3), groups=3, padding=1),
    "conv2d, one position": conv(F.conv2d, (2, 2), groups=2),
    "conv3d": conv(F.conv3d, (3, 3, 3)),
    "layer_norm": Call(F.layer_norm, (X, (3,), active(3), active(3, seed=1)), (1, 2), {}),
    "rms_norm": Call(F.rms_norm, (X, (4, 3), active(4, 3)), (1,), {}),
    "batch_norm": Call(F.batch_norm, (X, *NORM, active(4), active(4, seed=1)), (1, 2), {}),
    "embedding": embedding(TOKENS),
    "embedding, padding": embedding(TOKENS, 0),
    "embedding, one token": embedding(TOKENS[:, 1], 4),
    "embedding, rare tokens": embedding(torch.arange(SAMPLES * 2).reshape(SAMPLES, 2) // 4),
    "scale": Call(operator.mul, (X, active(3)), (1,), {}),
    "shift": Call(operator.sub, (X, active(1, 4, 1)), (1,), {}),
    "multiple": Call(torch.add, (X, active(4, 3)), (1,), {"alpha": 2.5}),
    "constant factor": Call(operator.mul, (normal(SAMPLES, 4, 3), active(3)), (0,), {}),
    "scale of a sample": Call(operator.mul, (X, active(SAMPLES, 1, 1)), (1,), {}),
    "quotient": Call(operator.truediv, (normal(SAMPLES, 3), Active(2 + normal(3) ** 2)), (0,), {}),
}


class Case:
    """The node, its cotangents, and all per-sample gradients times the root of their scale."""

    def __init__(self, call: Call) -> None:
        reference = Reference(call.function, call.args, call.kwargs)
        values = reference.values
        self.node = node_of(call.function, *call.args, **call.kwargs)
        shape = self.node.result.shape
        self.deltas = normal(COLUMNS, *shape, seed=3)
        self.scales = [0.5 + i if i in call.counted else None for i in range(len(values))]
        # Row by row: `torch.func.jacrev` takes seconds to be imported.
        jacobians = jacobian(lambda *v: reference(*v)[0], tuple(values))
        rows = []
        for J, scale in zip(jacobians, self.scales, strict=True):
            if scale is not None:
                J = J.flatten(len(shape)) * scale**0.5
                if call.function is F.embedding and call.args[2] is not None:
                    learned = (call.args[0] != call.args[2]).to(J)
                    J = J * learned.reshape(*learned.shape, 1, 1)
                J = J.reshape(SAMPLES, -1, J.shape[-1])
                rows.append(torch.einsum("rno,nop->rnp", self.deltas.flatten(2), J))
        self.rows = torch.cat(rows, -1)
        self.gram = torch.einsum("rnp,qmp->rnqm", self.rows, self.rows)


@cache
def case_of(name: str) -> Case:
    return Case(CASES[name])


@pytest.fixture(params=["whole", "blocks", "positions", "gradients"])
def form(request, monkeypatch):
    """As a user gets it; in odd little blocks; and with each form of a weight's products."""
    if request.param != "whole":
        monkeypatch.setattr(gram, "TILE_ROWS", 4)
        monkeypatch.setattr(gram, "TILE_COLUMNS", 5)
        monkeypatch.setattr(gram, "CHUNK_ELEMENTS", 50)
        monkeypatch.setattr(gram, "PANEL_ELEMENTS", 10)
    if request.param in ("positions", "gradients"):
        monkeypatch.setattr(Outer, "_positions_pay", lambda *_: request.param == "positions")
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_terms(name, form):
    case = case_of(name)
    total = torch.ones(3, 7, 3, 7, dtype=case.deltas.dtype)
    assert case.node.add_gram(total, case.deltas, case.scales)
    mirror(total)
    torch.testing.assert_close(total, 1 + case.gram, **FIRST)

    owners = torch.tensor([6, 0, 0, 3, 6, 2])
    columns = torch.tensor([0, 2, 1, 0, 0, 1])
    right = case.node.gram_terms(
        Deltas(case.deltas[columns, owners].unsqueeze(0), SAMPLES, owners), case.scales
    )
    left = case.node.gram_terms(Deltas(case.deltas[1:], SAMPLES), case.scales)
    cross = normal(2, SAMPLES, 1, len(owners))
    expected = cross + case.gram[1:, :, columns, owners].unsqueeze(2)
    for term, other in zip(left, right, strict=True):
        term.add(cross, other, half=False)
    torch.testing.assert_close(cross, expected, **FIRST)

    squares = sum(term.squares() for term in left)
    torch.testing.assert_close(squares, case.rows[1:].square().sum(-1), **FIRST)


def test_too_large(monkeypatch):
    """Only gradients that are pulled back one by one have a limit."""
    monkeypatch.setattr("llqr_mf.rules.base.GRAM_ELEMENTS", 20)
    case = case_of("conv3d")
    assert not case.node.add_gram(torch.zeros(3, 7, 3, 7), case.deltas, case.scales)


@pytest.mark.parametrize(
    "positions, width, expected", [(1, 512, True), (4, 512, True), (512, 8, False)]
)
def test_the_cheaper_form(positions, width, expected):
    deltas = torch.empty(10, 64, 1, positions, width, device="meta")
    term = Outer(deltas, lambda part: deltas[0, part], width, 1.0)
    assert term._positions_pay(term, half=True) == expected


def test_memory_of_a_wide_layer():
    """Nothing is of the weight's size, nor of that of the cotangents."""
    samples, columns, width = 64, 10, 4096
    x, w = torch.zeros(samples, width), torch.empty(width, width)
    node = node_of(F.linear, Active(x), Active(w), Active(torch.zeros(width)), second=False)
    deltas = torch.zeros(columns, samples, width)
    total = torch.zeros(columns, samples, columns, samples)
    with LiveBytes() as memory:
        node.add_gram(total, deltas, [None, 2.0, 3.0])
        mirror(total)
    print(f"peak {memory.peak / total.nbytes:.2f} totals, {memory.peak / deltas.nbytes:.2f} deltas")
    # Panels of two operands, the block, and X X'.
    assert memory.peak <= 4 * 2 * gram.PANEL_ELEMENTS + 2 * total.nbytes


@pytest.mark.parametrize("positions", [1, 128])
def test_memory_of_many_rows(positions, monkeypatch):
    """Beyond the total there are blocks and chunks."""
    monkeypatch.setattr(gram, "TILE_ROWS", 64)
    monkeypatch.setattr(gram, "TILE_COLUMNS", 128)
    monkeypatch.setattr(gram, "CHUNK_ELEMENTS", 2**15)
    samples, columns, width = 128, 8, 16
    x, w = torch.zeros(samples, positions, width), torch.zeros(width, width)
    node = node_of(F.linear, Active(x), Active(w), Active(torch.zeros(width)), second=False)
    deltas = torch.zeros(columns, samples, positions, width)
    total = torch.zeros(columns, samples, columns, samples)
    with LiveBytes() as memory:
        assert node.add_gram(total, deltas, [None, 2.0, 3.0])
        mirror(total)
    print(f"peak {memory.peak / total.nbytes:.3f} totals")
    assert memory.peak <= 4 * (4 * 2**15 + 2 * 64 * 128) + 4 * columns * samples * width
