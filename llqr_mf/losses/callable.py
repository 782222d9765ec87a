"""Any function of outputs and targets as a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from llqr_mf.operators.closure_curvature import ClosureCurvature

from .base import Loss
from .checks import check_device, check_outputs, check_scalar, plain, widen


@dataclass(frozen=True)
class CallableLoss(Loss):
    """A loss given by a function, differentiated by autograd.

    Its Hessian is known by products only and need not be positive semidefinite. It names no
    output distribution, so it has no exact or Monte-Carlo Fisher matrix; for the empirical one
    its mean is taken to run over the N samples.

    Args:
        fn: Takes outputs and targets and returns a scalar tensor, a mean over the samples, made
            of twice differentiable torch operations.
    """

    fn: Callable[[Tensor, Tensor], Tensor]

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Outputs are finite, and the function returns one number that depends on them."""
        check_outputs(outputs)
        check_device(outputs, targets)
        if targets.is_floating_point() and bool(targets.isnan().any()):
            raise ValueError("targets hold NaN: clean the data.")
        with torch.inference_mode(False), torch.enable_grad():
            point = plain(outputs).requires_grad_()
            value = self.value(point, plain(targets))
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

    def count(self, outputs: Tensor, targets: Tensor) -> int:
        """N."""
        return len(outputs)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What the function returns, on outputs in float32 or better."""
        return self.fn(widen(outputs), targets)

    def hessian(self, outputs: Tensor, targets: Tensor) -> ClosureCurvature:
        """The Hessian of the function, by double backward."""
        fixed = plain(targets)
        return ClosureCurvature.from_function(lambda x: self.fn(x, fixed), outputs)

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
