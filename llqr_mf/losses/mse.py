"""Mean squared error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llqr_mf.operators.diagonal_curvature import DiagonalCurvature
from llqr_mf.operators.output_curvature import at_least_float32

from .base import Loss
from .checks import (
    check_device,
    check_float_targets,
    check_generator,
    check_outputs,
    check_same_shape,
    widen,
)


@dataclass(frozen=True)
class MeanSquaredError(Loss):
    """`torch.nn.functional.mse_loss`: the mean of (y - y*)^2 over samples and outputs.

    As a likelihood it is the Gaussian whose negative log-density is the loss per sample,
    |y_n - y*_n|^2 / D plus a constant: its variance is D/2 per output. One draw is one sample.
    """

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Targets are floating point and of the outputs' shape; both are finite."""
        check_outputs(outputs)
        check_device(outputs, targets)
        check_same_shape(outputs, targets)
        check_float_targets(targets)

    def count(self, outputs: Tensor, targets: Tensor) -> int:
        """N."""
        return len(outputs)

    def mass(self, outputs: Tensor, targets: Tensor) -> float:
        """N*D, also where D, a sequence's length times its width, differs between batches."""
        return float(outputs.numel())

    def fisher_mass(self, outputs: Tensor, targets: Tensor) -> float:
        """N*D, as of the Hessian, which it is."""
        return float(outputs.numel())

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over N*D squares."""
        wide = widen(outputs)
        return torch.nn.functional.mse_loss(wide, targets.to(wide.dtype))

    def hessian(self, outputs: Tensor, targets: Tensor) -> DiagonalCurvature:
        """2/(N D) I."""
        h = torch.full(
            (), 2 / outputs.numel(), dtype=at_least_float32(outputs.dtype), device=outputs.device
        )
        return DiagonalCurvature(outputs.new_empty(0), diagonal=h.expand(outputs.shape))

    def fisher(self, outputs: Tensor, targets: Tensor) -> DiagonalCurvature:
        """2/(N D) I, which is the Hessian."""
        return self.hessian(outputs, targets)

    def sample_gradients(
        self, outputs: Tensor, targets: Tensor, samples: int, generator: torch.Generator
    ) -> Tensor:
        """(2/D)^{1/2} times standard normal noise, shape (N, D, samples)."""
        check_generator(outputs, samples, generator)
        n, width = len(outputs), outputs[0].numel()
        noise = torch.randn(
            (n, width, samples),
            generator=generator,
            device=outputs.device,
            dtype=at_least_float32(outputs.dtype),
        )
        return noise * math.sqrt(2 / width)
