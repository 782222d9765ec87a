"""The forward pass that training by gradients would have made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class OwnPass:
    """Runs a model as it is for what that leaves behind: running statistics and random numbers.

    Curvature passes leave neither. The first pass in a mode (of train and eval modes of all
    modules) shows whether the model leaves a mark in it; where it leaves none, further passes are
    spared.

    Args:
        model: Which model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modes: tuple[bool, ...] = ()
        self._marks: bool | None = None

    @torch.no_grad()
    def __call__(self, weights: Mapping[str, Tensor], inputs: tuple[Any, ...]) -> None:
        """One pass at given weights."""
        modes = tuple(module.training for module in self.model.modules())
        if modes != self._modes:
            self._modes, self._marks = modes, None
        if self._marks is False:
            return
        device = next(iter(weights.values())).device
        before = [] if self._marks else [t.clone() for t in self._traces(device)]
        torch.func.functional_call(self.model, dict(weights), inputs)
        if self._marks is None:
            pairs = zip(before, self._traces(device), strict=True)
            self._marks = not all(torch.equal(a, b) for a, b in pairs)

    def _traces(self, device: torch.device) -> list[Tensor]:
        made = [torch.random.get_rng_state(), *self.model.buffers()]
        return [*made, torch.cuda.get_rng_state(device)] if device.type == "cuda" else made
