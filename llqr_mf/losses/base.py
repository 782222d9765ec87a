"""What a loss is: a value, a gradient, and the curvatures at the network's output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from llqr_mf.operators.output_curvature import OutputCurvature

from .checks import plain, widen


@dataclass(frozen=True)
class Totals:
    """What the means over a batch divide by; those of several batches add up.

    Args:
        samples: N.
        draws: `Loss.count`.
        mass: `Loss.mass`.
        fisher: `Loss.fisher_mass`.
    """

    samples: int = 0
    draws: float = 0.0
    mass: float = 0.0
    fisher: float = 0.0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.samples + other.samples,
            self.draws + other.draws,
            self.mass + other.mass,
            self.fisher + other.fisher,
        )


class Loss(ABC):
    """A loss of a network's outputs, shape (N, ...), always a mean.

    A mean over what is the loss's own choice (samples, positions, elements): `count` says how many
    terms were counted on this batch. Everything is computed in at least float32. The value is
    differentiable; gradients and curvatures come in the dtype of the outputs and keep no graph.

    `check` is to be called once per batch; the other methods take its verdict for granted.
    """

    @abstractmethod
    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise a ValueError that names the argument and the remedy if the loss cannot be taken."""

    @abstractmethod
    def count(self, outputs: Tensor, targets: Tensor) -> int:
        """How many draws of the model's output distribution the mean runs over.

        Samples, positions or elements, whatever the loss treats as one draw, without those that
        it ignores.
        """

    @abstractmethod
    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss, a scalar tensor in float32 or better."""

    def mass(self, outputs: Tensor, targets: Tensor) -> float:
        """What the mean divides by, so that means over batches can be averaged."""
        return float(self.count(outputs, targets))

    def fisher_mass(self, outputs: Tensor, targets: Tensor) -> float:
        """What the mean in `fisher` divides by."""
        return float(self.count(outputs, targets))

    def totals(self, outputs: Tensor, targets: Tensor) -> Totals:
        """All that means over this batch divide by."""
        return Totals(
            len(outputs),
            float(self.count(outputs, targets)),
            self.mass(outputs, targets),
            self.fisher_mass(outputs, targets),
        )

    def is_empty(self, targets: Tensor) -> bool:
        """Whether nothing among the targets counts, so that this batch has no mean."""
        return False

    def not_a_mean(self, outputs: Tensor, targets: Tensor) -> str | None:
        """What speaks against averaging values over batches by `mass`, if that is not known."""
        return None

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The gradient of the mean in the outputs, of their shape and dtype."""
        with torch.inference_mode(False), torch.enable_grad():
            point = plain(outputs).requires_grad_()
            value = self.value(point, plain(targets))
            if not value.requires_grad:
                return torch.zeros_like(outputs)
            return torch.autograd.grad(value, point)[0]

    @abstractmethod
    def hessian(self, outputs: Tensor, targets: Tensor) -> OutputCurvature:
        """The Hessian of the mean in the outputs, shape (N*D, N*D)."""

    def gauss_newton(self, outputs: Tensor, targets: Tensor) -> OutputCurvature:
        """The Hessian, positive semidefinite and with a factor where that can be had."""
        return self.hessian(outputs, targets)

    @abstractmethod
    def fisher(self, outputs: Tensor, targets: Tensor) -> OutputCurvature:
        """The exact Fisher matrix of the model's output distribution, a mean over `count` draws.

        The targets say only which draws are counted.
        """

    @abstractmethod
    def sample_gradients(
        self, outputs: Tensor, targets: Tensor, samples: int, generator: torch.Generator
    ) -> Tensor:
        """Gradients of -log p(y | outputs) for targets y drawn from the model, (N, D, samples).

        With v these vectors and c = `count`, the Monte-Carlo Fisher matrix is the sum of
        v v' / (samples * c) and is unbiased for `fisher`. A sample with several draws (positions,
        elements) gets the sum of their gradients: the draws are independent and each gradient has
        mean zero, so products between two draws vanish in expectation. One vector per draw would
        have less variance, but a rank of `samples` times their number.

        Args:
            outputs: The network's output, shape (N, ...).
            targets: The targets, for what they ignore.
            samples: k, the draws per sample.
            generator: The only source of randomness; on the device of the outputs.

        Returns:
            Tensor in float32 or better; D is the flattened output.
        """

    def per_sample_gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """G_n, the gradient of sample n's share of the loss times `count`; shape (N, D).

        So the loss's gradient is the sum of g_n / count, and the empirical Fisher matrix is the
        sum of g_n g_n' / count: for a sequence, g_n belongs to the loss of the whole sample,
        summed over its positions. The loss must not mix samples, apart from a normaliser.
        """
        gradient = self.gradient(widen(outputs), targets)
        return self.count(outputs, targets) * gradient.reshape(len(outputs), -1)
