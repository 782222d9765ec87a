"""Curvature that couples no two outputs."""

from __future__ import annotations

from torch import Tensor

from .output_curvature import OutputCurvature, positive_scale


class DiagonalCurvature(OutputCurvature):
    """Q = diag(h), with factor diag(h^{1/2}) and r = D.

    Args:
        proto: Carries the outputs' dtype and device.
        diagonal: h >= 0, shape of the output, (N, ...), in float32 or better. An expanded tensor
            serves for a multiple of the identity.
        columns: Columns per pass.
    """

    def __init__(self, proto: Tensor, *, diagonal: Tensor, columns: int | None = None) -> None:
        super().__init__(proto, columns=columns, diagonal=diagonal)
        self.samples = len(diagonal)
        self.diagonal_values = diagonal.reshape(self.samples, -1)
        self.width = self.rank = self.diagonal_values.shape[1]

    def scaled(self, c: float) -> DiagonalCurvature:
        """The same curvature times c > 0."""
        # The first element of an axis that is only expanded stands for all of it.
        h = self.diagonal_values
        kept = h[tuple(slice(1) if stride == 0 else slice(None) for stride in h.stride())]
        return DiagonalCurvature(
            self._proto,
            diagonal=(kept * positive_scale(c)).expand(h.shape),
            columns=self._columns,
        )

    def _rows(self, v: Tensor) -> Tensor:
        x = v.reshape(len(v), self.samples, self.width) * self.diagonal_values
        return x.flatten(1).to(v.dtype)

    def factor(self, z: Tensor) -> Tensor:
        """L z; shape (k, r, N) to (k, N*D)."""
        return (z.mT * self.diagonal_values.sqrt()).flatten(1).to(z.dtype)

    def factor_t(self, v: Tensor) -> Tensor:
        """L' v; shape (k, N*D) to (k, r, N)."""
        x = v.reshape(len(v), self.samples, self.width) * self.diagonal_values.sqrt()
        return x.to(v.dtype).mT

    def _diagonal(self) -> Tensor:
        return self.diagonal_values.flatten().to(self.dtype)
