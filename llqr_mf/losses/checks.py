"""Checks that the losses share, with messages that name the argument and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor

from llqr_mf.errors import NotFiniteError
from llqr_mf.operators.output_curvature import at_least_float32


def plain(tensor: Tensor) -> Tensor:
    """The tensor without a graph, and one that autograd may save (not an inference tensor)."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def widen(outputs: Tensor) -> Tensor:
    """Outputs in float32 or better."""
    return outputs.to(at_least_float32(outputs.dtype))


def check_outputs(outputs: Tensor, *, allow_minus_infinity: bool = False) -> None:
    """Outputs must be real floating point, have a batch axis and hold numbers."""
    if not outputs.is_floating_point():
        raise ValueError(
            f"outputs are {outputs.dtype}: a loss takes floating-point outputs, so pass "
            "outputs.float()."
        )
    if outputs.ndim == 0:
        raise ValueError(
            "outputs are a single number: give one row per sample, outputs of shape (N, ...)."
        )
    if outputs.numel() == 0:
        raise ValueError(
            f"outputs have shape {tuple(outputs.shape)}, which is empty: a mean needs at least "
            "one sample, so skip empty batches."
        )
    wrong = outputs.isnan() | outputs.isposinf() if allow_minus_infinity else ~outputs.isfinite()
    if bool(wrong.any()):
        raise ValueError(
            f"outputs hold {int(wrong.sum())} entries that are NaN or infinite: the network or "
            "its inputs have overflowed, so check the inputs and lower the step size."
        )


def check_device(outputs: Tensor, targets: Tensor) -> None:
    """Both must be on one device."""
    if outputs.device != targets.device:
        raise ValueError(
            f"outputs are on {outputs.device} and targets on {targets.device}: move the targets "
            "with targets.to(outputs.device)."
        )


def check_same_shape(outputs: Tensor, targets: Tensor) -> None:
    """Targets must have the shape of the outputs: broadcasting hides mistakes."""
    if outputs.shape != targets.shape:
        hint = "give one target per output"
        if outputs.numel() == targets.numel():
            hint = f"use targets.reshape({tuple(outputs.shape)})"
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and outputs {tuple(outputs.shape)}: they "
            f"must be equal (nothing is broadcast here), so {hint}."
        )


def check_float_targets(targets: Tensor) -> None:
    """Targets must be floating point and finite."""
    if not targets.is_floating_point():
        raise ValueError(
            f"targets are {targets.dtype}: this loss takes floating-point targets, so pass "
            "targets.to(outputs.dtype)."
        )
    if not bool(targets.isfinite().all()):
        raise NotFiniteError("targets hold entries that are NaN or infinite: clean the data.")


def check_scalar(name: str, function: object, value: object) -> None:
    """A user's function must return a mean, one number."""
    if not isinstance(value, Tensor) or value.ndim != 0:
        kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value)}"
        raise ValueError(
            f"{name} {function!r} returned {kind}: it must return a scalar tensor, the mean over "
            "the samples (reduction='mean')."
        )


def check_generator(outputs: Tensor, samples: int, generator: torch.Generator) -> None:
    """Draws need a positive number and a generator on the outputs' device."""
    if samples < 1:
        raise ValueError(f"samples is {samples}: draw at least one target per sample.")
    if generator.device.type != outputs.device.type:
        raise ValueError(
            f"generator is on {generator.device} and outputs on {outputs.device}: make it with "
            "torch.Generator(device=outputs.device)."
        )


def check_weights(name: str, tensor: Tensor) -> None:
    """A loss's own weights must be finite and nonnegative."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}: pass {name}.float().")
    if not bool((tensor.isfinite() & (tensor >= 0)).all()):
        raise ValueError(f"{name} holds entries that are negative, NaN or infinite: give >= 0.")
