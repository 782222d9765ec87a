"""What a solve returns."""

from __future__ import annotations

from dataclasses import dataclass

from linear_operator import LinearOperator
from torch import Tensor

from .solvers.status import Status


@dataclass(frozen=True, eq=False)
class Solution:
    """A step, how it was found and how good it is.

    Args:
        formed: u, flat (P,), or (P, k) for several right-hand sides; None if it was to be left
            unformed. Read it as `step`.
        iterations: CG iterations, 0 for a direct method.
        residual_norm: True relative residual |H u + g| / |g| at exit, the worst column's.
        status: How it ended, with a message; `status.ok` where the step is what was asked for.
        model_decrease: -(g'u + 1/2 u'Hu): how much the model falls, in units of the mean loss.
        method: The method that ran.
        products: Condensed products spent (a rollout and an adjoint sweep each).
        values: P_t, t = 0..T, where the method finds them (riccati, low_rank).
        gains: K_t, t = 0..T-1, likewise.
        direction: A direction of negative curvature, where asked for and met.
        costate: p_T, flat (n_T,), where the dual found it: u = -R^{-1} J' p_T (plus what momentum
            carried on).
        damping: With `costate`: R's number for every parameter.
    """

    formed: Tensor | None
    iterations: int
    residual_norm: float
    status: Status
    model_decrease: Tensor
    method: str
    products: int
    values: tuple[LinearOperator, ...] | None = None
    gains: tuple[LinearOperator, ...] | None = None
    direction: Tensor | None = None
    costate: Tensor | None = None
    damping: tuple[float, ...] | None = None

    @property
    def step(self) -> Tensor:
        """U, flat (P,), or (P, k) for several right-hand sides.

        Raises:
            ValueError: The step was left unformed.
        """
        if self.formed is None:
            raise ValueError(
                "this step was left unformed (form_step=False): add it to the weights with "
                "lq.apply_step_(problem, solution)."
            )
        return self.formed
