"""Curvature of any function of the output, by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .output_curvature import OutputCurvature, at_least_float32, positive_scale
from .tangent import is_plain


class ClosureCurvature(OutputCurvature):
    """A symmetric matrix known by a function that multiplies by it; it has no factor.

    Unlike the others it need not be positive semidefinite: the Hessian of a user's loss is
    whatever it is.

    Args:
        proto: Carries the outputs' dtype and device.
        samples: N.
        width: D.
        product: Multiplies rows, shape (k, N*D) to (k, N*D).
        columns: Columns per pass.
    """

    def __init__(
        self,
        proto: Tensor,
        *,
        samples: int,
        width: int,
        product: Callable[[Tensor], Tensor],
        columns: int | None = None,
    ) -> None:
        super().__init__(proto, columns=columns, samples=samples, width=width, product=product)
        self.samples, self.width, self.rank = samples, width, None
        self.product = product

    @staticmethod
    def from_function(
        function: Callable[[Tensor], Tensor], outputs: Tensor, *, columns: int | None = None
    ) -> ClosureCurvature:
        """The Hessian of a scalar function at `outputs`, by double backward.

        The gradient is taken once, not vmapped, and its vjp is vmapped over the columns:
        differentiating a vmapped gradient is wrong through some normalisations. The function is
        evaluated in float32 or better, and the gradient's graph lives as long as the operator.

        Args:
            function: Takes a tensor like `outputs` and returns a scalar tensor.
            outputs: Where to differentiate, shape (N, ...).
            columns: Columns per pass.
        """
        shape = outputs.shape
        point = outputs.detach().to(at_least_float32(outputs.dtype))
        with torch.inference_mode(False), torch.enable_grad():
            # A tensor made under inference_mode cannot be saved for backward.
            point = point.clone() if point.is_inference() else point
            pull: Any = torch.func.vjp(torch.func.grad(function), point)[1]

        def product(v: Tensor) -> Tensor:
            rows = v.reshape(len(v), *shape).to(point.dtype)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not is_plain(v)):
                out: Tensor = torch.func.vmap(lambda row: pull(row)[0])(rows)
            return out.reshape(len(v), -1).to(v.dtype)

        return ClosureCurvature(
            outputs.new_empty(0),
            samples=len(outputs),
            width=outputs[0].numel(),
            product=product,
            columns=columns,
        )

    def scaled(self, c: float) -> ClosureCurvature:
        """The same curvature times c > 0."""
        scale, product = positive_scale(c), self.product
        return ClosureCurvature(
            self._proto,
            samples=self.samples,
            width=self.width,
            product=lambda v: scale * product(v),
            columns=self._columns,
        )

    def _rows(self, v: Tensor) -> Tensor:
        return self.product(v)
