"""The loss as a function of flat weights, and what the base optimizer's groups say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import Layout
from ..losses import Loss
from ..network.checks import copies
from ..network.modes import curvature_pass


class LossAt:
    """The loss on one batch; BatchNorm statistics and the random state never move.

    Args:
        model: Whose weights.
        loss: Which loss.
        inputs: The batch.
        targets: Its targets.
        layout: Of flat weights.
        stateful: See `curvature_pass`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        inputs: Any,
        targets: Tensor,
        layout: Layout,
        *,
        stateful: bool = True,
    ) -> None:
        self.stateful = stateful
        self.model, self.loss, self.targets, self.layout = model, loss, targets, layout
        self._inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        self.named = dict(model.named_parameters())
        self.held = [self.named[name] for name in layout.names]

    def weights(self) -> Tensor:
        """The present weights, flat, a copy."""
        return torch.cat([p.detach().reshape(-1) for p in self.held])

    def write(self, flat: Tensor) -> None:
        """Puts flat weights into the model."""
        for p, part in zip(self.held, self.parts(flat).values(), strict=True):
            p.copy_(part)

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        """Flat weights by name (views)."""
        return self.layout.unflatten(flat)

    def value(self) -> float:
        """The loss at the present weights."""
        return float(self._run({}).detach())

    def gradient(self, flat: Tensor) -> Tensor:
        """The gradient at other weights, flat."""
        leaves = {name: part.requires_grad_() for name, part in self.parts(flat.detach()).items()}
        value = self._run(leaves)
        parts = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts])

    def _run(self, replaced: Mapping[str, Tensor]) -> Tensor:
        state = {**{n: b.clone() for n, b in self.model.named_buffers()}, **replaced}
        device = self.held[0].device
        with torch.enable_grad():
            with curvature_pass(device, stateful=self.stateful):
                outputs = torch.func.functional_call(self.model, state, copies(self._inputs))
            return self.loss.value(outputs, self.targets)


@dataclass(frozen=True, eq=False)
class GroupTerms:
    """What an optimizer's groups ask of a flat step; None where that changes nothing.

    A term is a vector (P,), or a scalar where all weights have the same.

    Args:
        trained: 1 where the optimizer trains a weight, else 0.
        decay: Weight decay, zero where nothing is trained: the penalty 1/2 sum decay w^2.
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
        found = [places.get(id(parameters[name]), {}) for name in layout.names]
        first = parameters[layout.names[0]]
        wide = torch.promote_types(first.dtype, torch.float32)

        def flat(values: list[float], neutral: float) -> Tensor | None:
            if set(values) == {neutral}:
                return None
            made = torch.tensor(values, dtype=wide, device=first.device)
            if len(set(values)) == 1:
                return made[0]
            return torch.repeat_interleave(made, torch.tensor(layout.sizes, device=first.device))

        return GroupTerms(
            flat([1.0 if group else 0.0 for group in found], 1.0),
            flat([float(group.get("weight_decay", 0.0)) for group in found], 0.0),
            flat([_factor(group) for group in found], 1.0),
        )

    def gradient(self, gradient: Tensor, weights: Tensor) -> Tensor:
        """The gradient with weight decay, zero where nothing is trained."""
        return self.masked(gradient if self.decay is None else gradient + self.decay * weights)

    def masked(self, flat: Tensor) -> Tensor:
        """Flat vectors (P,), zero where nothing is trained."""
        return flat if self.trained is None else flat * self.trained

    def scaled(self, step: Tensor) -> Tensor:
        """The step times the schedule's factor."""
        return step if self.factor is None else step * self.factor

    def curvature(self, rows: Tensor) -> Tensor | None:
        """S' diag(decay) S of rows (k, P), float64 (k, k)."""
        return None if self.decay is None else ((rows * self.decay) @ rows.mT).double()

    def penalty_change(self, weights: Tensor, step: Tensor) -> float:
        """What a step adds to the penalty."""
        if self.decay is None:
            return 0.0
        return float((self.decay * step * (weights + step / 2)).sum(dtype=torch.float64))


def _factor(group: Mapping[str, Any]) -> float:
    first = group.get("initial_lr")
    return float(group["lr"]) / float(first) if first else 1.0
