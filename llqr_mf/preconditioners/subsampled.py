"""The exact inverse of a smaller batch's H: a preconditioner for CG on a larger one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..factors import output_factor
from ..gram_matrix import gram_matrix
from ..operators.base import MatrixFreeOperator
from ..problem import LQRProblem
from ..solvers.dual import Dual


class SubsampledDual(MatrixFreeOperator):
    """M = (J_s' Q_s J_s + R)^{-1} of the samples s, exactly; shape (P, P), positive definite.

    M v = R^{-1} (v - J'L (I + G)^{-1} L'J R^{-1} v) by one Cholesky factor of size N_s r. As the
    `preconditioner` of `lq.solve(larger, method="cg")`, or of a `StreamedProblem`, it takes away
    the eigenvalues that the sub-sample sees; one product costs what a condensed product of the
    sub-sample does. The terms of the difference nearly cancel along the largest of them, so in
    float32 it helps down to R of about 1e-6 of H's norm.

    Args:
        problem: The sub-sample's problem, with the damping of the larger one.

    Raises:
        ValueError: The problem's costs are not one terminal cost with a factor, R has no inverse,
            or N_s r is too large for a Gram matrix.
    """

    symmetric = True

    def __init__(self, problem: LQRProblem) -> None:
        super().__init__(problem.system.proto, columns=problem._columns, problem=problem)
        factor = output_factor(problem)
        with torch.no_grad():
            gram, _ = gram_matrix(problem, factor)
            if gram is None:
                raise ValueError(
                    f"the sub-sample's Gram matrix would have {factor.samples * (factor.rank or 0)}"
                    " rows, too many without a closed form: take fewer samples."
                )
            self.problem = problem
            self._dual = Dual(problem.system, factor, gram)

    def _sizes(self) -> tuple[int, int]:
        return self.problem.size, self.problem.size

    def _rows(self, v: Tensor) -> Tensor:
        return self._dual.precondition_rows(v)
