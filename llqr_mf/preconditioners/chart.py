"""Coordinates in which a structure is linear."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class Chart(ABC):
    """Coordinates phi, a flat vector (n,), in which M v is affine for every v.

    M v = times(phi, v) + rest(v), the first linear in phi and the second free of it. The LQR
    objective of u = -M v is then quadratic in phi, and its normal equations are those that `fit`
    solves by CG. The rest of M (other factors, bases) stays as it is meanwhile.
    """

    elementwise = False
    """Whether M > 0 means phi > 0, entry by entry; otherwise only `project` knows."""

    @abstractmethod
    def get(self) -> Tensor:
        """The current coordinates, (n,); a fresh tensor."""

    @abstractmethod
    def put(self, phi: Tensor) -> None:
        """Writes coordinates into the structure's tensors."""

    @abstractmethod
    def times(self, phi: Tensor, v: Tensor) -> Tensor:
        """The part of M v that is linear in phi, for rows v (k, P)."""

    def rest(self, v: Tensor) -> Tensor:
        """The part of M v that does not depend on phi, for rows v (k, P)."""
        return torch.zeros_like(v)

    @abstractmethod
    def pull(self, v: Tensor, w: Tensor) -> Tensor:
        """The adjoint: sum_j d<w_j, times(phi, v)_j> / dphi, (n,), for rows v and w (k, P)."""

    @abstractmethod
    def project(self, phi: Tensor, floor: float) -> Tensor:
        """The nearest coordinates whose M is positive definite.

        Args:
            phi: Coordinates.
            floor: Least eigenvalue of each tensor that they describe (a matrix, or a diagonal),
                relative to the mean eigenvalue of that tensor now.
        """

    @abstractmethod
    def mass(self) -> Tensor:
        """Weights w (n,) with ||M(phi) - rest||_F^2 = sum_i w_i phi_i^2."""


class ElementwiseChart(Chart):
    """Coordinates that are entries of a structure's positive tensors, one tensor after another.

    Args:
        tensors: The structure's own tensors, written in place.
    """

    elementwise = True

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.sizes = [tensor.numel() for tensor in tensors]

    def get(self) -> Tensor:
        """The entries, (n,)."""
        return torch.cat([tensor.reshape(-1) for tensor in self.tensors])

    @torch.no_grad()
    def put(self, phi: Tensor) -> None:
        """Writes the entries."""
        for tensor, part in zip(self.tensors, phi.split(self.sizes), strict=True):
            tensor.copy_(part.reshape(tensor.shape))

    def project(self, phi: Tensor, floor: float) -> Tensor:
        """Raises entries to `floor` times the mean of their tensor."""
        parts = zip(self.tensors, phi.split(self.sizes), strict=True)
        return torch.cat([part.clamp(min=floor * float(t.mean())) for t, part in parts])

    def mass(self) -> Tensor:
        """Ones: an entry is an eigenvalue of M."""
        return torch.ones_like(self.get())
