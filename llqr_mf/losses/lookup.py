"""From what a user writes to a loss."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn import functional as F

from .base import Loss
from .bce import BCEWithLogits
from .callable import CallableLoss
from .cross_entropy import CrossEntropy
from .log_probabilities import KLDivergence, NegativeLogLikelihood
from .mse import MeanSquaredError

LossSpec: TypeAlias = str | Loss | nn.Module | Callable[[Tensor, Tensor], Tensor]
"""What `get_loss` takes."""

_NAMED: dict[str, type[Loss]] = {
    "cross_entropy": CrossEntropy,
    "mse": MeanSquaredError,
    "bce_with_logits": BCEWithLogits,
}

_FUNCTIONS: dict[object, Callable[[], Loss]] = {
    F.cross_entropy: lambda: CrossEntropy(class_dim=1),
    F.nll_loss: lambda: NegativeLogLikelihood(class_dim=1),
    F.mse_loss: MeanSquaredError,
    F.binary_cross_entropy_with_logits: BCEWithLogits,
}
"""Torch's functions, at their defaults."""


def loss_names() -> tuple[str, ...]:
    """The losses known by name."""
    return tuple(_NAMED)


def get_loss(spec: LossSpec) -> Loss:
    """The loss that a name, a torch module, a `Loss` or a function stands for.

    `nn.CrossEntropyLoss` keeps torch's layout, the classes on axis 1; the name "cross_entropy"
    looks for them on the last axis first. `nn.NLLLoss` and `nn.KLDivLoss` after a LogSoftmax have
    the curvature of cross-entropy. Subclasses of torch's losses may compute something else, so
    they count as functions.

    Args:
        spec: One of `loss_names()`, `nn.CrossEntropyLoss`, `nn.NLLLoss`, `nn.MSELoss` or
            `nn.BCEWithLogitsLoss` with reduction "mean", `nn.KLDivLoss` with "batchmean" or "mean",
            a `Loss`, or any function of outputs and targets that returns a scalar mean.
            `F.cross_entropy`, `F.nll_loss`, `F.mse_loss` and
            `F.binary_cross_entropy_with_logits` count as the modules.

    Raises:
        ValueError: The name is unknown, or the reduction is not a mean.
        TypeError: It is none of these.
    """
    if isinstance(spec, Loss):
        return spec
    if isinstance(spec, str):
        if spec not in _NAMED:
            raise ValueError(
                f"loss {spec!r} is unknown: choose one of {', '.join(map(repr, _NAMED))}, or "
                "give a torch loss module, a Loss, or a function (outputs, targets) -> mean."
            )
        return _NAMED[spec]()
    if isinstance(spec, Hashable) and spec in _FUNCTIONS:
        return _FUNCTIONS[spec]()
    if type(spec) is nn.KLDivLoss and spec.reduction in ("batchmean", "mean"):
        return KLDivergence(
            log_target=spec.log_target,
            reduction=spec.reduction,  # type: ignore[arg-type]
        )
    if isinstance(spec, nn.Module):
        reduction = getattr(spec, "reduction", "mean")
        if reduction != "mean":
            raise ValueError(
                f"{type(spec).__name__} has reduction={reduction!r}: every loss, gradient and "
                "curvature here is a mean over the batch, so use reduction='mean'."
            )
    if type(spec) is nn.CrossEntropyLoss:
        return CrossEntropy(
            weight=spec.weight,
            ignore_index=spec.ignore_index,
            label_smoothing=spec.label_smoothing,
            class_dim=1,
        )
    if type(spec) is nn.NLLLoss:
        return NegativeLogLikelihood(
            weight=spec.weight, ignore_index=spec.ignore_index, class_dim=1
        )
    if type(spec) is nn.MSELoss:
        return MeanSquaredError()
    if type(spec) is nn.BCEWithLogitsLoss:
        return BCEWithLogits(weight=spec.weight, pos_weight=spec.pos_weight)
    if callable(spec):
        return CallableLoss(spec)
    raise TypeError(
        f"loss is a {type(spec).__name__}: give one of {', '.join(map(repr, _NAMED))}, a torch "
        "loss module, a Loss, or a function (outputs, targets) -> mean."
    )
