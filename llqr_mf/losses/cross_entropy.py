"""Softmax cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llqr_mf.errors import NotFiniteError
from llqr_mf.operators.softmax_curvature import SoftmaxCurvature

from .base import Loss
from .checks import (
    check_device,
    check_float_targets,
    check_generator,
    check_outputs,
    check_weights,
    plain,
    widen,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossEntropy(Loss):
    """`torch.nn.functional.cross_entropy` with its mean, over class indices or probabilities.

    Outputs are (N, C), sequences (N, S, C) with targets (N, S), or torch's (N, C, S...) with
    targets (N, S...). Probability targets have the shape of the outputs. With class indices the
    mean is the weighted one over positions that are not ignored; with probabilities it runs over
    all positions. (Both as torch defines them.)

    One draw is one position. The exact Fisher matrix is that of the model's distribution: class
    weights and label smoothing do not enter, ignored positions are left out.

    Args:
        weight: Weight of each class, shape (C,).
        ignore_index: Class index of positions that do not count.
        label_smoothing: Share of the target mass spread over all classes, in [0, 1].
        class_dim: Axis of the classes: 1 as in torch, -1, or None for the last axis where the
            targets' shape allows it and axis 1 otherwise.
    """

    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    class_dim: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}: give one in [0, 1].")
        if self.class_dim not in (None, 1, -1):
            raise ValueError(f"class_dim is {self.class_dim}: give 1, -1 or None.")
        if self.weight is not None:
            if self.weight.ndim != 1:
                raise ValueError(
                    f"weight has shape {tuple(self.weight.shape)}: give one weight per class, (C,)."
                )
            check_weights("weight", self.weight)

    # ---- what a loss is

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Shapes fit, indices name classes, and something is left to count."""
        check_outputs(outputs, allow_minus_infinity=True)
        check_device(outputs, targets)
        if outputs.ndim < 2:
            raise ValueError(
                f"outputs have shape {tuple(outputs.shape)}: cross-entropy takes (N, C) or more; "
                "use outputs.unsqueeze(0) for one sample."
            )
        if targets.dtype == torch.bool or targets.is_complex():
            raise ValueError(f"targets are {targets.dtype}: pass class indices, targets.long().")
        axis = self._axis(outputs, targets)
        classes = outputs.shape[axis]
        if self.weight is not None and len(self.weight) != classes:
            raise ValueError(
                f"weight has {len(self.weight)} entries and outputs have {classes} classes (axis "
                f"{axis} of {tuple(outputs.shape)}): give one per class, or set class_dim."
            )
        if targets.is_floating_point():
            check_float_targets(targets)
            if not bool((targets >= 0).all()):
                raise ValueError("targets hold negative probabilities: give entries >= 0.")
            if self.ignore_index >= 0:
                raise ValueError(
                    f"ignore_index is {self.ignore_index} and targets are probabilities, all of "
                    "which count: leave ignore_index out, or pass class indices, targets.long()."
                )
            return
        index = targets.long()
        counted = index != self.ignore_index
        wrong = counted & ((index < 0) | (index >= classes))
        if bool(wrong.any()):
            raise ValueError(
                f"targets hold {int(wrong.sum())} class indices outside 0..{classes - 1}, such as "
                f"{int(index[wrong][0])}: relabel them, or mark what should not count with "
                f"ignore_index={self.ignore_index}. (Classes lie on axis {axis} of the outputs, "
                f"of shape {tuple(outputs.shape)}.)"
            )
        if not bool(counted.any()):
            raise NotFiniteError(  # torch's mean over nothing is NaN
                f"all targets equal ignore_index={self.ignore_index}, so nothing is left to "
                "average: skip this batch."
            )
        if self.weight is not None and float(self._normaliser(widen(outputs), targets)) == 0:
            raise NotFiniteError(
                "weight is zero for every class among the targets, so nothing is left to "
                "average: skip this batch, give positive weights, or larger batches."
            )

    def count(self, outputs: Tensor, targets: Tensor) -> int:
        """Positions that are not ignored."""
        if targets.is_floating_point():
            return outputs.numel() // outputs.shape[self._axis(outputs, targets)]
        return int(self._counted(outputs, targets).sum())

    def mass(self, outputs: Tensor, targets: Tensor) -> float:
        """The class weights of the counted positions, added up."""
        return float(self._normaliser(widen(outputs), targets))

    def is_empty(self, targets: Tensor) -> bool:
        """Whether all positions are ignored, or of classes without weight.

        Smoothed targets of such a class have a part in the mean of a larger batch.
        """
        if targets.is_floating_point():
            return False
        index = targets.long()
        index = index[index != self.ignore_index]
        if self.weight is None or self.label_smoothing or not len(index):
            return not len(index)
        known = bool(((index >= 0) & (index < len(self.weight))).all())
        return known and not bool(self.weight.to(index.device)[index].any())

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean, exactly as torch's."""
        axis = self._axis(outputs, targets)
        wide = widen(outputs).movedim(axis, 1)
        if targets.is_floating_point():
            targets = targets.movedim(axis, 1).to(wide.dtype)
        else:
            targets = targets.long()
        return torch.nn.functional.cross_entropy(
            wide,
            targets,
            weight=self._class_weights(wide),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def hessian(self, outputs: Tensor, targets: Tensor) -> SoftmaxCurvature:
        """Blocks w (diag p - p p'), w the target mass of the position over the normaliser."""
        axis = self._axis(outputs, targets)
        wide = widen(outputs.detach())
        mass = self._mass(wide, targets, axis) / self._normaliser(wide, targets)
        return SoftmaxCurvature.from_logits(outputs, mass, class_dim=axis)

    def fisher(self, outputs: Tensor, targets: Tensor) -> SoftmaxCurvature:
        """Blocks (diag p - p p') / count at the positions that count."""
        counted = self._counted(outputs, targets)
        weights = widen(counted.to(outputs.dtype)) / self.count(outputs, targets)
        axis = self._axis(outputs, targets)
        return SoftmaxCurvature.from_logits(outputs, weights, class_dim=axis)

    def sample_gradients(
        self, outputs: Tensor, targets: Tensor, samples: int, generator: torch.Generator
    ) -> Tensor:
        """P - e_y with y drawn from p at each counted position, 0 elsewhere."""
        check_generator(outputs, samples, generator)
        axis = self._axis(outputs, targets)
        logits = widen(outputs.detach()).movedim(axis, -1)
        p = torch.softmax(logits, dim=-1).reshape(-1, logits.shape[-1])
        drawn = torch.multinomial(p, samples, replacement=True, generator=generator)
        # (positions, C, samples)
        v = p.unsqueeze(-1).repeat(1, 1, samples)
        v.scatter_add_(
            1, drawn.unsqueeze(1), v.new_full((1, 1, 1), -1.0).expand(len(p), 1, samples)
        )
        v = v * self._counted(outputs, targets).reshape(-1, 1, 1)
        v = v.reshape(*logits.shape, samples).movedim(-2, axis if axis == 1 else -2)
        return v.reshape(len(outputs), -1, samples)

    # ---- its parts

    def _axis(self, outputs: Tensor, targets: Tensor) -> int:
        """1 or -1: the axis of the classes."""
        shape, wanted = outputs.shape, targets.shape
        soft = targets.is_floating_point()
        fits = {-1: shape[:-1] == wanted, 1: shape[:1] + shape[2:] == wanted}
        if soft:
            fits = dict.fromkeys(fits, shape == wanted)
        axes = (-1, 1) if self.class_dim is None else (self.class_dim,)
        for axis in axes:
            if fits[axis]:
                return axis
        kind = "probabilities" if soft else "class indices"
        expected = {
            -1: shape if soft else shape[:-1],
            1: shape if soft else shape[:1] + shape[2:],
        }
        choices = " or ".join(dict.fromkeys(str(tuple(expected[axis])) for axis in axes))
        remedy = "give one target per position"
        if soft and wanted in (shape[:-1], shape[:1] + shape[2:]):
            remedy = "pass targets.long() if they are class indices"
        elif not soft and shape == wanted:
            remedy = "pass targets.float() if they are probabilities, or targets.argmax(...)"
        elif not soft and wanted[-1:] == (1,) and wanted[:-1] == shape[:-1]:
            remedy = "drop the last axis, targets.squeeze(-1)"
        raise ValueError(
            f"targets are {kind} of shape {tuple(wanted)} and outputs have shape {tuple(shape)}: "
            f"such targets must have shape {choices} (class_dim={self.class_dim}), so {remedy}."
        )

    def _probabilities(self, targets: Tensor) -> Tensor:
        """Floating-point targets as probabilities."""
        return targets

    def _class_weights(self, wide: Tensor) -> Tensor | None:
        return None if self.weight is None else plain(self.weight).to(wide)

    def _counted(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Which positions count, a bool of the shape of the positions."""
        if targets.is_floating_point():
            shape = outputs.movedim(self._axis(outputs, targets), -1).shape[:-1]
            return torch.ones(shape, dtype=torch.bool, device=outputs.device)
        return targets.long() != self.ignore_index

    def _mass(self, wide: Tensor, targets: Tensor, axis: int) -> Tensor:
        """The sum of each position's weighted and smoothed target, shape of the positions."""
        weight, smoothing = self._class_weights(wide), self.label_smoothing
        if targets.is_floating_point():
            target = targets.detach().movedim(axis, -1).to(wide.dtype)
            if weight is None:
                return (1 - smoothing) * target.sum(-1) + smoothing
            return (1 - smoothing) * (target @ weight) + smoothing * weight.mean()
        counted = self._counted(wide, targets)
        if weight is None:
            return counted.to(wide.dtype)
        own = weight[torch.where(counted, targets, 0).long()]
        return counted * ((1 - smoothing) * own + smoothing * weight.mean())

    def _normaliser(self, wide: Tensor, targets: Tensor) -> Tensor:
        """What torch divides the sum over positions by, a scalar tensor."""
        counted = self._counted(wide, targets)
        weight = self._class_weights(wide)
        if weight is None or targets.is_floating_point():
            return counted.sum().to(wide.dtype)
        return (weight[torch.where(counted, targets, 0).long()] * counted).sum()
