"""What the networks of the zoo are made with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

Case = tuple[nn.Module, Any, Tensor, str]
"""Model, inputs (a tensor or a tuple), targets, name of the loss."""

ZOO: dict[str, Callable[[], Case]] = {}

N, CLASSES = 4, 3


def net(*, loss: str = "mse", train: bool = False) -> Callable[..., Callable[[], Case]]:
    """Registers a function that returns a model and its inputs; targets fit the model's output."""

    def decorate(make: Callable[[], tuple[nn.Module, Any]]) -> Callable[[], Case]:
        def case() -> Case:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model, inputs = make()
                model = model.double().train(train)
                _disturb(model)
                shape = output_shape(model, inputs)
                if loss == "cross_entropy":
                    targets = torch.randint(shape[-1], shape[:-1])
                elif loss == "bce_with_logits":
                    targets = torch.rand(shape, dtype=torch.float64)
                else:
                    targets = torch.randn(shape, dtype=torch.float64)
            return model, inputs, targets, loss

        ZOO[make.__name__] = case
        return case

    return decorate


def output_shape(model: nn.Module, inputs: Any) -> torch.Size:
    """Shape of the model's output, seen on a model whose buffers may move."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with torch.no_grad():
        return torch.func.functional_call(model, buffers, as_tuple(inputs)).shape


def as_tuple(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _disturb(model: nn.Module) -> None:
    """Norms' and biases' ones and zeros would hide errors."""
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(0.1 * torch.randn_like(p))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.normal_(std=0.3)
            if name.endswith("running_var"):
                b.uniform_(0.5, 1.5)


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class First(nn.Module):
    """The first of a module's outputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]
