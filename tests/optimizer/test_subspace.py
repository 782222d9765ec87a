"""Subspace steps against a dense computation, and what they leave of a model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from optimizer.cases import (
    assert_same,
    batch,
    model,
    sgd,
    train_subspace,
    weights,
    wrap,
)
from small_models import F64, NETWORKS, Oracle, network, output_hessian, relative, seeded
from torch import nn

import llqr_mf as lq
from llqr_mf.optimizer import Recipe, Subspace

TIGHT = 1e-8
"""Float64. The two- or three-dimensional systems have condition numbers below 1e6."""


def loss(outputs, y):
    return F.cross_entropy(outputs, y)


def dense_curvature(oracle, y, metric):
    if metric == "newton":
        return oracle.hessian(lambda z: loss(z, y))
    J = oracle.jacobian()
    return J.mT @ output_hessian(lambda z: loss(z, y), oracle.outputs) @ J


class DenseSteps:
    """The whole mode by dense algebra: mean of gradients, span, model, schedule."""

    def __init__(self, options, *, decay=0.0, trained=1.0, metric="fisher"):
        self.options, self.metric = options, metric
        self.decay, self.trained = torch.as_tensor(decay), torch.as_tensor(trained)
        self.steps, self.mean, self.count = [], None, 0

    def gradient(self, net, x, y, at):
        twin = copy.deepcopy(net)
        nn.utils.vector_to_parameters(at, twin.parameters())
        g = Oracle(twin, x).gradient(lambda z: loss(z, y))
        return self.trained * (g + self.decay * at)

    def step(self, net, x, y, M, damping, factor):
        options, w = self.options, weights(net)
        g = self.gradient(net, x, y, w)
        mean = g
        if self.mean is not None:
            share = min(options.averaging, 1 - 1 / (self.count + 1))
            old = self.gradient(net, x, y, w - self.steps[0])
            mean = share * (self.mean + g - old) + (1 - share) * g
            if mean @ M @ mean > g @ M @ g:
                mean = g
        S = torch.stack([-self.trained * (M @ mean), *self.steps[: options.memory]], dim=1)
        S = S / S.norm(dim=0)
        H = dense_curvature(Oracle(net, x), y, self.metric)
        H = H + (self.decay * self.trained * torch.ones_like(g)).diag()
        A = S.mT @ H @ S + damping * S.mT @ S
        A = A + options.shrink * A.diagonal().abs().diag()
        values, vectors = torch.linalg.eigh(A)
        # Where the model is convex this is the plain solution.
        c = -vectors @ ((vectors.mT @ (S.mT @ mean)) / values.abs())
        u = factor * (S @ c)
        self.indefinite = bool(values.min() < 0)
        self.mean = mean if options.averaging else None
        self.steps = [u, *self.steps][:2]
        self.count += 1
        self.predicted = -(g @ u + u @ H @ u / 2)
        return w + u


def compare(net, optimizer, dense, *, steps=8, factors=None):
    for i in range(steps):
        x, y = batch(seed=i, n=12)
        damping = optimizer._subspace.state.rule.damping
        before = copy.deepcopy(net)
        optimizer.step(x, y)
        M = optimizer.structure.to_dense()
        factor = 1.0 if factors is None else factors(i)
        wanted = dense.step(before, x, y, M, damping, factor)
        moved = weights(net) - weights(before)
        assert relative(moved, wanted - weights(before)) < TIGHT
    assert optimizer.counts.taken_back == 0


@pytest.mark.parametrize("memory", [0, 1, 2])
@pytest.mark.parametrize("averaging", [0.0, 0.7])
@pytest.mark.parametrize("structure", ["ekronecker", "diagonal", "identity"])
def test_steps_are_the_dense_ones(memory, averaging, structure):
    options = Subspace(memory=memory, averaging=averaging, check_every=1000)
    net = model()
    optimizer = wrap(net, structure=structure, refresh_every=3, step="subspace", subspace=options)
    compare(net, optimizer, DenseSteps(options))
    held = optimizer._subspace.state.steps
    assert len(held) == max(memory, int(averaging > 0))


@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
def test_metrics(metric):
    """With Newton's, H is not from the outputs alone, and its model may have no minimum."""
    options, net = Subspace(damping=1e-4, shrink=0.1, check_every=1000), model()
    optimizer = wrap(
        *(net,), structure="identity", metric=metric, step="subspace", subspace=options
    )
    dense = DenseSteps(options, metric=metric)
    indefinite = []
    for i in range(8):
        compare_once(net, optimizer, dense, i)
        indefinite.append(dense.indefinite)
    assert any(indefinite) == (metric == "newton")


def compare_once(net, optimizer, dense, i):
    x, y = batch(seed=i, n=3)
    before = copy.deepcopy(net)
    damping = optimizer._subspace.state.rule.damping
    optimizer.step(x, y)
    wanted = dense.step(before, x, y, optimizer.structure.to_dense(), damping, 1.0)
    assert relative(weights(net) - weights(before), wanted - weights(before)) < TIGHT


def test_costs_of_other_layers_are_in_the_model():
    net, options = model(), Subspace(averaging=0.0, memory=0)
    metric = lq.metrics.StateCosts({"0": 2.0})
    optimizer = wrap(net, structure="identity", metric=metric, step="subspace", subspace=options)
    x, y = batch()
    before, w = copy.deepcopy(net), weights(net)
    optimizer.step(x, y)
    g = Oracle(before, x).gradient(lambda z: loss(z, y))
    J = Oracle(before[0], x).jacobian()
    H = dense_curvature(Oracle(before, x), y, "fisher")
    H[: J.shape[1], : J.shape[1]] += 2.0 / len(x) * J.mT @ J
    s = -g / g.norm()
    c = -(s @ g) / ((s @ H @ s + options.damping) * (1 + options.shrink))
    assert relative(weights(net) - w, c * s) < TIGHT


# ---- what the base optimizer's groups say


@pytest.mark.parametrize("uneven", [False, True])
def test_weight_decay_schedule_and_untrained_parameters(uneven):
    net, options = model(), Subspace(check_every=2)
    first = {"params": [net[0].weight, net[0].bias], "weight_decay": 0.05}
    second = {"params": [net[2].weight], "weight_decay": 0.2 if uneven else 0.05}
    held = [first, second] if uneven else [{**first, "params": [*net.parameters()]}]
    base = sgd(held)
    # A structure that couples weight and bias: the bias is not to move with its weight.
    optimizer = wrap(
        *(net, base), refresh_every=3, step="subspace", subspace=options, max_state=None
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))
    decay, trained = torch.full((43,), 0.05, dtype=F64), torch.ones(43, dtype=F64)
    if uneven:
        decay[25:40], trained[40:] = 0.2, 0.0
    dense = DenseSteps(options, decay=decay, trained=trained)
    bias = net[2].bias.detach().clone()

    def factor(i):
        schedule.step()
        return 1 / (1 + i)

    for i in range(6):
        x, y = batch(seed=i, n=12)
        before, state = copy.deepcopy(net), optimizer._subspace.state
        checked, damping = state.count % 2 == 0, state.rule.damping
        optimizer.step(x, y)
        wanted = dense.step(before, x, y, optimizer.structure.to_dense(), damping, factor(i))
        assert relative(weights(net) - weights(before), wanted - weights(before)) < TIGHT
        if checked:
            values = [
                loss(n(x), y) + (trained * decay * weights(n) ** 2).sum() / 2 for n in (before, net)
            ]
            ratio = float((values[0] - values[1]).detach() / dense.predicted)
            # A difference of losses of order one, over steps that the schedule makes small.
            assert optimizer._subspace.state.rule.ratio == pytest.approx(ratio, rel=1e-6)
    assert torch.equal(net[2].bias, bias) == uneven


# ---- taking back


def test_a_step_that_raises_the_loss_is_taken_back_bit_for_bit():
    net = model()
    optimizer = wrap(net, step="subspace", subspace=Subspace(check_every=1))
    train_subspace(net, optimizer, 3)
    held, damping = weights(net), optimizer._subspace.state.rule.damping
    state = optimizer._subspace.state
    # A mean that points uphill, and is short enough not to be found astray.
    x, y = batch(seed=50)
    g = Oracle(net, x).gradient(lambda z: loss(z, y))
    optimizer._subspace.options = Subspace(check_every=1, averaging=0.99)
    state.count, state.mean, state.steps = 1000, -0.5 * g, [torch.zeros_like(held)]
    optimizer.step(x, y)
    assert torch.equal(weights(net), held)
    assert optimizer.counts.taken_back == 1 and optimizer.counts.skipped == 0
    state = optimizer._subspace.state
    assert state.steps == [] and state.mean is None and state.count == 1000
    assert state.rule.damping == pytest.approx(1.5 * damping)
    optimizer.step(x, y)
    assert not torch.equal(weights(net), held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_remembered_is_what_the_weights_moved_by(dtype):
    net = model(dtype)
    optimizer = wrap(net, step="subspace")
    for i in range(3):
        before = weights(net)
        train_subspace(net, optimizer, 1, first=i, dtype=dtype)
        step = optimizer._subspace.state.steps[0]
        assert step.dtype == torch.float32
        assert torch.equal(step, weights(net).float() - before.float())


def test_checks_come_every_so_often():
    net = model()
    optimizer = wrap(net, step="subspace", subspace=Subspace(check_every=3))
    ratios = []
    for i in range(7):
        train_subspace(net, optimizer, 1, first=i)
        ratios.append(optimizer._subspace.state.rule.ratio)
    assert [a != b for a, b in zip([0.0, *ratios], ratios, strict=False)] == [
        *(True, False, False, True, False, False, True)
    ]


# ---- what a model holds besides weights


class Marked(nn.Module):
    """Running statistics or none, and dropout without a module."""

    def __init__(self, norm=True):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()

    def forward(self, x):
        x = torch.tanh(self.norm(self.first(x)))
        return self.last(F.dropout(x, 0.3, self.training))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_and_random_numbers_move_as_in_training(training, norm):
    net = seeded(lambda: Marked(norm)).train(training)
    optimizer = wrap(net, refresh_every=2, step="subspace", recipe=Recipe())
    torch.manual_seed(5)
    for i in range(5):
        if i == 3:  # a switch on the way is followed
            net.train(not training)
        x, y = batch(seed=i, n=12)
        twin, start = copy.deepcopy(net), torch.random.get_rng_state()
        twin(x)
        buffers, rng = dict(twin.named_buffers()), torch.random.get_rng_state()
        torch.random.set_rng_state(start)
        optimizer.step(x, y)
        assert_same(dict(net.named_buffers()), buffers)
        assert torch.equal(torch.random.get_rng_state(), rng)
        assert torch.equal(rng, start) == (not net.training)
    assert optimizer.counts.skipped == 0


def test_the_loss_returned_is_that_of_the_training_pass():
    """With the dropout masks that the model's own pass would have drawn."""
    net = seeded(Marked)
    optimizer = wrap(net, step="subspace", recipe=Recipe())
    x, y = batch(n=12)
    start = torch.random.get_rng_state()
    wanted = loss(copy.deepcopy(net)(x), y)
    torch.random.set_rng_state(start)
    torch.testing.assert_close(optimizer.step(x, y), wanted.detach(), rtol=1e-12, atol=0)


def test_a_model_that_leaves_no_mark_is_not_run_once_more():
    net, calls = model(), []
    optimizer = wrap(net, step="subspace", structure="diagonal", refresh_every=100)
    train_subspace(net, optimizer, 1)
    real = torch.func.functional_call

    def counted(*args, **options):
        calls.append(1)
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.func, "functional_call", counted)
        train_subspace(net, optimizer, 1, first=1)
    assert len(calls) == 1  # the gradient at the last weights


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks_get_better_and_grad_stays(name, dtype):
    net, x, y = network(name)
    net, x = net.to(dtype), x.to(dtype) if x.is_floating_point() else x
    optimizer = wrap(net, structure="kronecker", refresh_every=2, step="subspace")
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    losses = [float(optimizer.step(x, y)) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(bool((p.grad == 1).all()) for p in net.parameters())
    assert optimizer.counts.skipped == 0


def test_autocast_around_a_step_does_not_lower_its_precision():
    nets = [model(torch.float32), model(torch.float32)]
    for net, enabled in zip(nets, (False, True), strict=True):
        optimizer = wrap(net, step="subspace", refresh_every=2)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            train_subspace(net, optimizer, 3, dtype=torch.float32)
    assert torch.equal(*(weights(net) for net in nets))


def test_arguments():
    net = model()
    optimizer = wrap(net, step="subspace")
    x, y = batch()
    with pytest.raises(ValueError, match=r"optimizer.step\(inputs, targets\)"):
        optimizer.step(x)
    with pytest.raises(ValueError, match=r"optimizer.step\(inputs, targets\)"):
        optimizer.step()
    with pytest.raises(ValueError, match="step='subspace'"):
        wrap(net).step(x, y)
    for bad in ({"memory": -1}, {"damping": 0.0}, {"shrink": -1.0}, {"averaging": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Subspace(**bad)
    with pytest.raises(ValueError, match="check_every"):
        Subspace(check_every=0)
