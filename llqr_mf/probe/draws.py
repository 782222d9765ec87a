"""Random vectors, each from its own generator: none depends on how many are drawn at once."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..seeds import mixed

Kind: TypeAlias = Literal["rademacher", "gaussian", "spherical"]
"""Signs, standard normals, or uniform on the sphere of radius sqrt(n); all have covariance I."""


def check_kind(kind: str) -> None:
    """Raises a ValueError for a kind that is none."""
    if kind not in get_args(Kind):
        choices = ", ".join(map(repr, get_args(Kind)))
        raise ValueError(f"probes={kind!r}: choose {choices}.")


def draw(kind: Kind, size: int, indices: range, seed: int, proto: Tensor) -> Tensor:
    """Rows (k, n) of vectors number `indices` of a seed, with the dtype and device of `proto`."""
    rows = torch.empty(len(indices), size, dtype=proto.dtype, device=proto.device)
    for row, index in zip(rows, indices, strict=True):
        generator = torch.Generator(proto.device).manual_seed(mixed(seed, index))
        if kind == "rademacher":
            row.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        else:
            row.normal_(generator=generator)
            if kind == "spherical":
                row.mul_(size**0.5 / torch.linalg.vector_norm(row, dtype=torch.float64))
    return rows
