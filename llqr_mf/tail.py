"""The solver inside a value or a gain: CG on the problem from layer t on."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor

from .operators import System
from .solvers.cg import cg
from .solvers.status import Code


@dataclass(frozen=True)
class TailSolver:
    """Solves H u = b on a tail system for rows b, and does not hide how that went.

    Args:
        rtol: Relative residual.
        max_iterations: Of CG.
    """

    rtol: float
    max_iterations: int

    def __call__(self, tail: System, b: Tensor) -> Tensor:
        """U, in the shape of b."""
        if b.shape[1] == 0:
            return b
        result = cg(
            tail.condensed_product, b.mT, rtol=self.rtol, max_iterations=self.max_iterations
        )
        if result.status.code in (Code.NEGATIVE_CURVATURE, Code.NOT_FINITE):
            raise ValueError(f"the tail problem has no solution: {result.status}")
        if result.status.code is Code.MAX_ITERATIONS:
            worst = float(result.residual_norm.max())
            warnings.warn(
                f"a product with a value or gain has a relative residual of {worst:.1e}: "
                f"{result.status}",
                RuntimeWarning,
                stacklevel=2,
            )
        return result.x.mT
