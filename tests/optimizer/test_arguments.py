"""Arguments that do not fit are named, with what to give instead, before anything has changed."""

from __future__ import annotations

import re

import pytest
import torch
from optimizer.cases import assert_same, backward, batch, model, sgd, snapshot, wrap

import llqr_mf as lq
from llqr_mf.optimizer import Recipe, Subspace, annealed, burn_in

NAN, INF = float("nan"), float("inf")

OPTIONS = {
    "spread": [0, 1.5, "2", None],
    "seed": [1.5, "0", None],
    "kl_limit": [0.0, -1.0, NAN, "1", None],
    "refresh_every": [
        *(0, 2.5, None, "often"),
        *(lambda step: 0, lambda step: NAN, lambda step: None),
        *(burn_in(3, every=1, then=0), burn_in(3, every=0, then=1), burn_in(-1, every=1, then=1)),
    ],
    "structure": [None, 3, [], ["ekronecker"], [("*",)], [("*", 3)], [(1, "diagonal")], "full"],
    "graft": ["norm", None],
    "precondition": ["both", None],
    "step": ["newton", None],
    "recipe": ["cg", {}],
    "subspace": [{}, 3],
    "metric": ["newtonian"],
    "loss": ["hinge"],
    "process_group": ["world", 3],
}


def told(name):
    """How a message names an argument."""
    return {"structure": "structure|rule", "refresh_every": "refresh_every|burn_in"}.get(name, name)


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    net = model()
    for bad in OPTIONS[name]:
        options = {"loss": "cross_entropy", name: bad}
        with pytest.raises(ValueError, match=told(name)) as caught:
            lq.LLQR(net, sgd(net.parameters()), **options)
        assert ": " in str(caught.value)


def test_models_and_bases():
    net = model()
    for bad in (net.forward, list(net.parameters()), None):
        with pytest.raises(ValueError, match="model is a"):
            lq.LLQR(bad, sgd(net.parameters()), loss="cross_entropy")
    for bad in (net, None, torch.optim.SGD):
        with pytest.raises(ValueError, match="base is a"):
            lq.LLQR(net, bad, loss="cross_entropy")
    with pytest.raises(ValueError, match="base is an LLQR"):
        lq.LLQR(net, wrap(net), loss="cross_entropy")


@pytest.mark.parametrize(
    "options",
    [
        {"subspace": Subspace()},
        {"step": "subspace", "graft": "kl"},
        {"step": "subspace", "graft": "none"},
        {"step": "subspace", "precondition": "update"},
    ],
)
def test_what_would_have_no_effect_is_refused(options):
    with pytest.raises(ValueError, match="goes with step="):
        wrap(model(), **options)


RECIPES = {
    "learn": ["sgd", None],
    "damping": [0.0, -1.0, NAN, INF, "1", None],
    "ema": [1.0, -0.1, NAN, "0", None],
    "samples": [0, 1.5, "1"],
    "probes": [0, 1.5, None],
}
SUBSPACES = {
    "memory": [-1, 0.5, None],
    "damping": [0.0, NAN, INF, "1"],
    "shrink": [-1.0, NAN, INF, None],
    "averaging": [1.0, -0.1, NAN, None],
    "check_every": [0, 1.5, None],
}


@pytest.mark.parametrize(("make", "table"), [(Recipe, RECIPES), (Subspace, SUBSPACES)])
def test_numbers_of_recipes_and_subspaces(make, table):
    for name, values in table.items():
        for bad in values:
            with pytest.raises(ValueError, match=f"^{name}") as caught:
                make(**{name: bad})
            assert ": " in str(caught.value)


def test_periods():
    for bad in ({"first": NAN}, {"last": INF}, {"steps": "10"}, {"first": 7}):
        with pytest.raises(ValueError, match="need 1 <= first"):
            annealed(**{"first": 1, "last": 5, "steps": 10, **bad})
    assert burn_in(0, every=1, then=3)(0) == 3


def test_a_period_that_fails_later_fails_before_m_changes():
    net = model()
    optimizer = wrap(net, refresh_every=lambda step: 1 if step < 2 else 0)
    for _ in range(2):
        assert optimizer.refresh(*batch())
        backward(net, *batch())
        optimizer.step()
    before, counts = snapshot(net, optimizer), optimizer.counts
    with pytest.raises(ValueError, match="refresh_every gives 0 at step 2"):
        optimizer.refresh(*batch())
    assert_same(snapshot(net, optimizer), before)
    assert optimizer.counts == counts


def test_a_spread_refresh_asks_for_the_period_of_its_first_step():
    net = model()
    optimizer = wrap(net, refresh_every=lambda step: 3 + 10 * step, spread=2)
    for _ in range(2):
        assert optimizer.refresh(*batch())
        backward(net, *batch())
        optimizer.step()
    assert optimizer._schedule.due == 3


# ---- calls


@pytest.mark.parametrize("learn", ["closed_form", "cg"])
def test_batches_may_be_any_iterable(learn):
    made = []
    parts = [batch(seed=s) for s in range(3)]
    for given in (parts, iter(parts), (pair for pair in parts), tuple(parts), map(list, parts)):
        optimizer = wrap(model(), recipe=Recipe(learn=learn))
        assert optimizer.refresh(None, batches=given)
        made.append(optimizer.structure.state_dict())
    for other in made[1:]:
        assert_same(other, made[0])
    data = torch.utils.data.TensorDataset(*batch(n=24))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    assert wrap(model(), recipe=Recipe(learn=learn)).refresh(None, batches=loader)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (3, "batches is a int"),
        ("ab", "batches is a str"),
        ({}, "batches is a dict"),
        (torch.ones(2, 2), "batches is a Tensor"),
        ([], "batches is empty"),
        (iter([]), "batches is empty"),
        ([torch.ones(2)], "batches[0] is no pair (inputs, targets) but a Tensor"),
        ([batch(), (batch()[0],)], "batches[1] is no pair (inputs, targets) but a tuple of 1"),
        ([(*batch(), None)], "batches[0] is no pair (inputs, targets) but a tuple of 3"),
    ],
)
def test_bad_batches(bad, match):
    net = model()
    optimizer = wrap(net)
    before, counts = snapshot(net, optimizer), optimizer.counts
    with pytest.raises(ValueError, match=re.escape(match)):
        optimizer.refresh(None, batches=bad)
    assert_same(snapshot(net, optimizer), before)
    assert optimizer.counts == counts


def test_an_exception_of_an_iterable_of_batches_changes_nothing():
    def failing():
        yield batch()
        raise OSError("no more data")

    net = model()
    optimizer = wrap(net)
    before = snapshot(net, optimizer)
    with pytest.raises(OSError, match="no more data"):
        optimizer.refresh(None, batches=failing())
    assert_same(snapshot(net, optimizer), before)


def test_a_batch_is_no_closure():
    net = model()
    optimizer = wrap(net)
    backward(net, *batch())
    before, counts = snapshot(net, optimizer), optimizer.counts
    with pytest.raises(ValueError, match=r"closure is a Tensor.*step='subspace'"):
        optimizer.step(batch()[0])
    with pytest.raises(ValueError, match="step='subspace'"):
        optimizer.step(*batch())
    assert_same(snapshot(net, optimizer), before)
    assert optimizer.counts == counts
