"""The loss as a function of flat weights, and what the base optimizer's groups say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import Layout
from ..losses import Loss
from ..network.modes import curvature_pass


class LossAt:
    """The loss on one batch; BatchNorm statistics and the random state never move.

    Args:
        model: Whose weights.
        loss: Which loss.
        inputs: The batch.
        targets: Its targets.
        layout: Of flat weights.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, inputs: Any, targets: Tensor, layout: Layout
    ) -> None:
        self.model, self.loss, self.targets, self.layout = model, loss, targets, layout
        self.inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        self.named = dict(model.named_parameters())
        self.held = [self.named[name] for name in layout.names]

    def weights(self) -> Tensor:
        """The present weights, flat, a copy."""
        return torch.cat([p.detach().reshape(-1) for p in self.held])

    def write(self, flat: Tensor) -> None:
        """Puts flat weights into the model."""
        for p, part in zip(self.held, flat.split(self.layout.sizes), strict=True):
            p.copy_(part.reshape(p.shape))

    def value(self) -> float:
        """The loss at the present weights."""
        return float(self._run({}))

    def gradient(self, flat: Tensor) -> Tensor:
        """The gradient at other weights, flat."""
        leaves = [
            part.reshape(shape).requires_grad_()
            for part, shape in zip(
                flat.detach().split(self.layout.sizes), self.layout.shapes, strict=True
            )
        ]
        with torch.enable_grad():
            value = self._run(dict(zip(self.layout.names, leaves, strict=True)))
            parts = torch.autograd.grad(value, leaves, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts])

    def _run(self, replaced: Mapping[str, Tensor]) -> Tensor:
        state = {**dict(self.model.named_buffers()), **replaced}
        state = {n: t.clone() if n not in replaced else t for n, t in state.items()}
        device = self.held[0].device
        with curvature_pass(device):
            outputs = torch.func.functional_call(self.model, state, self.inputs)
        return self.loss.value(outputs, self.targets)


@dataclass(frozen=True, eq=False)
class GroupTerms:
    """What an optimizer's groups ask of a flat step; None where that changes nothing.

    Args:
        trained: 1 where the optimizer trains a weight, else 0.
        decay: Weight decay.
        factor: lr / initial_lr, what a scheduler has made of the learning rate.
    """

    trained: Tensor | None
    decay: Tensor | None
    factor: Tensor | None

    @staticmethod
    def of(
        parameters: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]], layout: Layout
    ) -> GroupTerms:
        """Those of an optimizer's groups now."""
        places = {id(p): group for group in groups for p in group["params"]}
        found = [places.get(id(parameters[name])) for name in layout.names]
        proto = parameters[layout.names[0]].detach()

        def flat(values: list[float], neutral: float) -> Tensor | None:
            if all(value == neutral for value in values):
                return None
            sizes = torch.tensor(layout.sizes, device=proto.device)
            return torch.repeat_interleave(torch.tensor(values).to(proto), sizes)

        return GroupTerms(
            flat([0.0 if group is None else 1.0 for group in found], 1.0),
            flat([float((group or {}).get("weight_decay", 0.0)) for group in found], 0.0),
            flat([_factor(group or {}) for group in found], 1.0),
        )

    def gradient(self, gradient: Tensor, weights: Tensor) -> Tensor:
        """The gradient with weight decay, zero where nothing is trained."""
        if self.trained is not None:
            gradient = gradient * self.trained
        return gradient if self.decay is None else gradient + self.decay * weights

    def scaled(self, step: Tensor) -> Tensor:
        """The step times the schedule's factor, zero where nothing is trained."""
        if self.trained is not None:
            step = step * self.trained
        return step if self.factor is None else step * self.factor


def _factor(group: Mapping[str, Any]) -> float:
    first = group.get("initial_lr")
    return float(group["lr"]) / float(first) if first else 1.0
