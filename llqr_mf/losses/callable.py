"""Any function of outputs and targets as a loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from llqr_mf.operators.closure_curvature import ClosureCurvature
from llqr_mf.operators.output_blocks import positive_part
from llqr_mf.operators.output_curvature import OutputCurvature

from .base import Loss
from .checks import check_device, check_outputs, check_scalar, plain, widen


@dataclass(frozen=True)
class CallableLoss(Loss):
    """A loss given by a function, differentiated by autograd.

    Its Hessian need not be positive semidefinite; Gauss-Newton takes the positive part of each
    sample's block. It names no output distribution, so it has no exact or Monte-Carlo Fisher
    matrix; for the empirical one its mean is taken to run over the N samples.

    Args:
        fn: Takes outputs and targets and returns a scalar tensor, a mean over the samples, made
            of twice differentiable torch operations.
        divisor: Takes outputs and targets and returns what the mean divides by, where that is not
            N: batches are then averaged by it.
    """

    fn: Callable[[Tensor, Tensor], Tensor]
    divisor: Callable[[Tensor, Tensor], float | Tensor] | None = None

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Outputs are finite, and the function returns one number that depends on them."""
        check_outputs(outputs)
        check_device(outputs, targets)
        if targets.is_floating_point() and bool(targets.isnan().any()):
            raise ValueError("targets hold NaN: clean the data.")
        with torch.inference_mode(False), torch.enable_grad():
            point = plain(outputs).requires_grad_()
            try:
                value = self.value(point, plain(targets))
            except TypeError as error:
                raise ValueError(
                    f"loss {self.fn!r} cannot be called with outputs and targets alone ({error}): "
                    "wrap it, such as lambda outputs, targets: loss(outputs[0], targets, "
                    "outputs[1]), with whatever else it needs taken from these two."
                ) from error
        check_scalar("loss", self.fn, value)
        if not value.requires_grad:
            raise ValueError(
                f"loss {self.fn!r} does not depend on the outputs through torch operations: do "
                "not detach them, nor leave torch inside it."
            )
        if not bool(value.isfinite()):
            raise ValueError(
                f"loss {self.fn!r} is {float(value.detach())} on this batch: check the targets."
            )
        mass = self.mass(outputs, targets)
        if not (math.isfinite(mass) and mass >= 0):
            raise ValueError(f"divisor of the loss is {mass} on this batch: return one >= 0.")

    def count(self, outputs: Tensor, targets: Tensor) -> int:
        """N."""
        return len(outputs)

    def mass(self, outputs: Tensor, targets: Tensor) -> float:
        """The divisor's value, or N."""
        if self.divisor is None:
            return float(len(outputs))
        return float(self.divisor(plain(outputs), plain(targets)))

    @torch.no_grad()
    def not_a_mean(self, outputs: Tensor, targets: Tensor) -> str | None:
        """Whether the values on two parts of a batch do not average to that of the whole."""
        n = len(outputs)
        # Unequal parts, so that a sum and a mean over anything but samples differ.
        cut = -(-n // 3)
        if self.divisor is not None or n < 2 or len(targets) != n:
            return None
        try:
            whole, first, second = (
                float(self.value(plain(outputs)[part], plain(targets)[part]))
                for part in (slice(None), slice(cut), slice(cut, None))
            )
        except (RuntimeError, ValueError, IndexError):
            return None  # It takes whole batches only.
        average = (cut * first + (n - cut) * second) / n
        # Sums of N numbers of one size, in float32 or better.
        rounding = torch.finfo(widen(outputs).dtype).eps * (n + 100)
        size = max(abs(first), abs(second), abs(whole))
        if math.isfinite(average) and abs(whole - average) <= rounding * size:
            return None
        return (
            f"loss {self.fn!r} is no mean over samples, so its batches cannot be averaged by their "
            f"size: it is {whole:.6g} on a batch, and {average:.6g} as the mean over two parts of "
            "it. Write it as a mean over samples, use a named loss, or give "
            "losses.CallableLoss(fn, divisor=...) with what its mean divides by."
        )

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What the function returns, on outputs (and such targets) in float32 or better."""
        with torch.enable_grad():  # it may differentiate something itself
            return self.fn(widen(outputs), _wide(targets))

    def hessian(self, outputs: Tensor, targets: Tensor) -> ClosureCurvature:
        """The Hessian of the function, by double backward."""
        fixed = _wide(plain(targets))
        try:
            curvature = ClosureCurvature.from_function(lambda x: self.fn(x, fixed), outputs)
            curvature.product(widen(plain(outputs)).new_ones(1, outputs.numel()))
        except RuntimeError as error:
            if "not implemented" not in str(error):
                raise
            raise ValueError(
                f"loss {self.fn!r} has no second derivative in torch ({error}): use "
                "metric='empirical_fisher' or 'squared_error', or write it out in operations that "
                "have one."
            ) from error
        return curvature

    def gauss_newton(self, outputs: Tensor, targets: Tensor) -> OutputCurvature:
        """The Hessian's positive part, with a factor; the Hessian where samples are mixed.

        Also where D is too large for blocks (`operators.output_blocks`).
        """
        curvature = self.hessian(outputs, targets)
        what = f"the Hessian of loss {self.fn!r} in the outputs"
        return positive_part(curvature, what)

    def fisher(self, outputs: Tensor, targets: Tensor) -> NoReturn:
        """A function names no distribution: raises ValueError."""
        raise self._no_distribution()

    def sample_gradients(
        self, outputs: Tensor, targets: Tensor, samples: int, generator: torch.Generator
    ) -> NoReturn:
        """A function names no distribution: raises ValueError."""
        raise self._no_distribution()

    def _no_distribution(self) -> ValueError:
        return ValueError(
            f"loss {self.fn!r} names no output distribution, so it has no Fisher matrix: use "
            "metric='gauss_newton' or 'empirical_fisher', or one of the named losses."
        )


def _wide(targets: Tensor) -> Tensor:
    return widen(targets) if targets.is_floating_point() else targets
