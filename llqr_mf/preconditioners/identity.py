"""The identity: plain gradient descent, through the same interface."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Parts, Structure


class Identity(Structure):
    """M = I. It holds nothing and learns nothing; `Scalar` is its multiple.

    Args:
        like: What it is made for.
    """

    kind = "identity"

    def times_parts(self, parts: Mapping[str, Tensor]) -> Parts:
        """The rows themselves, not copied."""
        return dict(parts)

    def _diagonal(self) -> Tensor:
        return self._proto.new_ones(sum(self.layout.sizes))

    def inverse(self) -> Identity:
        """Itself."""
        return self

    def root(self) -> Identity:
        """Itself."""
        return self

    def logdet(self) -> Tensor:
        """Zero."""
        return self._proto.new_zeros((), dtype=torch.float64)

    def scale_(self, c: float) -> None:
        """Refused.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("the identity has no scale: use Scalar, which starts at one.")

    def blend_(self, other: Identity, weight: float) -> None:
        """Leaves it as it is."""
        self.check_blend(other, weight)
