"""Losses of networks that end in a LogSoftmax: torch's NLLLoss and KLDivLoss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llqr_mf.operators.softmax_curvature import SoftmaxCurvature

from .checks import check_float_targets, widen
from .cross_entropy import CrossEntropy


@dataclass(frozen=True, kw_only=True, eq=False)
class NegativeLogLikelihood(CrossEntropy):
    """`torch.nn.functional.nll_loss` of log-probabilities, with its mean.

    That is linear in the outputs, and has no curvature there. But cross-entropy of them is the
    same function of the weights, as the logsumexp of log-probabilities is zero at all weights, and
    has the Gauss-Newton and Fisher matrices of the logits. So it stands for the loss, and the
    gradient in the outputs is p - e_y where torch's is -e_y: a LogSoftmax pulls both back to one.
    """

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """As of cross-entropy, and the outputs are log-probabilities."""
        if targets.is_floating_point():
            raise ValueError(
                "targets are probabilities, and NLLLoss takes class indices: pass targets.long(), "
                "or use nn.KLDivLoss(reduction='batchmean')."
            )
        super().check(outputs, targets)
        check_normalised(outputs, self._axis(outputs, targets), "NLLLoss", "F.nll_loss(o, t)")


@dataclass(frozen=True, kw_only=True, eq=False)
class KLDivergence(CrossEntropy):
    """`torch.nn.functional.kl_div` of log-probabilities and target probabilities.

    Cross-entropy of the outputs less the targets' entropy; the curvature is as in
    `NegativeLogLikelihood`. Targets have the shape of the outputs.

    Args:
        log_target: Whether targets are logarithms of probabilities.
        reduction: "batchmean", the sum over positions and classes divided by N, or torch's "mean",
            which divides by the number of elements.
    """

    log_target: bool = False
    reduction: Literal["batchmean", "mean"] = "batchmean"

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """As of cross-entropy with probabilities, and the outputs are log-probabilities."""
        if not targets.is_floating_point():
            raise ValueError(
                "targets are class indices, and KLDivLoss takes probabilities: use nn.NLLLoss()."
            )
        check_float_targets(targets)
        super().check(outputs, self._probabilities(targets))
        check_normalised(
            outputs, self._axis(outputs, targets), "KLDivLoss", "F.kl_div(o, t, reduction=...)"
        )

    def mass(self, outputs: Tensor, targets: Tensor) -> float:
        """N, or the number of elements."""
        return float(len(outputs) if self.reduction == "batchmean" else outputs.numel())

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Torch's, and the logsumexp of the outputs, which is zero, times the targets' mass."""
        wide = widen(outputs)
        total = torch.nn.functional.kl_div(
            wide, targets.to(wide.dtype), reduction="sum", log_target=self.log_target
        )
        axis = self._axis(outputs, targets)
        mass = self._mass(wide, self._probabilities(targets), axis)
        total = total + (mass * wide.movedim(axis, -1).logsumexp(-1)).sum()
        return total / self.mass(outputs, targets)

    def hessian(self, outputs: Tensor, targets: Tensor) -> SoftmaxCurvature:
        """Blocks w (diag p - p p'), w the target mass of the position over `mass`."""
        return super().hessian(outputs, self._probabilities(targets.detach()))

    def _probabilities(self, targets: Tensor) -> Tensor:
        """Targets that are logarithms as what they are of."""
        return widen(targets).exp() if self.log_target else targets

    def _normaliser(self, wide: Tensor, targets: Tensor) -> Tensor:
        return wide.new_tensor(self.mass(wide, targets))

    def _axis(self, outputs: Tensor, targets: Tensor) -> int:
        """That over which the outputs are normalised: torch's function is the same for all."""
        axis = super()._axis(outputs, targets)
        if self.class_dim is not None or outputs.ndim == 2:
            return axis
        return min((-1, 1), key=lambda one: _off(outputs, one))


def check_normalised(outputs: Tensor, axis: int, name: str, function: str) -> None:
    """Outputs must be logarithms of probabilities that add up to one."""
    off = _off(outputs, axis)
    # A LogSoftmax leaves the rounding of its logits, which may be large: half of the digits.
    bound = math.sqrt(torch.finfo(outputs.dtype).eps) * (1 + math.log(outputs.shape[axis]))
    if not off <= bound:
        raise ValueError(
            f"outputs are no log-probabilities, as {name} takes: the logsumexp over axis {axis} is "
            f"{off:.3g} off zero. End the model in nn.LogSoftmax({axis}), use 'cross_entropy' for "
            f"logits, or lambda o, t: {function} for the function as it is."
        )


def _off(outputs: Tensor, axis: int) -> float:
    """By how much exponentials do not add up to one."""
    return float(widen(outputs.detach()).logsumexp(axis).abs().max())
