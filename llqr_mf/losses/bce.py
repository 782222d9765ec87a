"""Binary cross-entropy of logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llqr_mf.operators.diagonal_curvature import DiagonalCurvature

from .base import Loss
from .checks import (
    check_device,
    check_float_targets,
    check_generator,
    check_outputs,
    check_same_shape,
    check_weights,
    plain,
    widen,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class BCEWithLogits(Loss):
    """`torch.nn.functional.binary_cross_entropy_with_logits`, the mean over all N*D elements.

    Every element is one Bernoulli draw, so the exact Fisher matrix is the Hessian of the loss
    without its weights: neither `weight` nor `pos_weight` is part of the model's distribution.

    Args:
        weight: Factor of each element's loss, broadcast to the outputs.
        pos_weight: Factor of the positive targets' term, broadcast to the outputs.
    """

    weight: Tensor | None = None
    pos_weight: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "pos_weight"):
            tensor = getattr(self, name)
            if tensor is not None:
                check_weights(name, tensor)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Targets lie in [0, 1] and have the outputs' shape; weights broadcast to it."""
        check_outputs(outputs)
        check_device(outputs, targets)
        check_same_shape(outputs, targets)
        check_float_targets(targets)
        if not bool(((targets >= 0) & (targets <= 1)).all()):
            raise ValueError(
                "targets of bce_with_logits must be probabilities in [0, 1]: map labels such as "
                "-1 and 1 to 0 and 1."
            )
        for name in ("weight", "pos_weight"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            pairs = zip(tensor.shape[::-1], outputs.shape[::-1], strict=False)
            if tensor.ndim > outputs.ndim or any(a not in (1, b) for a, b in pairs):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, which does not broadcast to the "
                    f"outputs' {tuple(outputs.shape)}: give one entry per output, "
                    f"{tuple(outputs.shape[1:])}."
                )

    def count(self, outputs: Tensor, targets: Tensor) -> int:
        """N*D."""
        return outputs.numel()

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The weighted sum over N*D elements, divided by N*D (as torch does)."""
        wide = widen(outputs)
        weight, pos_weight = self._weights(wide)
        return torch.nn.functional.binary_cross_entropy_with_logits(
            wide, targets.to(wide.dtype), weight=weight, pos_weight=pos_weight
        )

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """W ((1 - y) s - pos_weight y (1 - s)) / (N D), s the sigmoid."""
        wide = widen(outputs.detach())
        weight, pos_weight = self._weights(wide)
        y = targets.detach().to(wide.dtype)
        fall = torch.sigmoid(-wide) * y
        slope = torch.sigmoid(wide) * (1 - y) - (fall if pos_weight is None else pos_weight * fall)
        if weight is not None:
            slope = slope * weight
        return (slope / outputs.numel()).to(outputs.dtype)

    def hessian(self, outputs: Tensor, targets: Tensor) -> DiagonalCurvature:
        """diag(w (pos_weight y + 1 - y) s (1 - s)) / (N D), s the sigmoid."""
        h = self._variance(outputs)
        weight, pos_weight = self._weights(h)
        y = targets.detach().to(h.dtype)
        if pos_weight is not None:
            h = h * (pos_weight * y + (1 - y))
        if weight is not None:
            h = h * weight
        return DiagonalCurvature(outputs.new_empty(0), diagonal=h)

    def fisher(self, outputs: Tensor, targets: Tensor) -> DiagonalCurvature:
        """diag(s (1 - s)) / (N D)."""
        return DiagonalCurvature(outputs.new_empty(0), diagonal=self._variance(outputs))

    def sample_gradients(
        self, outputs: Tensor, targets: Tensor, samples: int, generator: torch.Generator
    ) -> Tensor:
        """S - y with y drawn from Bernoulli(s), shape (N, D, samples)."""
        check_generator(outputs, samples, generator)
        logits = widen(outputs.detach()).reshape(len(outputs), -1, 1)
        s = torch.sigmoid(logits)
        uniform = torch.rand(
            (*s.shape[:2], samples), generator=generator, device=s.device, dtype=s.dtype
        )
        # The gradient is -(1 - s) at y = 1: sigmoid(-x) keeps the digits of 1 - s.
        return torch.where(uniform < s, -torch.sigmoid(-logits), s)

    @staticmethod
    def _variance(outputs: Tensor) -> Tensor:
        wide = widen(outputs.detach())
        return torch.sigmoid(wide) * torch.sigmoid(-wide) / outputs.numel()

    def _weights(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The two weights on the device and in the dtype of `like`."""
        weight, pos_weight = self.weight, self.pos_weight
        return (
            None if weight is None else plain(weight).to(like),
            None if pos_weight is None else plain(pos_weight).to(like),
        )
