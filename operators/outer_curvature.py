"""Curvature given by its factor: a sum of outer products per sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .output_curvature import OutputCurvature, positive_scale


class OuterCurvature(OutputCurvature):
    """Q = blockdiag(sum_s v_s v_s'), the form of Monte-Carlo and empirical Fisher matrices.

    Args:
        proto: Carries the outputs' dtype and device.
        vectors: v, shape (N, D, r), in float32 or better; it includes the root of the 1/total of
            the mean.
        columns: Columns per pass.
    """

    def __init__(self, proto: Tensor, *, vectors: Tensor, columns: int | None = None) -> None:
        super().__init__(proto, columns=columns, vectors=vectors)
        self.samples, self.width, self.rank = vectors.shape
        self.vectors = vectors

    def scaled(self, c: float) -> OuterCurvature:
        """The same curvature times c > 0."""
        vectors = self.vectors * math.sqrt(positive_scale(c))
        return OuterCurvature(self._proto, vectors=vectors, columns=self._columns)

    def _rows(self, v: Tensor) -> Tensor:
        return self._spread(self._gather(v)).to(v.dtype)

    def factor(self, z: Tensor) -> Tensor:
        """L z; shape (k, r, N) to (k, N*D)."""
        return self._spread(z).to(z.dtype)

    def factor_t(self, v: Tensor) -> Tensor:
        """L' v; shape (k, N*D) to (k, r, N)."""
        return self._gather(v).to(v.dtype)

    def _gather(self, v: Tensor) -> Tensor:
        x, vectors = self._wide(v.reshape(len(v), self.samples, self.width))
        return torch.einsum("knd,ndr->krn", x, vectors)

    def _spread(self, z: Tensor) -> Tensor:
        z, vectors = self._wide(z)
        return torch.einsum("krn,ndr->knd", z, vectors).flatten(1)

    def _wide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates and vectors in the wider dtype of the two: solvers hold float64 ones."""
        dtype = torch.promote_types(x.dtype, self.vectors.dtype)
        return x.to(dtype), self.vectors.to(dtype)
