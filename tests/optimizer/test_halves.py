"""A batch in halves: inputs that carry no samples stay whole, whatever their size happens to be."""

from __future__ import annotations

import pytest
import torch
from optimizer.cases import assert_same
from small_models import normal, seeded
from torch import nn

import llqr_mf as lq
from llqr_mf.optimizer import Recipe
from llqr_mf.optimizer.halves import at_least_two

N = 6


class Attention(nn.Module):
    """Takes a mask (L, L)."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.query, self.out, self.dropout = nn.Linear(4, 4), nn.Linear(4, 3), nn.Dropout(dropout)

    def forward(self, x, mask):
        weights = torch.softmax(self.query(x) @ x.transpose(1, 2) + mask, -1)
        return self.out(self.dropout(weights @ x)).mean(1)


class Table(nn.Module):
    """Takes a vector for every class."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(4, 4)

    def forward(self, x, table):
        return self.query(x) @ table.t()


class Two(nn.Module):
    """Two inputs of samples, and a number for every one of N features."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, N), nn.Linear(2, N), nn.BatchNorm1d(N)

    def forward(self, x, z, scale):
        return self.norm(self.first(x) + self.second(z)) * scale


def attention(length, dropout=0.0):
    net = seeded(lambda: Attention(dropout))
    mask = torch.triu(torch.full((length, length), -1e3, dtype=torch.float64), 1)
    return net, (normal(N, length, 4), mask), (0,)


CASES = {
    "mask of another size": lambda: attention(5),
    "mask of the batch's size": lambda: attention(N),
    "with dropout": lambda: attention(N, 0.5),
    "table": lambda: (seeded(Table), (normal(N, 4), normal(N, 4, seed=1)), (0,)),
    "two of three, with BatchNorm": lambda: (
        seeded(Two),
        (normal(N, 4), normal(N, 2, seed=1), normal(N, seed=2)),
        (0, 1),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fit_on_one_batch_is_that_on_its_halves(case):
    net, inputs, carry = CASES[case]()
    net.train()
    y = torch.arange(N) % 3
    kept = [x.clone() for x in inputs]
    made = []
    for given in (None, (slice(N // 2), slice(N // 2, None))):
        optimizer = lq.LLQR(
            *(net, torch.optim.SGD(net.parameters(), lr=0.1)),
            loss="cross_entropy",
            structure="diagonal",
            recipe=Recipe(learn="cg"),
        )
        torch.manual_seed(0)
        if given is None:
            before = [net.training, *(b.clone() for b in net.buffers()), torch.get_rng_state()]
            assert optimizer.refresh(inputs, y)
            after = [net.training, *net.buffers(), torch.get_rng_state()]
            assert_same(after, before)
        else:
            parts = [
                (tuple(x[rows] if i in carry else x for i, x in enumerate(inputs)), y[rows])
                for rows in given
            ]
            assert optimizer.refresh(None, batches=parts)
        made.append(optimizer.structure.state_dict())
    assert_same(made[0], made[1])
    assert_same(kept, list(inputs))
    assert all(module.training for module in net.modules())


def test_a_model_whose_halves_are_no_halves_of_its_outputs_asks_for_batches():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x, z):
            return self.linear(x - x.mean(0)) + z

    net = seeded(Centred)
    x, z, y = normal(N, 4), normal(N, 3, seed=1), torch.arange(N) % 3
    optimizer = lq.LLQR(
        *(net, torch.optim.SGD(net.parameters(), lr=0.1)),
        loss="cross_entropy",
        structure="diagonal",
        recipe=Recipe(learn="cg"),
    )
    before = optimizer.structure.clone().state_dict()
    counts = optimizer.counts
    with pytest.raises(ValueError, match=r"no choice of inputs.*batches=\["):
        optimizer.refresh((x, z), y)
    assert_same(optimizer.structure.state_dict(), before)
    assert optimizer.counts == counts
    assert optimizer.refresh(None, batches=[((x, z), y), ((x, z), y)])


def test_a_batch_that_is_not_finite_is_refused_and_no_error():
    net, inputs, _ = CASES["mask of the batch's size"]()
    optimizer = lq.LLQR(
        *(net, torch.optim.SGD(net.parameters(), lr=0.1)),
        loss="cross_entropy",
        structure="diagonal",
        recipe=Recipe(learn="cg"),
    )
    inputs[0][0, 0, 0] = float("nan")
    assert not optimizer.refresh(inputs, torch.arange(N) % 3)
    assert optimizer.counts.refused == 1


def test_inputs_shorter_than_the_targets_ask_for_batches():
    with pytest.raises(ValueError, match=r"no input has the 12 samples.*batches=\["):
        at_least_two([(normal(N, 4), torch.zeros(2 * N))])
    with pytest.raises(ValueError, match="closed_form"):
        at_least_two([(normal(1, 4), torch.zeros(1))])


def test_a_refresh_leaves_gradients():
    net, inputs, _ = CASES["table"]()
    y = torch.arange(N) % 3
    optimizer = lq.LLQR(
        *(net, torch.optim.SGD(net.parameters(), lr=0.1)),
        loss="cross_entropy",
        recipe=Recipe(learn="cg"),
    )
    nn.functional.cross_entropy(net(*inputs), y).backward()
    before = [p.grad.clone() for p in net.parameters()]
    assert optimizer.refresh(inputs, y)
    assert_same([p.grad for p in net.parameters()], before)
