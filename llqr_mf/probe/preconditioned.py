"""F'HF with F F' = M: what a solver or an optimizer sees of H through M."""

from __future__ import annotations

import torch
from linear_operator import LinearOperator
from torch import Tensor

from ..operators.apply import apply_rows, apply_rows_t
from ..operators.base import MatrixFreeOperator
from ..preconditioners.roots import root_of
from .probed import Probeable, symmetric_operator


class PreconditionedOperator(MatrixFreeOperator):
    """F'HF, shape (n, n), symmetric, with the eigenvalues of M^{1/2} H M^{1/2} for M = F F'.

    An eigenvector y of it is an eigenvector x = F y of M H.

    Args:
        proto: Carries dtype and device.
        inner: H.
        root: F.
        columns: Columns per pass.
    """

    symmetric = True

    def __init__(
        self,
        proto: Tensor,
        *,
        inner: LinearOperator,
        root: LinearOperator,
        columns: int | None = None,
    ) -> None:
        super().__init__(proto, columns=columns, inner=inner, root=root)
        self.inner, self.root = inner, root

    def _sizes(self) -> tuple[int, int]:
        n = self.inner.shape[-1]
        return n, n

    def _rows(self, v: Tensor) -> Tensor:
        moved = apply_rows(self.root, v.to(self.root.dtype)).to(v.dtype)
        curved = apply_rows(self.inner, moved)
        return apply_rows_t(self.root, curved.to(self.root.dtype)).to(v.dtype)


def preconditioned(H: Probeable, M: LinearOperator | Tensor) -> PreconditionedOperator:
    """The operator whose eigenvalues are those of M^{1/2} H M^{1/2}, to be probed like any other.

    With M = H^{-1} all of them are 1; their spread is what CG sees of a preconditioned problem.

    Args:
        H: A symmetric operator or a problem.
        M: A structured inverse preconditioner, a diagonal, or a small dense one.

    Raises:
        ValueError: The shapes differ, M is not positive definite, or of a kind without a known
            root.
    """
    inner = symmetric_operator(H)
    if tuple(M.shape) != tuple(inner.shape):
        raise ValueError(f"M has shape {tuple(M.shape)} and H {tuple(inner.shape)}.")
    proto = torch.empty(0, dtype=inner.dtype, device=inner.device)
    return PreconditionedOperator(proto, inner=inner, root=root_of(M))
