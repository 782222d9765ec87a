"""Dense derivatives of a model by plain autograd, one row or column at a time.

Nothing here is vmapped: design.md section 6 says which compositions are wrong. The model runs as a
copy from the caller's random state, so neither it nor the random numbers move.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from networks import as_tuple
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[Tensor], Tensor]
"""From the model's output to a scalar."""


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def forward(model: nn.Module, inputs: Any, step: Tensor | None = None) -> tuple[Tensor, list]:
    """The output with its graph, and the copy's parameters, after a flat step."""
    twin = copy.deepcopy(model)
    parameters = trainable(twin)
    if step is not None:
        with torch.no_grad():
            sizes = [p.numel() for p in parameters]
            for p, part in zip(parameters, step.split(sizes), strict=True):
                p.add_(part.reshape(p.shape))
    given = tuple(x.clone() if isinstance(x, Tensor) else x for x in as_tuple(inputs))
    with (
        torch.random.fork_rng(devices=[]),
        sdpa_kernel(SDPBackend.MATH),
        torch.enable_grad(),
        mock.patch.object(torch, "_weight_norm", plain_weight_norm),
    ):
        return twin(*given), parameters


def plain_weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """The fused kernel's second backward is wrong; test_modes.py."""
    axes = [i for i in range(v.ndim) if i != dim]
    return g * v / v.square().sum(axes, keepdim=True).sqrt()


def flat_grad(
    output: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = False
) -> Tensor:
    if not output.requires_grad:
        return torch.cat([torch.zeros_like(p).reshape(-1) for p in parameters])
    parts = torch.autograd.grad(
        output, parameters, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    pairs = zip(parts, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])


def dense_jacobian(model: nn.Module, inputs: Any) -> Tensor:
    """Of the flat output in the flat parameters, row by row."""
    output, parameters = forward(model, inputs)
    return torch.stack([flat_grad(y, parameters) for y in output.reshape(-1)])


def dense_gradient(model: nn.Module, inputs: Any, loss: Loss) -> Tensor:
    output, parameters = forward(model, inputs)
    return flat_grad(loss(output), parameters)


def dense_hessian_columns(model: nn.Module, inputs: Any, loss: Loss, columns: Tensor) -> Tensor:
    """Hessian of the loss times columns (P, k), reverse over reverse, one at a time."""
    output, parameters = forward(model, inputs)
    gradient = flat_grad(loss(output), parameters, create_graph=True)
    return torch.stack([flat_grad(gradient @ v, parameters) for v in columns.mT], dim=1)


def finite_difference_jacobian(
    model: nn.Module, inputs: Any, columns: Tensor, step: float = 1e-5
) -> Tensor:
    """Jacobian times columns (P, k) by central differences."""
    return torch.stack(
        [
            (forward(model, inputs, step * v)[0] - forward(model, inputs, -step * v)[0])
            .detach()
            .reshape(-1)
            / (2 * step)
            for v in columns.mT
        ],
        dim=1,
    )


def finite_difference_hessian(
    model: nn.Module, inputs: Any, loss: Loss, columns: Tensor, step: float = 1e-5
) -> Tensor:
    """Hessian of the loss times columns (P, k), differences of gradients."""

    def gradient(at: Tensor) -> Tensor:
        output, parameters = forward(model, inputs, at)
        return flat_grad(loss(output), parameters)

    differences = [gradient(step * v) - gradient(-step * v) for v in columns.mT]
    return torch.stack(differences, dim=1) / (2 * step)
