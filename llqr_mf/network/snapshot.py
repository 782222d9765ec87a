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

    def changed(self, *, thorough: bool = False) -> str | None:
        """The name of the first tensor that is not what it was.

        Args:
            thorough: Whether to compare where the count has not moved, too: it does not for writes
                to `.data`, nor where `.data` was replaced (`vector_to_parameters` does so). The
                products of a problem keep the replaced memory, so only what puts them beside a new
                linearisation needs to ask.
        """
        for i, (name, tensor, before) in enumerate(self._held):
            if tensor._version == self._versions[i] and not thorough:
                continue
            if not _same(tensor, before):
                return name
            self._versions[i] = tensor._version
        return None

    def check(self) -> None:
        """Raises if a tensor is not what it was.

        Raises:
            RuntimeError: With the tensor's name, and the remedy.
        """
        self._refuse(self.changed())

    def check_entries(self) -> None:
        """As `check`, thoroughly; see `changed`."""
        self._refuse(self.changed(thorough=True))

    @staticmethod
    def _refuse(name: str | None) -> None:
        if name is not None:
            raise RuntimeError(
                f"{name} was written to after the problem was made, and the problem shares its "
                "memory: make a new problem at the new point, or put the old values back."
            )


def _same(tensor: Tensor, before: Tensor) -> bool:
    alike = tensor.dtype == before.dtype and tensor.device == before.device
    return alike and torch.equal(_sample(tensor), before)


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)].clone()
