"""The forward pass that training by gradients would have made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..network.checks import close, copies
from ..network.modes import random_states, set_random_states

SHARE = 8
"""One sample in so many is run where that is known to show enough."""


class OwnPass:
    """Runs a model as it is: for what that leaves behind, and to see that its layers still are its.

    Curvature passes leave neither running statistics nor random numbers behind. The first pass in a
    mode (of train and eval modes of all modules) shows whether the model does. Where it leaves no
    such mark, and a sample's outputs are the same without the rest of the batch, later passes run a
    share of the samples.

    Args:
        model: Which model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modes: tuple[bool, ...] = ()
        self._in_part: bool | None = None
        self._passes = 0
        self._before = _Marks(model, torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, inputs: Any, outputs: Tensor) -> bool:
        """One pass; whether its outputs are these.

        Args:
            inputs: The batch, which is not written to.
            outputs: Those of the layers at the same weights and random state.
        """
        batch = inputs if isinstance(inputs, tuple) else (inputs,)
        modes = tuple(module.training for module in self.model.modules())
        if modes != self._modes:
            self._modes, self._in_part = modes, None
        self._before = _Marks(self.model, outputs.device)
        if self._in_part:
            return self._agrees_in_part(batch, outputs)
        agrees = close(self._run(batch), outputs)
        if agrees and self._in_part is None:
            self._in_part = self._before.are_left() and self._agrees_in_part(batch, outputs)
        return agrees

    def undo(self) -> None:
        """Puts back the buffers and the random state that the last pass moved."""
        self._before.restore()

    def _agrees_in_part(self, batch: tuple[Any, ...], outputs: Tensor) -> bool:
        samples = len(outputs)
        self._passes += 1
        rows = slice(self._passes % min(SHARE, samples), None, SHARE)
        if not all(isinstance(x, Tensor) and x.shape[:1] == (samples,) for x in batch):
            return False
        try:
            made = self._run(tuple(x[rows] for x in batch))
        except Exception:  # a model may ask for as many samples as it was given
            return False
        return close(made, outputs[rows])

    def _run(self, batch: tuple[Any, ...]) -> Any:
        with torch.enable_grad():
            made = self.model(*copies(batch))
        return made.detach() if isinstance(made, Tensor) else made


class _Marks:
    """Buffers and random state before a pass.

    Args:
        model: Whose buffers.
        device: Of the model.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._device, self._random = device, random_states(device)

    def are_left(self) -> bool:
        """Whether all is as it was."""
        same = all(
            module._buffers.get(name) is buffer and torch.equal(buffer, before)
            for module, name, buffer, before in self._buffers
        )
        return same and all(map(torch.equal, self._random, random_states(self._device)))

    def restore(self) -> None:
        """Makes it so."""
        for module, name, buffer, before in self._buffers:
            module._buffers[name] = buffer.copy_(before)
        set_random_states(self._random, self._device)
