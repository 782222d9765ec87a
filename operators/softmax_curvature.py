"""Curvature of a categorical output: weighted blocks diag(p) - p p'."""

from __future__ import annotations

import torch
from torch import Tensor

from .output_curvature import OutputCurvature, at_least_float32, positive_scale


class SoftmaxCurvature(OutputCurvature):
    """One block w (diag p - p p') per position, with factor w^{1/2} (diag(p^{1/2}) - p p^{1/2}').

    A position is one categorical distribution over C classes; a sample has P of them (P = 1 for a
    plain classifier, the length of a sequence otherwise), so D = r = P*C. Nothing larger than
    (N, P, C) is stored. Coordinates of the factor are ordered as the flattened output is.

    A confident softmax is where these products lose their digits: p'v cancels v at the likeliest
    class. Products are therefore taken relative to that class, which keeps them accurate relative
    to their own size, however small that is.

    Args:
        proto: Carries the outputs' dtype and device.
        probabilities: p, shape (N, P, C), in float32 or better.
        weights: w >= 0, shape (N, P); it includes the 1/total of the mean.
        class_first: Whether a sample's outputs are flattened from (C, P) rather than (P, C).
        columns: Columns per pass.
    """

    def __init__(
        self,
        proto: Tensor,
        *,
        probabilities: Tensor,
        weights: Tensor,
        class_first: bool = False,
        columns: int | None = None,
    ) -> None:
        n, positions, classes = probabilities.shape
        if weights.shape != (n, positions):
            raise ValueError(
                f"weights have shape {tuple(weights.shape)} and probabilities "
                f"{tuple(probabilities.shape)}: give one weight per position, ({n}, {positions})."
            )
        super().__init__(
            proto,
            columns=columns,
            probabilities=probabilities,
            weights=weights,
            class_first=class_first,
        )
        self.samples = n
        self.width = self.rank = positions * classes
        self.probabilities, self.weights = probabilities, weights
        self.class_first = class_first
        self._likeliest = probabilities.argmax(dim=-1, keepdim=True)

    @staticmethod
    def from_logits(
        logits: Tensor, weights: Tensor, *, class_dim: int = -1, columns: int | None = None
    ) -> SoftmaxCurvature:
        """The curvature at logits of shape (N, ..., C), or (N, C, ...) for class_dim = 1.

        Args:
            logits: The network's output.
            weights: w >= 0, one per position in the order of the remaining axes.
            class_dim: 1 or -1.
            columns: Columns per pass.
        """
        if class_dim not in (1, -1):
            raise ValueError(f"class_dim is {class_dim}: the classes lie on axis 1 or -1.")
        wide = logits.detach().movedim(class_dim, -1).to(at_least_float32(logits.dtype))
        p = torch.softmax(wide, dim=-1).reshape(len(logits), -1, wide.shape[-1])
        return SoftmaxCurvature(
            logits.new_empty(0),
            probabilities=p,
            weights=weights.to(p.dtype).reshape(p.shape[:2]),
            class_first=class_dim == 1 and p.shape[1] > 1,
            columns=columns,
        )

    def scaled(self, c: float) -> SoftmaxCurvature:
        """The same curvature times c > 0; the probabilities are shared."""
        return SoftmaxCurvature(
            self._proto,
            probabilities=self.probabilities,
            weights=self.weights * positive_scale(c),
            class_first=self.class_first,
            columns=self._columns,
        )

    def _rows(self, v: Tensor) -> Tensor:
        x = self._centred(self._split(v.reshape(len(v), self.samples, self.width)))
        return self._join(x * self.probabilities * self.weights.unsqueeze(-1), v.dtype).flatten(1)

    def factor(self, z: Tensor) -> Tensor:
        """L z; shape (k, r, N) to (k, N*D)."""
        p = self.probabilities
        x = self._split(z.mT) * self._root()
        x = x - p * x.sum(-1, keepdim=True)
        # L z sums to zero over the classes. At the likeliest class it is a difference of nearly
        # equal numbers, so that entry is taken from the others.
        x = x.scatter_add(-1, self._likeliest_of(x), -x.sum(-1, keepdim=True))
        return self._join(x * self.weights.sqrt().unsqueeze(-1), z.dtype).flatten(1)

    def factor_t(self, v: Tensor) -> Tensor:
        """L' v; shape (k, N*D) to (k, r, N)."""
        x = self._centred(self._split(v.reshape(len(v), self.samples, self.width)))
        return self._join(x * self._root() * self.weights.sqrt().unsqueeze(-1), v.dtype).mT

    def _root(self) -> Tensor:
        return self.probabilities.sqrt()

    def _likeliest_of(self, x: Tensor) -> Tensor:
        return self._likeliest.expand(len(x), -1, -1, -1)

    def _centred(self, x: Tensor) -> Tensor:
        """X - p'x, shape (k, N, P, C)."""
        x = x - x.gather(-1, self._likeliest_of(x))
        return x - (self.probabilities * x).sum(-1, keepdim=True)

    def _split(self, x: Tensor) -> Tensor:
        """(k, N, D) to (k, N, P, C), in the dtype of the probabilities or better."""
        _, positions, classes = self.probabilities.shape
        inner = (classes, positions) if self.class_first else (positions, classes)
        x = x.reshape(*x.shape[:2], *inner)
        x = x.mT if self.class_first else x
        return x.to(torch.promote_types(x.dtype, self.probabilities.dtype))

    def _join(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(k, N, P, C) to (k, N, D)."""
        return (x.mT if self.class_first else x).flatten(-2).to(dtype)
