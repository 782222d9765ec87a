"""The base optimizer through M: against hand computation, and as any torch optimizer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from optimizer.cases import (
    assert_same,
    backward,
    batch,
    flat,
    gradient,
    loss_of,
    model,
    sgd,
    snapshot,
    train,
    weights,
    wrap,
)
from small_models import relative
from torch import nn

import llqr_mf as lq

BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}
EXACT = 1e-12
"""Float64, a few products of size 50, factors of order one: rounding alone."""


def refreshed(net, base=None, **options):
    optimizer = wrap(net, base, **options)
    assert optimizer.refresh(*batch(seed=9))
    return optimizer


def blocks_of_layers(net):
    """Slices of the flat weights, layer by layer (a Linear is a layer)."""
    made, start = [], 0
    for layer in (m for m in net if isinstance(m, nn.Linear)):
        size = sum(p.numel() for p in layer.parameters())
        made.append(slice(start, start + size))
        start += size
    return made


# ---- the identity is the base optimizer


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precondition", ["gradient", "update"])
def test_identity_is_the_base_bit_for_bit(base, dtype, precondition):
    nets = [model(dtype), model(dtype)]
    plain = BASES[base](nets[0].parameters())
    wrapped = wrap(
        nets[1], BASES[base](nets[1].parameters()), structure="identity", precondition=precondition
    )
    assert not wrapped.refresh_due and not wrapped.refresh(*batch(dtype=dtype))
    for net, optimizer in zip(nets, (plain, wrapped), strict=True):
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
        for i in range(8):
            backward(net, *batch(seed=i, dtype=dtype))
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            schedule.step()
    assert_same(nets[0].state_dict(), nets[1].state_dict())
    mine = wrapped.state_dict()
    mine.pop("llqr")
    assert_same(plain.state_dict(), mine)


def test_what_the_identity_stands_on_is_left_to_the_base():
    """Also where its layer is grafted, and its weight decay is not taken for decoupled."""
    for precondition in ("gradient", "update"):
        nets = [model(), model()]
        plain = BASES["sgd"](nets[0].parameters())
        rules = [("*.weight", "diagonal"), ("*", None)]
        base = BASES["sgd"](nets[1].parameters())
        wrapped = refreshed(nets[1], base, structure=rules, precondition=precondition)
        for net, optimizer in zip(nets, (plain, wrapped), strict=True):
            backward(net, *batch())
            optimizer.step()
        assert torch.equal(nets[0][0].bias, nets[1][0].bias)
        assert not torch.equal(nets[0][0].weight, nets[1][0].weight)
        assert [g["weight_decay"] for g in base.param_groups] == [0.01]
        assert [len(g["params"]) for g in base.param_groups] == [4]


# ---- steps by hand


@pytest.mark.parametrize("structure", ["ekronecker", "kronecker", "diagonal", "scalar"])
def test_gradient_is_preconditioned_and_decay_is_not(structure):
    net = model()
    base = sgd(net.parameters(), weight_decay=0.3)
    optimizer = refreshed(net, base, structure=structure, graft="none")
    backward(net, *batch())
    before, g, M = weights(net), gradient(net), optimizer.structure.to_dense()
    optimizer.step()
    wanted = before - 0.1 * (M @ g + 0.3 * before)
    assert relative(weights(net), wanted) < EXACT


def test_update_is_preconditioned_and_decay_is_not():
    net, twin = model(), model()
    base = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.3)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.05, weight_decay=0.0)
    optimizer = refreshed(net, base, graft="none", precondition="update")
    for i in range(3):
        backward(net, *batch(seed=i))
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            q.data.copy_(p.data)
            q.grad = p.grad.clone()
        before = weights(net)
        plain.step()
        update = weights(twin) - before
        optimizer.step()
        wanted = before * (1 - 0.05 * 0.3) + optimizer.structure.to_dense() @ update
        assert relative(weights(net), wanted) < EXACT


@pytest.mark.parametrize("precondition", ["gradient", "update"])
def test_graft_keeps_the_norm_of_every_layer(precondition):
    net = model()
    optimizer = refreshed(net, precondition=precondition)
    backward(net, *batch())
    before, g, M = weights(net), gradient(net), optimizer.structure.to_dense()
    optimizer.step()
    step, made = weights(net) - before, M @ g
    for block in blocks_of_layers(net):
        wanted = -0.1 * made[block] * (g[block].norm() / made[block].norm())
        assert relative(step[block], wanted) < EXACT


@pytest.mark.parametrize("limit", [1e-6, 1e6])
@pytest.mark.parametrize("precondition", ["gradient", "update"])
def test_graft_kl(limit, precondition):
    net = model()
    groups = [{"params": net[0].parameters(), "lr": 0.2}, {"params": net[2].parameters()}]
    options = {"graft": "kl", "kl_limit": limit, "precondition": precondition}
    optimizer = refreshed(net, sgd(groups), **options)
    backward(net, *batch())
    before, g, M = weights(net), gradient(net), optimizer.structure.to_dense()
    optimizer.step()
    rates = torch.full_like(g, 0.1)
    rates[blocks_of_layers(net)[0]] = 0.2
    made = M @ g
    size = (rates**2 * g * made).sum()
    wanted = -rates * made * min(1.0, float((limit / size).sqrt()))
    assert relative(weights(net) - before, wanted) < 1e-8  # 1e-16 of the weights, of small steps


def test_a_layer_of_zero_gradient_does_not_move():
    net = model()
    optimizer = refreshed(net)
    for name, p in net.named_parameters():
        p.grad = torch.full_like(p, float(name.startswith("0.")))
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    same = [torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)]
    assert same == [False, False, True, True] and optimizer.counts.skipped == 0


@pytest.mark.parametrize("structure", ["ekronecker", "low_rank"])
def test_grad_is_the_raw_gradient_object_afterwards(structure):
    net = model()
    recipe = lq.optimizer.Recipe(learn="cg") if structure == "low_rank" else None
    optimizer = wrap(net, structure=structure, recipe=recipe)
    optimizer.refresh(*batch())
    for precondition in ("gradient", "update"):
        optimizer._wrapped.precondition = precondition
        backward(net, *batch())
        held = [p.grad for p in net.parameters()]
        values = [g.clone() for g in held]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(net.parameters(), held, strict=True))
        assert_same(held, values)


# ---- which parameters


def test_groups_frozen_absent_and_unused_parameters():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.absent, self.unused = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 4)
            self.frozen = nn.Linear(4, 4)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.absent(torch.tanh(self.frozen(self.used(x))))

    net = Net().double()
    held = [net.used.weight, net.used.bias, *net.unused.parameters(), *net.frozen.parameters()]
    groups = [{"params": held[:1], "lr": 0.5, "weight_decay": 0.1}, {"params": held[1:]}]
    optimizer = refreshed(net, sgd(groups), structure="diagonal", graft="none")
    before = copy.deepcopy(net.state_dict())
    backward(net, *batch())
    M = optimizer.structure.tensors
    optimizer.step()
    w, b = before["used.weight"], before["used.bias"]
    after = net.state_dict()
    step = M["used.weight.diagonal"] * net.used.weight.grad + 0.1 * w
    assert relative(after["used.weight"], w - 0.5 * step) < EXACT
    wanted = b - 0.1 * M["used.bias.diagonal"] * net.used.bias.grad
    assert relative(after["used.bias"], wanted) < EXACT
    for name in ("absent", "unused", "frozen"):
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    assert net.unused.weight.grad is None


def test_a_group_added_later_and_parameters_of_no_model():
    net, extra = model(), nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = refreshed(net, sgd([net[0].weight]))
    optimizer.add_param_group({"params": [net[2].weight], "lr": 0.3})
    optimizer.add_param_group({"params": [extra], "lr": 1.0})
    assert (
        optimizer.param_groups is optimizer.base.param_groups and len(optimizer.param_groups) == 3
    )
    assert "no parameter of the model" in str(optimizer.coverage)
    before = weights(net)
    backward(net, *batch())
    extra.grad = torch.ones_like(extra)
    optimizer.step()
    assert extra.tolist() == [0, 0]
    moved = (weights(net) - before).split([p.numel() for p in net.parameters()])
    assert [bool(part.any()) for part in moved] == [True, False, True, False]


def test_sparse_gradients():
    net = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    x, y = torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1])
    optimizer = lq.LLQR(net, base, loss="cross_entropy")
    F.cross_entropy(net(x), y).backward()
    before = snapshot(net, optimizer)
    with pytest.raises(ValueError, match=r"'0.weight' is sparse.*sparse=False"):
        optimizer.step()
    assert_same(snapshot(net, optimizer), before)
    rules = [("0.weight", None), ("*", "ekronecker")]
    optimizer = lq.LLQR(net, base, loss="cross_entropy", structure=rules)
    optimizer.step()
    assert optimizer.counts.skipped == 0
    net[0].weight.grad = net[0].weight.grad * float("inf")
    optimizer.step()
    assert "'0.weight'" in optimizer.counts.reason


# ---- as any torch optimizer


def test_scheduler_clipping_and_zero_grad():
    net = model()
    optimizer = refreshed(net)
    assert isinstance(optimizer, torch.optim.Optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    sizes = []
    for _ in range(3):
        backward(net, *batch())
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        before = weights(net)
        optimizer.step()
        schedule.step()
        sizes.append(float((weights(net) - before).norm()))
    # Grafting keeps the clipped norm, so the rate alone is left.
    assert sizes == pytest.approx([1e-4, 0.5e-4, 0.25e-4], rel=1e-2)
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_grad_scaler_on_the_cpu():
    nets, ends = [model(torch.float32), model(torch.float32)], []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for net, scaled in zip(nets, (False, True), strict=True):
        optimizer = wrap(net)
        optimizer.refresh(*batch(dtype=torch.float32))
        for i in range(4):
            optimizer.zero_grad()
            loss = loss_of(net, *batch(seed=i, dtype=torch.float32))
            if not scaled:
                loss.backward()
                optimizer.step()
                continue
            scaler.scale(loss).backward()
            if i == 2:
                net[0].weight.grad[0, 0] = float("inf")
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1e6)
            scaler.step(optimizer)
            scaler.update()
        ends.append((weights(net), optimizer.counts))
    # The scaler itself leaves out the step with the infinite gradient, and halves its scale.
    assert [end[1].steps for end in ends] == [4, 3] and ends[1][1].skipped == 0
    assert scaler.get_scale() == 512.0
    assert 0 < relative(ends[1][0], ends[0][0]) < 0.2


def test_closures_and_hooks_run_once():
    net = model()
    optimizer = refreshed(net)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        calls.append("closure")
        return backward(net, *batch())

    before = weights(net)
    loss = optimizer.step(closure)
    assert calls == ["pre", "closure", "post"]
    assert float(loss.detach()) > 0 and not torch.equal(weights(net), before)
    assert optimizer.counts.steps == 1


def test_copies_are_refused_and_repr_names_both():
    optimizer = wrap(model())
    for copied in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            copied(optimizer)
    assert "ekronecker" in repr(optimizer) and "SGD" in repr(optimizer)


def test_autocast_around_a_refresh_does_not_lower_its_precision():
    net = model(torch.float32)
    x, y = batch(dtype=torch.float32)
    made = []
    for enabled in (False, True):
        optimizer = wrap(net)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert optimizer.refresh(x, y)
        made.append(optimizer.structure.state_dict())
    assert_same(*made)


def test_bfloat16_parameters_keep_float32_statistics_and_bfloat16_gradients():
    net = model(torch.bfloat16)
    optimizer = wrap(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
    train(net, optimizer, 3, dtype=torch.bfloat16)
    assert {t.dtype for t in optimizer.structure.tensors.values()} == {torch.float32}
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert optimizer.counts.skipped == 0 and bool(flat(net.parameters()).isfinite().all())
