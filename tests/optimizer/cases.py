"""What the optimizer's tests share."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from small_models import mlp, normal

import llqr_mf as lq

WIDTHS = (4, 5, 3)


def batch(n=8, seed=1, dtype=torch.float64):
    targets = torch.arange(n) % WIDTHS[-1]
    return normal(n, WIDTHS[0], seed=seed, dtype=dtype), targets


def model(dtype=torch.float64, seed=0):
    return mlp(*WIDTHS, dtype=dtype, seed=seed)


def sgd(parameters, **options):
    return torch.optim.SGD(parameters, **{"lr": 0.1, **options})


def wrap(net, base=None, **options):
    """LLQR over SGD of rate 0.1, exact moments."""
    recipe = options.pop("recipe", lq.optimizer.Recipe(samples=None))
    base = sgd(net.parameters()) if base is None else base
    return lq.LLQR(net, base, loss="cross_entropy", recipe=recipe, **options)


def loss_of(net, x, y):
    return F.cross_entropy(net(x), y)


def backward(net, x, y):
    for p in net.parameters():
        p.grad = None
    loss = loss_of(net, x, y)
    loss.backward()
    return loss


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def weights(net):
    return flat(net.parameters())


def gradient(net):
    return flat(p.grad for p in net.parameters())


def train(net, optimizer, steps, *, first=0, dtype=torch.float64):
    """A plain loop, a fresh batch at every step."""
    for i in range(first, first + steps):
        x, y = batch(seed=10 + i, dtype=dtype)
        if optimizer.refresh_due:
            optimizer.refresh(x, y)
        backward(net, x, y)
        optimizer.step()


def train_subspace(net, optimizer, steps, *, first=0, dtype=torch.float64):
    for i in range(first, first + steps):
        optimizer.step(*batch(seed=10 + i, dtype=dtype))


def snapshot(net, optimizer):
    """Everything that a skipped step or a refused refresh must leave as it was."""
    own = optimizer.state_dict()
    held = list(net.parameters()), list(net.buffers()), own["state"], own["param_groups"]
    names = ("structure", "factors", "schedule", "generator", "subspace")
    return copy.deepcopy((*held, {name: own["llqr"][name] for name in names}))


def assert_same(a, b):
    """Bit for bit, through nested containers."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b or (a != a and b != b)
