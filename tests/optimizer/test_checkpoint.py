"""Checkpoints: plain tensors by name, resume bit for bit, refuse before changing anything."""

from __future__ import annotations

import copy
import io
import re
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


def fill(tensors, name, value=float("nan")):
    tensors[name].view(-1)[0] = value


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
    "no counts": (lambda s: s["llqr"].pop("counts"), "lacks ['counts']"),
    "count": (lambda s: s["llqr"]["counts"].update(steps="x"), "'steps' is 'x'"),
    "negative": (lambda s: s["llqr"]["counts"].update(skipped=-1), "'skipped' is -1"),
    "due": (lambda s: s["llqr"]["schedule"].update(due=float("nan")), "'due' is nan"),
    "turn": (lambda s: s["llqr"]["schedule"].update(turn=1), "spread is 1"),
    "base": (lambda s: s["llqr"].update(base="AdamW"), "AdamW, and this one is over SGD"),
    "NaN in M": (lambda s: fill(s["llqr"]["structure"]["tensors"], "0.weight.spectrum"), "NaN"),
    "M below zero": (
        lambda s: s["llqr"]["structure"]["tensors"]["0.weight.spectrum"].neg_(),
        "'0.weight.spectrum' has entries that are not positive",
    ),
    "NaN in a step": (
        lambda s: fill(s["llqr"]["subspace"]["steps"][0], "0.bias"),
        "step 0, 0.bias",
    ),
    "NaN in the mean": (lambda s: fill(s["llqr"]["subspace"]["mean"], "0.bias"), "mean, 0.bias"),
    "half a step": (lambda s: s["llqr"]["subspace"]["steps"][0].popitem(), "other parameters"),
    "mean alone": (lambda s: s["llqr"]["subspace"]["steps"].clear(), "a mean and no steps"),
    "damping": (lambda s: s["llqr"]["subspace"].update(damping=float("nan")), "damping of the sub"),
    "ratio": (lambda s: s["llqr"]["subspace"].update(ratio="x"), "its ratio 'x'"),
    "no ratio": (lambda s: s["llqr"]["subspace"].pop("ratio"), "'subspace' lacks ['ratio']"),
    "short generator": (lambda s: s["llqr"].update(generator=torch.zeros(9).byte()), "'generator'"),
    "no generator": (lambda s: s["llqr"].update(generator=None), "'generator'"),
    "factors": (lambda s: s["llqr"]["factors"].update(a=torch.ones(2)), "factors of the state"),
    "no state": (lambda s: s.pop("state"), "no 'state'"),
    "no groups": (lambda s: s.pop("param_groups"), "no 'param_groups'"),
    "keys of groups": (lambda s: s["param_groups"][0].pop("momentum"), "lacks ['momentum']"),
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
    with pytest.raises(ValueError, match=re.escape(message)):
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


# ---- the base optimizer, and mean factors

OTHERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


@pytest.mark.parametrize("relabelled", [False, True])
@pytest.mark.parametrize("saved", OTHERS)
@pytest.mark.parametrize("here", OTHERS)
def test_the_state_of_another_base_changes_nothing(here, saved, relabelled):
    """Also where the state says nothing of it, as one of the same name with other options."""
    made = {}
    for name in (here, saved):
        net = model()
        made[name] = net, wrap(net, OTHERS[name](net.parameters()))
        train(*made[name], 2 if name == here else 3)
    net, optimizer = made[here]
    state = copy.deepcopy(made[saved][1].state_dict())
    if here == saved:
        optimizer.load_state_dict(state)
        return
    if relabelled:
        state["llqr"]["base"] = type(optimizer.base).__name__
    groups, before = optimizer.param_groups, snapshot(net, optimizer)
    counts, base_state = optimizer.counts, optimizer.state
    with pytest.raises(ValueError, match=r"another base optimizer|same kind of optimizer"):
        optimizer.load_state_dict(state)
    assert_same(snapshot(net, optimizer), before)
    assert optimizer.counts == counts
    assert optimizer.param_groups is groups and optimizer.state is base_state
    train(net, optimizer, 1, first=3)
    assert optimizer.counts.skipped == 0


def test_an_exception_inside_the_base_undoes_what_it_had_done(monkeypatch):
    net = model()
    base = BASES["adamw"](net.parameters())
    optimizer = wrap(net, base)
    train(net, optimizer, 2)
    other = model(seed=1)
    state = wrap(other, BASES["adamw"](other.parameters()))
    train(other, state, 3)

    def half(given):
        base.__dict__["state"] = {}
        raise KeyError("what a base of one's own may raise")

    monkeypatch.setattr(base, "load_state_dict", half)
    before = snapshot(net, optimizer)
    with pytest.raises(ValueError, match="AdamW, cannot load its part of the state"):
        optimizer.load_state_dict(copy.deepcopy(state.state_dict()))
    assert_same(snapshot(net, optimizer), before)


def test_a_base_tensor_of_another_shape_is_refused_by_name():
    net = model()
    optimizer = wrap(net, BASES["adamw"](net.parameters()))
    train(net, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][2]["exp_avg"] = torch.zeros(2, 2)
    before = snapshot(net, optimizer)
    with pytest.raises(ValueError, match=r"'exp_avg' of '2\.weight' has shape \(2, 2\)"):
        optimizer.load_state_dict(state)
    assert_same(snapshot(net, optimizer), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mean_factors_are_checked(dtype):
    net = model(dtype)
    optimizer = wrap(net, structure="kronecker", refresh_every=1)
    train(net, optimizer, 3, dtype=dtype)
    good = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(good)
    before = snapshot(net, optimizer)
    name = "2.weight.factor1"

    def changed(change):
        state = copy.deepcopy(good)
        factors = state["llqr"]["factors"]
        factors[name] = change(factors[name])
        return state

    for change, match in {
        "nan": (lambda t: t * float("nan"), "NaN"),
        "shape": (lambda t: t[:2, :2], "shape"),
        "sign": (lambda t: -t, "not positive definite"),
        "skew": (lambda t: t + t.norm() * torch.ones_like(t).triu(1), "not symmetric"),
        "dtype": (lambda t: t.half(), "float16"),
    }.values():
        with pytest.raises(ValueError, match=match) as caught:
            optimizer.load_state_dict(changed(change))
        assert f"'{name}'" in str(caught.value)
    empty = copy.deepcopy(good)
    empty["llqr"]["factors"] = {}
    with pytest.raises(ValueError, match=r"factors of the state differ"):
        optimizer.load_state_dict(empty)
    assert_same(snapshot(net, optimizer), before)


def test_loading_what_was_saved_by_another_generator_of_numbers_changes_no_global_state():
    net = model()
    optimizer = wrap(net)
    train(net, optimizer, 2)
    random = torch.random.get_rng_state()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize("base", ["Adafactor", "Rprop", "ASGD", "NAdam", "Adadelta", "Adamax"])
def test_any_base_resumes(base):
    """In float32: torch rounds some of their numbers to that before it casts them."""

    def fresh(seed):
        net = model(torch.float32, seed=seed)
        return net, wrap(net, getattr(torch.optim, base)(net.parameters(), lr=1e-2))

    net, optimizer = fresh(0)
    train(net, optimizer, 3, dtype=torch.float32)
    twin, resumed = fresh(1)
    twin.load_state_dict(net.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for each in ((net, optimizer), (twin, resumed)):
        train(*each, 3, first=3, dtype=torch.float32)
    assert_same(snapshot(twin, resumed), snapshot(net, optimizer))
