"""A folder that a long computation goes on from."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROUNDINGS = 100
"""Roundings by which a fingerprint may differ: another machine or number of threads."""

HEADER = "header.pt"


class Journal:
    """What has been computed so far, in a folder of one file for each part of it.

    A run that was cut off and is started again with the same arguments reads what is there and
    goes on; its result is the same. A file is written beside its place and moved there as a
    whole. Without a path nothing is kept.

    Args:
        path: The folder, or None. Made if it is missing.
        header: Plain values that tell one computation from another: the estimator, its options,
            its seed.
        fingerprint: Numbers that tell one operator from another, say of one product; float64.
        tolerance: How much these may differ.

    Raises:
        ValueError: The folder is of another computation or operator, or is none of these; it is
            left as it is.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        header: dict[str, Any],
        fingerprint: Tensor,
        tolerance: float = 0.0,
    ) -> None:
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        remedy = "give another path, or delete it"
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            self.path.mkdir(parents=True, exist_ok=True)
            self._write(HEADER, {"header": header, "fingerprint": fingerprint.cpu()})
            return
        if not (self.path / HEADER).exists():
            raise ValueError(f"'{self.path}' is there and holds no computation: {remedy}.")
        held = torch.load(self.path / HEADER, weights_only=True)
        if held["header"] != header:
            old, new = held["header"], header
            odd = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            before = {key: old.get(key) for key in odd}
            raise ValueError(
                f"'{self.path}' holds another computation ({before} there, "
                f"{ {key: new.get(key) for key in odd} } here): {remedy}."
            )
        if bool(((held["fingerprint"] - fingerprint.cpu()).abs() > tolerance).any()):
            raise ValueError(
                f"'{self.path}' was written for another operator (other weights, data or damping): "
                f"{remedy}."
            )

    def get(self, key: str) -> tuple[Tensor, ...] | None:
        """What was put under a key, or None."""
        if self.path is None or not (self.path / _file(key)).exists():
            return None
        return tuple(torch.load(self.path / _file(key), weights_only=True))

    def put(self, key: str, tensors: tuple[Tensor, ...]) -> None:
        """Keeps tensors under a key, in place of what was there."""
        # A view would be written with all that it is a view of.
        own = [t.clone() if t.untyped_storage().nbytes() > t.nbytes else t for t in tensors]
        self._write(_file(key), own)

    def _write(self, name: str, held: Any) -> None:
        if self.path is None:
            return
        beside = self.path / f"{name}.new"
        torch.save(held, beside)
        os.replace(beside, self.path / name)


def _file(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", key) + ".pt"
