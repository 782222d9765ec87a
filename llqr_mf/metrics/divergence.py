"""A metric from any divergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from llqr_mf.losses import Loss
from llqr_mf.losses.base import Totals
from llqr_mf.losses.checks import check_scalar, plain, widen
from llqr_mf.operators.closure_curvature import ClosureCurvature
from llqr_mf.operators.output_blocks import positive_part
from llqr_mf.operators.output_curvature import OutputCurvature

from .base import Metric


@dataclass(frozen=True)
class Divergence(Metric):
    """The Hessian of fn(outputs, reference) in its first argument, where the two coincide.

    Args:
        fn: Takes outputs and reference, both (N, ...), and returns a scalar tensor: a mean over
            the samples, twice differentiable where the two are equal.
        stationary: Whether its gradient vanishes there, as that of every true divergence does.
            None looks, on each batch, whether it is zero but for rounding (100 eps of the
            Hessian's entries); then earlier layers have no second-order terms.
    """

    fn: Callable[[Tensor, Tensor], Tensor]
    _: KW_ONLY
    stationary: bool | None = None

    def terminal(self, loss: Loss, outputs: Tensor, targets: Tensor) -> OutputCurvature:
        """The divergence's Hessian, shape (N*D, N*D); with a factor where samples are apart."""
        curvature = self._curvature(outputs)
        ones = widen(plain(outputs)).new_ones(1, outputs.numel())
        self._check_finite(curvature.product(ones), "Hessian")
        what = f"the Hessian of divergence {self.fn!r} in the outputs"
        return positive_part(curvature, what, clip=False)

    def costate(self, loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """The divergence's gradient, of the outputs' shape; None if it is rounding only."""
        if self.stationary:
            return None
        with torch.inference_mode(False), torch.enable_grad():
            point = widen(plain(outputs)).requires_grad_()
            value = self._value(point, point.detach())
            if not value.requires_grad:
                return None
            (gradient,) = torch.autograd.grad(value, point)
        self._check_finite(gradient, "gradient")
        if self.stationary is None and self._is_rounding(gradient, outputs):
            return None
        return gradient.to(outputs.dtype)

    def _curvature(self, outputs: Tensor) -> ClosureCurvature:
        reference = widen(plain(outputs))
        return ClosureCurvature.from_function(lambda x: self._value(x, reference), outputs)

    def _value(self, outputs: Tensor, reference: Tensor) -> Tensor:
        value = self.fn(outputs, reference)
        check_scalar("divergence", self.fn, value)
        return value

    def _is_rounding(self, gradient: Tensor, outputs: Tensor) -> bool:
        """Whether a gradient is only what is left of terms of the Hessian's size that cancel."""
        signs = 1 - 2 * (torch.arange(outputs.numel(), device=outputs.device) % 2)
        curvature = self._curvature(outputs).product(signs.to(gradient.dtype).unsqueeze(0))
        rounding = 100 * torch.finfo(gradient.dtype).eps * curvature.abs().max()
        return bool(gradient.abs().max() <= rounding)

    def _check_finite(self, derivative: Tensor, name: str) -> None:
        if not bool(derivative.isfinite().all()):
            raise ValueError(
                f"divergence {self.fn!r} has a {name} that is NaN or infinite where its arguments "
                "coincide: write it without roots, norms or divisions that vanish there, such as "
                "(y - y0).square().sum() for norm(y - y0)**2."
            )

    def mass(self, totals: Totals) -> float:
        """The number of samples."""
        return float(totals.samples)
