"""Coordinates of the output space: Q_T = L L', with L block diagonal over samples."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Factor(Protocol):
    """L, and how many columns each sample's has."""

    samples: int
    rank: int | None

    def factor(self, z: Tensor) -> Tensor:
        """L z, (k, r, N) to (k, n_T)."""

    def factor_t(self, v: Tensor) -> Tensor:
        """L' v, (k, n_T) to (k, r, N)."""


class Coordinates:
    """Flat outputs to float64 rows (k, r N) and back, by L' and L.

    Args:
        factor: L.
    """

    def __init__(self, factor: Factor) -> None:
        assert factor.rank is not None
        self.factor, self.shape = factor, (factor.rank, factor.samples)

    @property
    def size(self) -> int:
        """Coordinates in all, r N."""
        return self.shape[0] * self.shape[1]

    def seen(self, v: Tensor) -> Tensor:
        """L' v; rows (k, n_T) to float64 rows (k, r N)."""
        return self.factor.factor_t(v.double()).flatten(1)

    def spread(self, y: Tensor) -> Tensor:
        """L y; rows (k, r N) to rows (k, n_T) of the same dtype."""
        return self.factor.factor(y.reshape(len(y), *self.shape))


def solve_by_cholesky(cholesky: Tensor, y: Tensor) -> Tensor:
    """(I + G)^{-1} y for rows (k, r N), in float64."""
    return torch.cholesky_solve(y.double().mT, cholesky).mT
