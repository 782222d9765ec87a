"""`torch.distributed.checkpoint` carries all of an LLQR optimizer, or its functions say why not."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from optimizer.cases import assert_same, batch, model, sgd, snapshot, train, train_subspace, wrap
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import llqr_mf as lq
from llqr_mf.optimizer import Recipe, Subspace

BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}
CASES = {
    "ekronecker": {},
    "kronecker, mid-refresh": {"structure": "kronecker", "spread": 3},
    "low rank": {"structure": "low_rank", "recipe": Recipe(learn="cg"), "rank": 3},
    "subspace": {"step": "subspace"},
    "subspace of two": {
        "step": "subspace",
        "subspace": Subspace(memory=2),
        "structure": "diagonal",
    },
}
OPTIONS = {
    "plain": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "full, on the host": {"full_state_dict": True, "cpu_offload": True},
}


@pytest.fixture(autouse=True)
def quiet():
    """What torch's functions warn of is about torch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed")
        warnings.filterwarnings("ignore", message=".*torch.distributed.*")
        yield


def fresh(base, case, seed=0):
    net = model(seed=seed)
    options = {"recipe": Recipe(), "refresh_every": 4, **CASES[case]}
    return net, wrap(net, BASES[base](net.parameters()), **options)


def runner(case):
    return train_subspace if CASES[case].get("step") == "subspace" else train


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", BASES)
def test_resume_is_bit_exact(base, case, options):
    how, run = StateDictOptions(**OPTIONS[options]), runner(case)
    net, optimizer = fresh(base, case)
    run(net, optimizer, 10)
    optimizer.zero_grad()
    before = snapshot(net, optimizer)
    weights, state = get_state_dict(net, optimizer, options=how)
    # Asking changes nothing. (A base without a state of its own is given one by torch.)
    assert_same(snapshot(net, optimizer)[-1], before[-1])
    saved = through_a_file((weights, state))
    run(net, optimizer, 10, first=10)
    twin, resumed = fresh(base, case, seed=5)
    set_state_dict(twin, resumed, model_state_dict=saved[0], optim_state_dict=saved[1], options=how)
    run(twin, resumed, 10, first=10)
    assert_same(snapshot(twin, resumed), snapshot(net, optimizer))
    assert resumed.counts == optimizer.counts


def test_a_mean_beside_fewer_steps_than_are_remembered():
    net, optimizer = fresh("sgd", "subspace of two")
    train_subspace(net, optimizer, 1)
    held = optimizer._subspace.state
    assert len(held.steps) == 1 and held.mean is not None
    twin, resumed = fresh("sgd", "subspace of two", seed=5)
    set_optimizer_state_dict(twin, resumed, get_optimizer_state_dict(net, optimizer))
    assert torch.equal(resumed._subspace.state.mean, held.mean)
    assert torch.equal(resumed._subspace.state.steps[0], held.steps[0])


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_resume_through_a_saved_checkpoint(base, case, flat, tmp_path):
    """`dcp.save` and `dcp.load`, which fill the state of a fresh optimizer in place."""
    how, run = StateDictOptions(flatten_optimizer_state_dict=flat), runner(case)
    net, optimizer = fresh(base, case)
    run(net, optimizer, 6)
    optimizer.zero_grad()
    weights, state = get_state_dict(net, optimizer, options=how)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    run(net, optimizer, 5, first=6)
    twin, resumed = fresh(base, case, seed=5)
    weights, state = get_state_dict(twin, resumed, options=how)
    filled = {"model": weights, "optimizer": state}
    dcp.load(filled, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        *(twin, resumed),
        model_state_dict=filled["model"],
        optim_state_dict=filled["optimizer"],
        options=how,
    )
    run(twin, resumed, 5, first=6)
    assert_same(snapshot(twin, resumed), snapshot(net, optimizer))


@pytest.mark.parametrize("case", ["ekronecker", "subspace"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("trained", [False, True])
def test_asking_moves_nothing(base, case, trained):
    """Torch takes a step with gradients and rates of zero where there is no state."""
    net, optimizer = fresh(base, case)
    if trained:
        runner(case)(net, optimizer, 3)
        optimizer.zero_grad()
    held, counts = snapshot(net, optimizer), optimizer.counts
    random = torch.random.get_rng_state()
    for flat in (False, True):
        how = StateDictOptions(flatten_optimizer_state_dict=flat)
        get_optimizer_state_dict(net, optimizer, options=how)
    after = snapshot(net, optimizer)
    assert_same([after[0], after[-1]], [held[0], held[-1]])
    assert optimizer.counts == counts
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(p.grad is None for p in net.parameters())
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in after[-2]]


def test_a_step_with_rates_of_zero_counts_where_there_is_a_gradient():
    net = model()
    optimizer = wrap(net, sgd(net.parameters(), lr=0.0))
    train(net, optimizer, 2)
    assert optimizer.counts.steps == 2 and optimizer.counts.refreshes == 1


def test_the_state_that_torch_sees_is_by_name_and_the_users_is_the_bases():
    net, optimizer = fresh("adamw", "ekronecker")
    train(net, optimizer, 2)
    state = get_optimizer_state_dict(net, optimizer)
    names = [name for name, _ in net.named_parameters()]
    assert list(state["state"]) == names and state["param_groups"][0]["params"] == names
    assert [name for name in names if "llqr" in state["state"][name]] == names[:1]
    assert optimizer.state is optimizer.base.state
    plain = optimizer.state_dict()
    plain.pop("llqr")
    assert_same(plain, optimizer.base.state_dict())


def test_two_optimizers_of_one_model():
    """Each finds its own."""

    class Pair(torch.nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.first, self.second = model(seed=seed), model(seed=seed + 1)

        def forward(self, x):
            return self.first(x) + self.second(x)

    def made(seed):
        net = Pair(seed)
        bases = [torch.optim.AdamW(part.parameters(), lr=0.01) for part in (net.first, net.second)]
        options = {"loss": "cross_entropy", "refresh_every": 2}
        rules = [[(f"{name}.*", "ekronecker"), ("*", None)] for name in ("first", "second")]
        pairs = zip(bases, rules, strict=True)
        return net, [lq.LLQR(net, base, structure=rule, **options) for base, rule in pairs]

    def run(net, optimizers, first):
        for i in range(first, first + 4):
            x, y = batch(seed=10 + i)
            for optimizer in optimizers:
                if optimizer.refresh_due:
                    optimizer.refresh(x, y)
                optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()

    net, optimizers = made(0)
    run(net, optimizers, 0)
    weights, state = copy.deepcopy(get_state_dict(net, optimizers))
    run(net, optimizers, 4)
    twin, resumed = made(7)
    set_state_dict(twin, resumed, model_state_dict=weights, optim_state_dict=state)
    run(twin, resumed, 4)
    for one, other in zip(optimizers, resumed, strict=True):
        assert_same(snapshot(twin, other), snapshot(net, one))


@pytest.mark.parametrize("flat", [False, True])
def test_what_is_missing_or_wrong_is_refused(flat):
    how = StateDictOptions(flatten_optimizer_state_dict=flat)
    net, optimizer = fresh("adamw", "kronecker, mid-refresh")
    train(net, optimizer, 3)
    optimizer.zero_grad()
    good = get_optimizer_state_dict(net, optimizer, options=how)

    def without(state, what):
        state = copy.deepcopy(state)
        if flat:
            return {key: value for key, value in state.items() if what not in key}
        own = state["state"]["0.weight"]
        if what == "llqr":
            own.pop("llqr")
        elif what == "rest":
            own["llqr"].pop("rest")
        else:
            own["llqr"]["tensors"].pop("1")
        return state

    for what, match in {
        "llqr": "no state of an LLQR|incomplete",
        "rest": "incomplete",
        "tensors.1": "incomplete",
    }.items():
        twin, resumed = fresh("adamw", "kronecker, mid-refresh", seed=5)
        before, counts = snapshot(twin, resumed), resumed.counts
        with pytest.raises(ValueError, match=match):
            set_optimizer_state_dict(twin, resumed, without(good, what), options=how)
        after = snapshot(twin, resumed)
        assert_same([after[0], after[-1]], [before[0], before[-1]])
        assert resumed.counts == counts
    twin, resumed = fresh("adamw", "ekronecker")
    with pytest.raises(ValueError, match=r"incomplete|structure"):
        set_optimizer_state_dict(twin, resumed, copy.deepcopy(good), options=how)


def test_a_plain_optimizers_state_is_refused():
    net = model()
    base = torch.optim.AdamW(net.parameters(), lr=0.01)
    state = get_optimizer_state_dict(net, base)
    twin, resumed = fresh("adamw", "ekronecker")
    with pytest.raises(ValueError, match="no state of an LLQR"):
        set_optimizer_state_dict(twin, resumed, state)
