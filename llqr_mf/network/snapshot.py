"""Noticing that the weights or the batch changed after they were linearised."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

SAMPLE = 4096
"""Entries of a tensor that are compared when its version counter has moved."""


class Snapshot:
    """What some tensors were.

    A linearisation shares the weights' memory, so writing to them changes its products. Torch
    counts such writes; when the count has moved, a sample of the entries tells a step from a
    step that was taken back.

    Args:
        tensors: Pairs (name, tensor).
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._held = [(name, tensor, _sample(tensor)) for name, tensor in tensors]
        self._versions = [tensor._version for _, tensor, _ in self._held]

    def check(self) -> None:
        """Raises if a tensor is not what it was.

        Raises:
            RuntimeError: With the tensor's name, and the remedy.
        """
        for i, (name, tensor, before) in enumerate(self._held):
            if tensor._version == self._versions[i]:
                continue
            if not torch.equal(_sample(tensor), before):
                raise RuntimeError(
                    f"{name} was written to after the problem was made, and the problem shares its "
                    "memory: make a new problem at the new point, or put the old values back."
                )
            self._versions[i] = tensor._version


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)].clone()
