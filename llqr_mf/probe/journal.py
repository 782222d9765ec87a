"""A file that a long computation goes on from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-3
"""Relative difference of a fingerprint that is put down to another machine's rounding."""


class Journal:
    """What has been computed so far, in one file that is replaced as a whole at every `put`.

    A run that was cut off and is started again with the same arguments reads what it has and goes
    on; its result is the same. Without a path nothing is kept.

    Args:
        path: The file, or None.
        header: Plain values that tell one computation from another: the estimator, its options,
            its seed.
        fingerprint: Numbers that tell one operator from another, say those of one product.

    Raises:
        ValueError: The file is of another computation or operator. It is left as it is.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, header: dict[str, Any], fingerprint: Tensor
    ) -> None:
        self.path = None if path is None else Path(path)
        self._held: dict[str, Any] = {
            "header": header,
            "fingerprint": fingerprint.double().cpu(),
            "entries": {},
        }
        if self.path is None or not self.path.exists():
            return
        held = torch.load(self.path, weights_only=True)
        if held["header"] != header:
            raise ValueError(
                f"'{self.path}' holds another computation ({held['header']}, and this is {header}):"
                " give another path, or delete the file."
            )
        close = torch.allclose(held["fingerprint"], self._held["fingerprint"], rtol=TOLERANCE)
        if not close:
            raise ValueError(
                f"'{self.path}' was written for another operator (other weights, data or damping): "
                "give another path, or delete the file."
            )
        self._held = held

    def get(self, key: str) -> tuple[Tensor, ...] | None:
        """What was put under a key, or None."""
        found = self._held["entries"].get(key)
        return None if found is None else tuple(found)

    def put(self, key: str, tensors: tuple[Tensor, ...]) -> None:
        """Keeps tensors under a key, in place of what was there."""
        if self.path is None:
            return
        self._held["entries"][key] = [tensor.cpu() for tensor in tensors]
        beside = self.path.with_name(self.path.name + ".new")
        torch.save(self._held, beside)
        os.replace(beside, self.path)
