"""Coordinates in which a structure is linear."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Chart(ABC):
    """Coordinates phi, a flat vector (n,), such that M v is linear in phi for every v.

    The LQR objective of u = -M v is then quadratic in phi, and its normal equations are those
    that `fit` solves by CG. The rest of M (other factors, bases) stays as it is meanwhile.
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
        """M(phi) v for rows (k, P); linear in phi."""

    @abstractmethod
    def pull(self, v: Tensor, w: Tensor) -> Tensor:
        """The adjoint: sum_j d<w_j, M(phi) v_j> / dphi, shape (n,), for rows v and w (k, P)."""

    @abstractmethod
    def project(self, phi: Tensor, floor: float) -> Tensor:
        """The nearest coordinates whose M is positive definite.

        Args:
            phi: Coordinates.
            floor: Least eigenvalue of the block of M that they describe, relative to the mean
                eigenvalue of that block now.
        """

    @abstractmethod
    def mass(self) -> Tensor:
        """Weights w (n,) with ||M(phi)||_F^2 = sum_i w_i phi_i^2."""
