"""NaN and infinity: the step is skipped or the refresh refused, and nothing else has changed."""

from __future__ import annotations

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
from small_models import seeded
from torch import nn

import llqr_mf as lq
from llqr_mf.optimizer import running_mean

BAD = [float("nan"), float("inf"), -float("inf")]


def trained(**options):
    net = model()
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer = wrap(net, base, refresh_every=2, **options)
    run = train_subspace if options.get("step") == "subspace" else train
    run(net, optimizer, 3)
    return net, optimizer


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["0.weight", "2.bias"])
@pytest.mark.parametrize("graft", ["layer", "kl", "none"])
@pytest.mark.parametrize("precondition", ["gradient", "update"])
def test_a_bad_gradient_skips_the_step(bad, where, graft, precondition):
    net, optimizer = trained(graft=graft, precondition=precondition)
    backward(net, *batch())
    net.get_parameter(where).grad.view(-1)[1] = bad
    before = snapshot(net, optimizer)
    optimizer.step()
    assert_same(snapshot(net, optimizer), before)
    assert (optimizer.counts.steps, optimizer.counts.skipped) == (4, 1)
    assert optimizer.counts.reason == f"the gradient of '{where}' is NaN or infinite"
    train(net, optimizer, 1, first=4)
    assert optimizer.counts.skipped == 1 and bool(weights(net).isfinite().all())


@pytest.mark.parametrize("structure", ["identity", [("0.weight", "diagonal"), ("*", None)]])
@pytest.mark.parametrize("precondition", ["gradient", "update"])
def test_a_bad_gradient_that_m_does_not_know_skips_the_step_too(structure, precondition):
    net, optimizer = trained(structure=structure, precondition=precondition)
    backward(net, *batch())
    net[2].bias.grad[0] = float("nan")
    before = snapshot(net, optimizer)
    optimizer.step()
    assert_same(snapshot(net, optimizer), before)
    assert optimizer.counts.skipped == 1


def test_a_finite_gradient_that_m_makes_infinite_skips_the_step():
    net = model(torch.float32)
    optimizer = wrap(net, structure="diagonal", graft="none")
    optimizer.structure.tensors["2.bias.diagonal"].fill_(1e30)
    backward(net, *batch(dtype=torch.float32))
    net[2].bias.grad.fill_(1e20)
    before = snapshot(net, optimizer)
    optimizer.step()
    assert_same(snapshot(net, optimizer), before)
    assert optimizer.counts.reason == "M times the gradient is NaN or infinite"
    optimizer._wrapped.precondition = "update"
    held = weights(net)
    optimizer.step()
    assert torch.equal(weights(net), held)
    assert optimizer.counts.reason == "M times the update is NaN or infinite"


@pytest.mark.parametrize("bad", BAD)
def test_a_closure_with_a_bad_loss_skips_the_step(bad):
    net, optimizer = trained()
    before = snapshot(net, optimizer)
    assert torch.equal(optimizer.step(lambda: torch.tensor(bad)), torch.tensor(bad)) or bad != bad
    assert_same(snapshot(net, optimizer), before)
    assert optimizer.counts.skipped == 1 and "loss" in optimizer.counts.reason


# ---- refreshes


def overflow(net):
    """Finite weights of which the model makes infinity."""
    with torch.no_grad():
        net[2].weight.fill_(torch.finfo(net[2].weight.dtype).max / 2)


@pytest.mark.parametrize("structure", ["ekronecker", "kronecker", "diagonal", "scalar"])
@pytest.mark.parametrize("batches", [False, True])
def test_an_overflowing_model_leaves_m_as_it_was(structure, batches):
    net, optimizer = trained(structure=structure)
    due = optimizer.counts.steps
    overflow(net)
    before = snapshot(net, optimizer)
    made = (
        optimizer.refresh(None, batches=[batch()] * 2) if batches else optimizer.refresh(*batch())
    )
    assert not made and not optimizer.refresh_due
    before[-1]["schedule"]["due"] = due + 1
    assert_same(snapshot(net, optimizer), before)
    counts = optimizer.counts
    assert (counts.refreshes, counts.refused) == (2, 1) and "the refresh" in counts.reason


@pytest.mark.parametrize("structure", ["ekronecker", "kronecker", "diagonal", "scalar", "low_rank"])
@pytest.mark.parametrize("learn", ["closed_form", "cg"])
@pytest.mark.parametrize("how", ["nan", "raise", "linalg"])
def test_a_refresh_that_fails_in_its_second_batch_leaves_no_mark(
    structure, learn, how, monkeypatch
):
    """By NaN, a failed eigendecomposition, or an exception of whatever kind."""
    if structure == "low_rank":
        learn = "cg"
    net = model()
    recipe = lq.optimizer.Recipe(learn=learn)
    optimizer = wrap(net, structure=structure, recipe=recipe, refresh_every=1)
    train(net, optimizer, 2)
    real, calls = running_mean.RunningMean.add, []

    def failing(self, problem, weight):
        real(self, problem, weight)
        calls.append(1)
        if len(calls) < 2:
            return
        if how == "raise":
            raise KeyError("what a user's module may raise")
        if how == "linalg":
            torch.linalg.cholesky(-torch.eye(2))
        next(iter(self.structure.tensors.values())).fill_(float("nan"))
        raise running_mean.RefusedError("NaN")

    monkeypatch.setattr(running_mean.RunningMean, "add", failing)
    before, counts = snapshot(net, optimizer), optimizer.counts
    given = {"batches": [batch(seed=1), batch(seed=2), batch(seed=3)]}
    if how == "raise":
        with pytest.raises(KeyError):
            optimizer.refresh(None, **given)
        assert optimizer.counts == counts
    else:
        assert not optimizer.refresh(None, **given)
        assert optimizer.counts.refused == 1
        before[-1]["schedule"]["due"] += 1
    assert_same(snapshot(net, optimizer), before)
    assert len(calls) == 2
    # And as if it had not been: the next one is that of an optimizer that never failed.
    monkeypatch.setattr(running_mean.RunningMean, "add", real)
    assert optimizer.refresh(*batch(seed=4))
    after = optimizer.structure.state_dict()
    twin_net = model()
    twin = wrap(twin_net, structure=structure, recipe=recipe, refresh_every=1)
    train(twin_net, twin, 2)
    twin.refresh(*batch(seed=4))
    assert_same(after, twin.structure.state_dict())


def test_a_first_refresh_that_failed_does_not_count_the_identity_as_the_past():
    nets = [model(), model()]
    optimizers = [wrap(net, structure="diagonal", refresh_every=5) for net in nets]
    held = nets[0][2].weight.detach().clone()
    overflow(nets[0])
    assert not optimizers[0].refresh(*batch())
    with torch.no_grad():
        nets[0][2].weight.copy_(held)
    for net, optimizer in zip(nets, optimizers, strict=True):
        backward(net, *batch())
        optimizer.base.step()
        optimizer.counts = lq.optimizer.Counts(steps=1)
        assert optimizer.refresh_due and optimizer.refresh(*batch(seed=2))
    assert_same(*(o.structure.state_dict() for o in optimizers))


@pytest.mark.parametrize("structure", ["ekronecker", "kronecker", "diagonal"])
@pytest.mark.parametrize("bad", BAD)
def test_a_curvature_that_is_not_finite_is_refused(structure, bad, monkeypatch):
    """Not only outputs that are not finite: the squares overflow before they do."""
    _, optimizer = trained(structure=structure)
    name = "curvature_factors" if structure == "kronecker" else "site_squares"
    real = getattr(running_mean, name)

    def infinite(*args, **options):
        made = real(*args, **options)
        return {
            n: [f * bad for f in each] if not isinstance(each, torch.Tensor) else each * bad
            for n, each in made.items()
        }

    monkeypatch.setattr(running_mean, name, infinite)
    before = optimizer.structure.clone().state_dict()
    assert not optimizer.refresh(*batch())
    assert_same(optimizer.structure.state_dict(), before)


@pytest.mark.parametrize("bad", BAD)
def test_a_batch_that_is_not_finite_is_skipped(bad):
    for options in ({}, {"step": "subspace"}):
        net, optimizer = trained(**options)
        before = snapshot(net, optimizer)
        x, y = batch()
        x[0, 0] = bad
        assert not optimizer.refresh(x, y)
        assert optimizer.counts.refused == 1
        assert "inputs[0] has entries that are NaN or infinite" in optimizer.counts.reason
        if options:
            assert optimizer.step(x, y) is None
            assert optimizer.counts.skipped == 1
        assert_same(snapshot(net, optimizer), before)


@pytest.mark.parametrize("options", [{}, {"step": "subspace"}])
def test_a_batch_without_a_counted_target_is_skipped(options):
    """Torch's own mean over nothing is NaN; a loader of padded texts has such batches."""
    net, optimizer = trained(**options)
    before = snapshot(net, optimizer)
    x, y = batch()
    ignored = torch.full_like(y, -100)
    assert not optimizer.refresh(x, ignored)
    assert not optimizer.refresh(None, batches=[(x, y), (x, ignored)])
    assert optimizer.counts.refused == 2 and "nothing is left" in optimizer.counts.reason
    if options:
        assert optimizer.step(x, ignored) is None
        assert optimizer.counts.skipped == 1
    assert_same(snapshot(net, optimizer), before)
    assert optimizer.refresh(x, y)


# ---- subspace steps


def with_buffers():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))


@pytest.mark.parametrize("where", ["outputs", "loss", "weights"])
def test_a_subspace_step_of_an_overflowing_model_changes_nothing(where):
    net = with_buffers()
    loss = "mse" if where == "loss" else "cross_entropy"
    optimizer = lq.LLQR(
        *(net, sgd(net.parameters())), loss=loss, structure="diagonal", step="subspace"
    )
    x, y = batch()
    y = torch.zeros(8, 3, dtype=x.dtype) if loss == "mse" else y
    optimizer.step(x, y)
    if where == "loss":
        y = torch.full_like(y, 1e200)
    with torch.no_grad():
        if where == "outputs":
            net[2].weight.fill_(torch.finfo(x.dtype).max / 2)
        elif where == "weights":
            net[0].weight[0, 0] = float("nan")
    before = snapshot(net, optimizer)
    optimizer.step(x, y)
    assert_same(snapshot(net, optimizer), before)
    assert (optimizer.counts.steps, optimizer.counts.skipped) == (2, 1) and optimizer.counts.reason


def test_a_subspace_step_that_is_not_finite_forgets_its_memory():
    net, optimizer = trained(step="subspace")
    assert optimizer._subspace.state.steps
    next(iter(optimizer.structure.tensors.values())).fill_(float("nan"))
    held = weights(net)
    optimizer.counts = lq.optimizer.Counts(steps=3)
    optimizer.step(*batch())
    assert torch.equal(weights(net), held)
    state = optimizer._subspace.state
    assert state.steps == [] and state.mean is None
    assert optimizer.counts.reason == "the subspace step is NaN or infinite"
