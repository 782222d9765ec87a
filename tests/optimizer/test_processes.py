"""Other processes: replicas are refused, since LLQR does not average over them yet."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from optimizer.cases import assert_same, backward, batch, model, sgd, snapshot, wrap


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)


ACTIONS = {
    "refresh": lambda net, optimizer: optimizer.refresh(*batch()),
    "step": lambda net, optimizer: optimizer.step(),
    "closure": lambda net, optimizer: optimizer.step(lambda: backward(net, *batch())),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.usefixtures("two_processes")
def test_a_second_process_is_an_error_before_anything_changes(action):
    net = model()
    optimizer = wrap(net, refresh_every=1)
    backward(net, *batch())
    before, counts = snapshot(net, optimizer), optimizer.counts
    with pytest.raises(RuntimeError, match=r"2 processes.*process_group=None"):
        ACTIONS[action](net, optimizer)
    assert_same(snapshot(net, optimizer), before)
    assert optimizer.counts == counts


@pytest.mark.usefixtures("two_processes")
def test_a_subspace_step_is_refused_too():
    net = model()
    optimizer = wrap(net, step="subspace")
    before = snapshot(net, optimizer)
    with pytest.raises(RuntimeError, match="process_group=None"):
        optimizer.step(*batch())
    assert_same(snapshot(net, optimizer), before)


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize("options", [{}, {"step": "subspace"}, {"structure": "identity"}])
def test_none_says_that_every_process_has_its_own_model(options):
    net = model()
    optimizer = wrap(net, process_group=None, **options)
    optimizer.refresh(*batch())
    backward(net, *batch())
    optimizer.step(*(batch() if options.get("step") else ()))
    assert optimizer.counts.steps == 1 and optimizer.counts.skipped == 0


def test_one_process_is_no_replica(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    net = model()
    assert wrap(net).refresh(*batch())


def test_a_group_is_not_yet_taken():
    with pytest.raises(ValueError, match=r"process_group is a str.*None"):
        wrap(model(), process_group="world")


def _replica(rank, path):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        net = model()
        optimizer = wrap(net, sgd(net.parameters()))
        with pytest.raises(RuntimeError, match="2 processes"):
            optimizer.refresh(*batch())
        own = wrap(net, sgd(net.parameters()), process_group=None)
        assert own.refresh(*batch(seed=rank))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_real_processes():
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "meet")
        mp.spawn(_replica, args=(path,), nprocs=2, join=True)
    assert not dist.is_initialized() and torch.is_grad_enabled()
