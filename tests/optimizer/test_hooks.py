"""Hooks of users run once a call, as on any torch optimizer, and schedulers do not complain."""

from __future__ import annotations

import copy

import pytest
import torch
from optimizer.cases import (
    assert_same,
    backward,
    batch,
    model,
    sgd,
    snapshot,
    train,
    train_subspace,
    weights,
    wrap,
)
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import llqr_mf as lq

MODES = {
    "gradient": {},
    "update": {"precondition": "update"},
    "subspace": {"step": "subspace"},
}
SCHEDULERS = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
}


def run(net, optimizer, steps, first=0):
    subspace = optimizer._mode == "subspace"
    (train_subspace if subspace else train)(net, optimizer, steps, first=first)


@pytest.mark.parametrize("mode", MODES)
def test_step_hooks_run_once_a_step(mode):
    net = model()
    base = sgd(net.parameters())
    optimizer = wrap(net, base, **MODES[mode])
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o))),
        optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", o))),
        base.register_step_post_hook(lambda o, args, kwargs: calls.append(("base", o))),
        register_optimizer_step_pre_hook(lambda o, args, kwargs: calls.append(("all pre", o))),
        register_optimizer_step_post_hook(lambda o, args, kwargs: calls.append(("all post", o))),
    ]
    try:
        run(net, optimizer, 2)
    finally:
        for handle in handles:
            handle.remove()
    middle = [] if mode == "subspace" else [("base", base)]
    before, after = [("all pre", optimizer), ("pre", optimizer)], ["post", "all post"]
    assert calls == 2 * [*before, *middle, *((name, optimizer) for name in after)]
    run(net, optimizer, 1, first=2)
    assert len(calls) == 2 * (4 + len(middle))
    # The hooks of all optimizers are there for the others, and after an exception.
    seen = []
    handle = register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append(o))
    try:
        base.zero_grad()
        base.step()
    finally:
        handle.remove()
    assert seen == [base]


def test_a_base_step_that_raises_leaves_the_hooks_of_all_optimizers():
    net = model()
    base = sgd(net.parameters())
    optimizer, seen = wrap(net, base), []

    def fail(*_):
        raise KeyError("a user's hook")

    base.register_step_pre_hook(fail)
    handle = register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append(o))
    try:
        backward(net, *batch())
        for _ in range(2):
            with pytest.raises(KeyError):
                optimizer.step()
    finally:
        handle.remove()
    assert seen == [optimizer] * 2


@pytest.mark.parametrize("mode", ["gradient", "subspace"])
def test_a_pre_hook_may_change_the_arguments(mode):
    nets = [model(), model()]
    optimizers = [wrap(net, **MODES[mode]) for net in nets]
    losses = []

    def changed(optimizer, args, kwargs):
        if mode == "subspace":
            return (optimizer, *batch(seed=3)), kwargs
        return (optimizer, lambda: losses.append(1) or torch.tensor(1.0)), kwargs

    optimizers[0].register_step_pre_hook(changed)
    if mode == "subspace":
        optimizers[0].step(*batch(seed=4))
        optimizers[1].step(*batch(seed=3))
        assert torch.equal(weights(nets[0]), weights(nets[1]))
    else:
        backward(nets[0], *batch())
        assert float(optimizers[0].step()) == 1.0 and losses == [1]


@pytest.mark.parametrize("mode", MODES)
def test_state_hooks_run_once_a_call_and_may_replace_the_state(mode):
    net = model()
    optimizer = wrap(net, **MODES[mode])
    run(net, optimizer, 2)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append(("before", o)))
    optimizer.register_state_dict_post_hook(lambda o, state: calls.append(("after", o)))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "extra": 1})
    state = copy.deepcopy(optimizer.state_dict())
    assert calls == [("before", optimizer), ("after", optimizer)] and state["extra"] == 1
    calls.clear()
    twin_net = model(seed=1)
    twin = wrap(twin_net, **MODES[mode])

    def rename(o, given):
        calls.append(("load", "extra" in given))
        del given["extra"]

    twin.register_load_state_dict_pre_hook(rename)
    twin.register_load_state_dict_post_hook(lambda o: calls.append(("loaded", o)))
    twin.load_state_dict(state)
    assert calls == [("load", True), ("loaded", twin)]
    assert "extra" in state  # the caller's own mapping is not touched
    twin_net.load_state_dict(net.state_dict())
    assert_same(snapshot(twin_net, twin), snapshot(net, optimizer))


def test_a_load_that_is_refused_runs_no_post_hook():
    net = model()
    optimizer, calls = wrap(net), []
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(1))
    with pytest.raises(ValueError, match="no state of an LLQR"):
        optimizer.load_state_dict(optimizer.base.state_dict())
    assert calls == []


@pytest.mark.parametrize("of", ["llqr", "base"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_do_not_warn(scheduler, mode, of):
    """Pytest turns any warning into an error; a scheduler's says that nothing stepped before it."""
    net = model()
    base = sgd(net.parameters())
    optimizer = wrap(net, base, **MODES[mode])
    schedule = SCHEDULERS[scheduler](optimizer if of == "llqr" else base)
    rates = []
    for i in range(4):
        run(net, optimizer, 1, first=i)
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    alone = sgd(model().parameters())
    other, wanted = SCHEDULERS[scheduler](alone), []
    for _ in range(4):
        alone.step()
        other.step()
        wanted.append(alone.param_groups[0]["lr"])
    assert rates == wanted


def test_a_skipped_first_step_is_a_step_to_schedulers():
    net = model()
    base = sgd(net.parameters())
    optimizer = lq.LLQR(net, base, loss="cross_entropy")
    schedule = lr_scheduler.ExponentialLR(base, 0.5)
    backward(net, *batch())
    net[0].weight.grad.fill_(float("nan"))
    optimizer.step()
    schedule.step()
    assert optimizer.counts.skipped == 1 and base.param_groups[0]["lr"] == 0.05
