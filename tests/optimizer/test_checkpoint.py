"""Checkpoints: plain tensors by name, resume bit for bit, refuse before changing anything."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
from optimizer.cases import (
    assert_same,
    model,
    sgd,
    snapshot,
    train,
    train_subspace,
    wrap,
)
from small_models import mlp
from torch import Tensor

import llqr_mf as lq
from llqr_mf.optimizer import Recipe

BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}
DTYPES = [torch.float32, torch.bfloat16]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def moved(state):
    """What accelerate does to a state: a recursion over mappings and lists, `.to` on tensors."""
    if isinstance(state, Tensor):
        return state.to("cpu", copy=True)
    if isinstance(state, dict):
        return type(state)({key: moved(value) for key, value in state.items()})
    if isinstance(state, list | tuple):
        return type(state)(moved(value) for value in state)
    return state


CASES = {
    "ekronecker": {"structure": "ekronecker"},
    "kronecker": {"structure": "kronecker", "recipe": Recipe()},
    "diagonal, mid-refresh": {"structure": "diagonal", "spread": 3},
    "low rank, cg": {"structure": "low_rank", "recipe": Recipe(learn="cg"), "rank": 3},
    "mixed": {"structure": [("*.weight", "ekronecker"), ("*", "diagonal")]},
    "update": {"structure": "kronecker", "precondition": "update"},
    "subspace": {"structure": "ekronecker", "step": "subspace"},
    "subspace, mid-refresh": {"structure": "kronecker", "step": "subspace", "spread": 3},
    "subspace of two": {"step": "subspace", "subspace": lq.optimizer.Subspace(memory=2)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", BASES)
def test_resume_is_bit_exact(case, dtype, base):
    options = {"recipe": Recipe(), "refresh_every": 4, **CASES[case]}
    run = train_subspace if options.get("step") == "subspace" else train

    def fresh():
        net = model(dtype)
        return net, wrap(net, BASES[base](net.parameters()), **options)

    net, optimizer = fresh()
    # Six steps end in the second refresh of those that are spread over three.
    run(net, optimizer, 6, dtype=dtype)
    assert (optimizer._schedule.turn > 0) == ("spread" in options)
    state = optimizer._subspace.state
    state.rule = replace(state.rule, damping=0.05)  # as a step that was taken back leaves it
    saved = copy.deepcopy({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    run(net, optimizer, 5, first=6, dtype=dtype)
    for change in (through_a_file, moved):
        twin, resumed = fresh()
        twin.load_state_dict(saved["net"])
        resumed.load_state_dict(change(saved["optimizer"]))
        run(twin, resumed, 5, first=6, dtype=dtype)
        assert_same(snapshot(twin, resumed), snapshot(net, optimizer))
        assert resumed.counts == optimizer.counts


def test_state_is_plain_and_keyed_by_parameter():
    net = model(torch.bfloat16)
    base = BASES["adamw"](net.parameters())
    optimizer = wrap(net, base, structure="kronecker", recipe=Recipe(), step="subspace")
    train_subspace(net, optimizer, 3, dtype=torch.bfloat16)
    state = optimizer.state_dict()
    own = state.pop("llqr")
    assert_same(state, base.state_dict())
    names = list(dict(net.named_parameters()))
    assert own["parameters"] == names
    for held in (own["structure"]["tensors"], own["factors"]):
        assert all(any(key.startswith(f"{n}.") for n in names) for key in held)
        assert {t.dtype for t in held.values()} == {torch.float32}
    assert [list(step) for step in own["subspace"]["steps"]] == [names]
    assert list(own["subspace"]["mean"]) == names


def test_float32_statistics_survive_loading():
    """Nothing of M passes through the parameters' bfloat16."""
    net = model(torch.bfloat16)
    optimizer = wrap(net, structure="ekronecker")
    train(net, optimizer, 1, dtype=torch.bfloat16)
    held = optimizer.structure.tensors["0.weight.spectrum"].clone()
    assert not torch.equal(held, held.bfloat16().float())
    twin = wrap(model(torch.bfloat16), structure="ekronecker")
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    assert torch.equal(twin.structure.tensors["0.weight.spectrum"], held)


def spoilt(state, change):
    state = copy.deepcopy(state)
    change(state)
    return state


MISMATCHES = {
    "no llqr": (lambda s: s.pop("llqr"), "no state of an LLQR"),
    "version": (lambda s: s["llqr"].update(version=0), "version 0"),
    "names": (lambda s: s["llqr"].update(parameters=["a"]), "other parameters"),
    "order": (lambda s: s["llqr"]["parameters"].reverse(), "another order"),
    "kind": (lambda s: s["llqr"]["structure"].update(kind="diagonal"), "'diagonal' structure"),
    "tensor": (
        lambda s: s["llqr"]["structure"]["tensors"].update({"0.weight.spectrum": torch.ones(2)}),
        "shape",
    ),
    "step": (
        lambda s: s["llqr"]["subspace"]["steps"][0].update({"0.weight": torch.ones(2)}),
        "shape",
    ),
    "counts": (lambda s: s["llqr"]["counts"].pop("steps"), "another version"),
    "schedule": (lambda s: s["llqr"]["schedule"].pop("due"), "another version"),
    "groups": (lambda s: s["param_groups"].append(s["param_groups"][0]), "parameter group"),
    "group size": (lambda s: s["param_groups"][0]["params"].pop(), "parameter group"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_mismatches_raise_before_any_change(case):
    change, message = MISMATCHES[case]
    nets, optimizers = [model(), model(seed=1)], []
    for i, net in enumerate(nets):
        optimizers.append(wrap(net, BASES["sgd"](net.parameters()), step="subspace"))
        train_subspace(net, optimizers[-1], 2 + i)
    before, counts = snapshot(nets[0], optimizers[0]), optimizers[0].counts
    with pytest.raises(ValueError, match=message):
        optimizers[0].load_state_dict(spoilt(optimizers[1].state_dict(), change))
    assert_same(snapshot(nets[0], optimizers[0]), before)
    assert optimizers[0].counts == counts


def test_other_models_and_structures_are_refused():
    optimizer = wrap(model(), structure="kronecker")
    other = mlp(4, 6, 3)
    with pytest.raises(ValueError, match="shape"):
        wrap(other, structure="kronecker").load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="'kronecker' structure"):
        wrap(model()).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="no state of an LLQR"):
        optimizer.load_state_dict(optimizer.base.state_dict())


def test_schedulers_resume_through_the_shared_groups():
    net = model()
    optimizer = wrap(net, sgd(net.parameters(), lr=0.1))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(2):
        train(net, optimizer, 1)
        schedule.step()
    saved = optimizer.state_dict()
    twin = model()
    resumed = wrap(twin, sgd(twin.parameters(), lr=0.1))
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["lr"] == pytest.approx(0.025)
    assert resumed.param_groups is resumed.base.param_groups
