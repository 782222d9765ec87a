"""Q_T: the curvature of a loss or a divergence at the network's output."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from .base import MatrixFreeOperator


class OutputCurvature(MatrixFreeOperator):
    """A symmetric matrix on the flattened output, shape (N*D, N*D) for N samples of D outputs.

    Curvature here carries the whole scaling of the objective: the 1/N of a mean is part of Q.
    Where a factor is known, Q = blockdiag(L_n L_n') with L_n of shape (D, r), r being `rank`.
    Coordinates of a factor, z, have shape (k, r, N) for k right-hand sides.

    Attributes:
        samples: N.
        width: D.
        rank: r, the columns of each sample's factor; None where no factor is known.
        unfactored: Why there is none, where that was looked into.
        flat: What it is, where it was found to be zero.
    """

    symmetric = True

    samples: int
    width: int
    rank: int | None
    unfactored: str | None = None
    flat: str | None = None

    def _sizes(self) -> tuple[int, int]:
        n = self.samples * self.width
        return n, n

    @abstractmethod
    def scaled(self, c: float) -> OutputCurvature:
        """The same curvature times c > 0."""

    def factor(self, z: Tensor) -> Tensor:
        """L z; shape (k, r, N) to (k, N*D)."""
        raise self._no_factor()

    def factor_t(self, v: Tensor) -> Tensor:
        """L' v; shape (k, N*D) to (k, r, N)."""
        raise self._no_factor()

    def factor_columns(self, start: int, stop: int) -> Tensor:
        """Columns start to stop of every sample's factor, shape (stop - start, N, D)."""
        if self.rank is None:
            raise self._no_factor()
        if not 0 <= start <= stop <= self.rank:
            raise ValueError(
                f"columns {start} to {stop} of a factor of {self.rank} columns: give "
                f"0 <= start <= stop <= {self.rank}."
            )
        k = stop - start
        z = torch.zeros(k, self.rank, self.samples, dtype=self.dtype, device=self.device)
        z[torch.arange(k), torch.arange(start, stop)] = 1
        return self.factor(z).reshape(k, self.samples, self.width)

    def _no_factor(self) -> NotImplementedError:
        reason = f" ({self.unfactored})" if self.unfactored else ""
        return NotImplementedError(
            f"{type(self).__name__} has no known factor L with Q = L L' (rank is None){reason}: "
            "use a method that needs only products with Q, or a loss or metric with a closed form."
        )


def positive_scale(c: float) -> float:
    """C itself, once it is known to be positive and finite.

    Raises:
        ValueError: It is not.
    """
    if not (math.isfinite(c) and c > 0):
        raise ValueError(f"curvature can be scaled by a finite c > 0 only, not by {c}.")
    return float(c)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype that curvature of outputs of this dtype is stored and computed in."""
    return torch.promote_types(dtype, torch.float32)
