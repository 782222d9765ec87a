"""Code that is hard to read: functions, overwriting, branches, hooks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from zoo_base import N, net, normal


class Functional(nn.Module):
    """Reshapes, splits, stacks, constants in a concatenation, products, powers, quotients."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.scale = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.randn(1, 2), requires_grad=False)
        self.linear = nn.Linear(8, 2)
        self.register_buffer("offset", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.frozen.expand(x.shape[0], -1)], dim=1)
        a, b = (x @ self.w).split(2, dim=1)
        c = torch.stack([a.relu() * b, self.scale * a - b, torch.ones_like(b)], dim=1)
        c = c / (1 + b.square().sum(-1, keepdim=True).unsqueeze(1)) + self.offset[:, None]
        flat = c.permute(0, 2, 1).reshape(c.size(0), -1)
        flat = torch.where(flat > 2, flat**3 / 9, F.softplus(flat))
        return self.linear(F.pad(flat, (1, 1), value=0.5)).log_softmax(-1)


@net()
def functional():
    return Functional(), normal(N, 4)


class InPlace(nn.Module):
    """Every kind of overwriting; the last one through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x.tanh_()
        self.seen.copy_(x.detach().mean(0))
        y = self.second(x)
        y += x
        y *= 0.5
        y **= 2
        return self.third(F.leaky_relu_(y - 0.1))


@net()
def in_place():
    return InPlace(), normal(N, 3)


@net()
def in_place_through_view():
    """Not a chain of new values: one layer."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y[:, :2].mul_(2).add_(1)
            return self.second(torch.tanh(y))

    return Model(), normal(N, 3)


@net()
def view_of_overwritten():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.second = nn.Linear(3, 4), nn.ReLU(True), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            part = y[:, :2]
            self.act(y)
            return self.second(part) + y.sum()

    return Model(), normal(N, 3)


@net()
def item_assignment():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y[:, 0] = 2 * y[:, 1]
            return self.second(torch.tanh(y))

    return Model(), normal(N, 3)


class Branch(nn.Module):
    """Python control flow on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if h.sum() > -1e9:
            h = h.tanh_()
        return self.second(h)


@net()
def control_flow():
    return Branch(), normal(N, 3)


@net()
def control_flow_inside():
    """Only the branching block is one layer, and it overwrites its input."""

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            x += self.by**2
            return x if x.sum() > 1e9 else x.exp()

    return nn.Sequential(nn.Linear(3, 4), Shift(), nn.Linear(4, 2)), normal(N, 3)


@net()
def optional_argument():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
            h = self.linear(x) * scale
            return torch.tanh(h if mask is None else h * mask)

    return Model(), normal(N, 3)


@net()
def mutating():
    """The forward keeps a counter, a list and the last activation."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
            self.calls, self.seen, self.last = 0, [], None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(self.calls)
            self.last = torch.tanh(self.first(x))
            return self.second(self.last)

    return Model(), normal(N, 3)


@net()
def energy():
    """The output is itself a derivative, taken in the forward."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                value = self.second(torch.tanh(self.first(x))).sum()
                return torch.autograd.grad(value, x, create_graph=True)[0]

    return Model(), normal(N, 3)


@net()
def decoder():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(4, 2, 6, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.layer(x, memory)

    return Model(), (normal(2, 3, 4), normal(2, 3, 4))


@net()
def checkpointed():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            part = torch.utils.checkpoint.checkpoint
            return self.second(part(lambda y: self.first(y).tanh(), x, use_reentrant=False))

    return Model(), normal(N, 3)


@net()
def unrolled_cell():
    """The same cell at three times; a dictionary on the way."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRUCell(2, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            state = {"h": x.new_zeros(x.size(0), 3)}
            for t in range(3):
                state["h"] = self.cell(x[:, t], state["h"])
            return self.head(state["h"])

    return Model(), normal(N, 3, 2)


@net(train=True)
def random_features():
    """Random numbers that the model draws itself, and stochastic depth."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h = h + 0.1 * torch.randn_like(h)
            keep = h.new_empty((h.shape[0],) + (1,) * (h.ndim - 1)).bernoulli_(0.8).div_(0.8)
            return self.second(torch.tanh(h) * keep)

    return Model(), normal(N, 3)


@net()
def weight_norm():
    norm = torch.nn.utils.parametrizations.weight_norm
    return nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), norm(nn.Linear(4, 2))), normal(N, 3)


@net()
def spectral_norm():
    norm = torch.nn.utils.parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)), normal(N, 3)


def _double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


@net()
def hooked():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].register_forward_hook(_double)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    return model, normal(N, 3)


@net(train=True)
def hooked_batch_norm():
    """One call, whose running statistics and counter must not move."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2))
    model[1].register_forward_hook(_double)
    return model, normal(N, 3)


@net()
def fourier():
    """Complex values inside."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 3, 2))
            self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            spectrum = torch.fft.rfft(self.first(x), norm="ortho")
            mixed = spectrum * torch.view_as_complex(self.w)[0]
            return self.head(torch.fft.irfft(mixed, n=4, norm="ortho").tanh())

    return Model(), normal(N, 4)
