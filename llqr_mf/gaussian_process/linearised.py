"""A network linearised at inputs alone: J without a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..losses import Loss
from ..network import Layer
from ..operators.diagonal_curvature import DiagonalCurvature
from ..operators.output_curvature import OutputCurvature
from ..problem import LQRProblem


@dataclass(frozen=True)
class NoLoss(Loss):
    """Zero, with the curvature I: a problem made with it is there for its Jacobian."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Anything goes."""

    def count(self, outputs: Tensor, targets: Tensor) -> int:
        """N."""
        return len(outputs)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Zero."""
        return outputs.new_zeros(())

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(outputs)

    def hessian(self, outputs: Tensor, targets: Tensor) -> OutputCurvature:
        """I."""
        one = outputs.new_ones(())
        return DiagonalCurvature(outputs.new_empty(0), diagonal=one.expand(outputs.shape))

    def fisher(self, outputs: Tensor, targets: Tensor) -> OutputCurvature:
        """I."""
        return self.hessian(outputs, targets)

    def sample_gradients(
        self, outputs: Tensor, targets: Tensor, samples: int, generator: torch.Generator
    ) -> Tensor:
        """Refused."""
        raise NotImplementedError("a network linearised without a loss has no output distribution.")


def linearised(
    layers: Sequence[Layer], inputs: Any, *, damping: Any = 1.0, columns: int | None = None
) -> LQRProblem:
    """A problem of inputs without targets, for its `output_jacobian` and tangent kernels.

    Args:
        layers: All layers of `split(model)`.
        inputs: One batch, samples first; a tuple of tensors for several inputs.
        damping: R, as in `LQRProblem.from_network`.
        columns: Likewise.
    """
    batch = inputs if isinstance(inputs, tuple) else (inputs,)
    samples = next((len(x) for x in batch if isinstance(x, Tensor) and x.ndim), 0)
    device = next((x.device for x in batch if isinstance(x, Tensor)), torch.device("cpu"))
    return LQRProblem.from_network(
        layers,
        inputs,
        torch.zeros(samples, device=device),
        loss=NoLoss(),
        damping=damping,
        columns=columns,
    )


def output_width(problem: LQRProblem) -> int:
    """D, a sample's outputs."""
    assert problem.origin is not None
    return math.prod(problem.origin.outputs.shape[1:])


def unit_columns(problem: LQRProblem, start: int, stop: int) -> Tensor:
    """Unit vectors of every sample's flat output, (stop - start, *output)."""
    assert problem.origin is not None
    shape = problem.origin.outputs.shape
    unit = problem.system.proto.new_zeros(stop - start, shape[0], output_width(problem))
    unit[torch.arange(stop - start), :, torch.arange(start, stop)] = 1
    return unit.reshape(stop - start, *shape)
