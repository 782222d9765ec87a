"""A folder that a long computation goes on from."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROUNDINGS = 100
"""Roundings by which a fingerprint may differ: another machine or number of threads."""

HEADER = "header.pt"

FORMAT = 2
"""Of the files; a folder of another one is not read."""

UNFINISHED = ".new"
"""How the names of files end that are being written, or were when their process was killed."""


class Journal:
    """What has been computed so far, in a folder of one file for each part of it.

    A run that was cut off and is started again with the same arguments reads what is there and
    goes on; its result is the same. A file is written beside its place, under a name of its own,
    and moved there as a whole: it is complete or not there, and processes that share a folder
    write the same over each other. Without a path nothing is kept.

    Args:
        path: The folder, or None. Made if it is missing.
        header: Plain values that tell one computation from another: the estimator, its options,
            its seed.
        fingerprint: Numbers that tell one operator from another, say of one product; float64.
        tolerance: How much each of these may differ.

    Raises:
        ValueError: The folder is of another computation or operator, or is none of these, or its
            header cannot be read; it is left as it is.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        header: dict[str, Any],
        fingerprint: Tensor,
        tolerance: float | Tensor = 0.0,
    ) -> None:
        if path is not None and not os.fspath(path):
            raise ValueError("checkpoint is an empty path: give a folder's name, or None.")
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        fingerprint = fingerprint.cpu()
        if self._is_free():
            self.path.mkdir(parents=True, exist_ok=True)
            held = {"format": FORMAT, "header": header, "fingerprint": fingerprint}
            self._write(HEADER, held, replace=False)
        self._check(header, fingerprint, tolerance)

    def get(self, key: str) -> tuple[Tensor, ...] | None:
        """What was put under a key, or None.

        Raises:
            ValueError: The file cannot be read, or is not what was put there.
        """
        if self.path is None or not (self.path / _file(key)).exists():
            return None
        held = self._read(_file(key))
        whole = isinstance(held, list) and all(isinstance(t, Tensor) for t in held)
        if not whole or not held or not torch.equal(held[-1], _checksum(key, held[:-1])):
            raise self._damaged(_file(key), "its contents are not those that were written")
        return tuple(held[:-1])

    def put(self, key: str, tensors: tuple[Tensor, ...]) -> None:
        """Keeps tensors under a key, in place of what was there."""
        if self.path is None:
            return
        # A view would be written with all that it is a view of.
        own = [t.clone() if t.untyped_storage().nbytes() > t.nbytes else t for t in tensors]
        self._write(_file(key), [*own, _checksum(key, own)])

    def _is_free(self) -> bool:
        """Whether the folder is not there, or nothing is in it but what was never finished."""
        assert self.path is not None
        if not self.path.exists():
            return True
        inside = self.path.iterdir() if self.path.is_dir() else [self.path]
        return all(file.name.endswith(UNFINISHED) for file in inside)

    def _check(self, header: dict[str, Any], fingerprint: Tensor, tolerance: Any) -> None:
        assert self.path is not None
        remedy = "give another path, or delete it"
        if not (self.path / HEADER).exists():
            raise ValueError(f"'{self.path}' is there and holds no computation: {remedy}.")
        found = self._read(HEADER)
        if not isinstance(found, dict):
            raise self._damaged(HEADER, "it is no header")
        if found.get("format") != FORMAT:
            raise ValueError(
                f"'{self.path}' has files of format {found.get('format')}, of another version of "
                f"this library (format {FORMAT} here): {remedy}."
            )
        old, seen = found.get("header"), found.get("fingerprint")
        if not isinstance(old, dict) or not isinstance(seen, Tensor):
            raise self._damaged(HEADER, "it is no header")
        if old != header:
            odd = [key for key in {**old, **header} if old.get(key) != header.get(key)]
            before = {key: old.get(key) for key in odd}
            raise ValueError(
                f"'{self.path}' holds another computation ({before} there, "
                f"{ {key: header.get(key) for key in odd} } here): {remedy}."
            )
        same = seen.shape == fingerprint.shape and seen.dtype == fingerprint.dtype
        # Written so that NaN is another one.
        if not same or not bool(((seen - fingerprint).abs() <= tolerance).all()):
            raise ValueError(
                f"'{self.path}' was written for another operator (other weights, data or damping), "
                f"preconditioner or start: {remedy}."
            )

    def _read(self, name: str) -> Any:
        assert self.path is not None
        try:
            return torch.load(self.path / name, weights_only=True, map_location="cpu")
        # A damaged file may raise anything.
        except Exception as error:
            raise self._damaged(name, f"{type(error).__name__} while it was read") from error

    def _damaged(self, name: str, what: str) -> ValueError:
        assert self.path is not None
        remedy = "delete it, and its part is computed again"
        if name == HEADER:
            remedy = "delete the folder, or give another path"
        return ValueError(f"'{self.path / name}' is damaged ({what}): {remedy}.")

    def _write(self, name: str, held: Any, *, replace: bool = True) -> None:
        """Puts a file in its place as a whole; without `replace` the first one to come stays."""
        assert self.path is not None
        beside = self.path / f"{name}.{uuid.uuid4().hex}{UNFINISHED}"
        try:
            torch.save(held, beside)
            if replace:
                os.replace(beside, self.path / name)
            else:
                _move_if_free(beside, self.path / name)
        finally:
            beside.unlink(missing_ok=True)


def _move_if_free(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except FileExistsError:
        return
    except OSError:  # A file system without hard links.
        os.replace(source, place)


def _checksum(key: str, tensors: Sequence[Tensor]) -> Tensor:
    """Of the key, and of every tensor's shape, dtype and bytes."""
    made = hashlib.sha256(key.encode())
    for tensor in tensors:
        made.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        made.update(flat.view(torch.uint8).numpy().data)
    return torch.tensor(list(made.digest()), dtype=torch.uint8)


def _file(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", key) + ".pt"
