"""The condition number of a positive-definite operator."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from ..fitting.report import plain_number
from ..solvers.lanczos import lanczos
from .eigenvalues import journaled, not_converged
from .probed import Probeable, Probed

Status = Literal["converged", "not_converged", "not_positive", "singular"]

ROUNDING = 10
"""Roundings of |A| to which an eigenvalue is known."""


@dataclass(frozen=True)
class ConditionNumber:
    """The ratio of the largest eigenvalue to the smallest, and how far it is known.

    Args:
        value: largest / smallest where A is positive definite, else infinity. Both are Rayleigh
            quotients, so the condition number is no less, but for rounding.
        lower: A lower bound, by that and the rounding of the two.
        upper: An upper bound if the residuals are those of the outermost eigenvalues, which none
            can prove (some eigenvalue is within them); infinity where the smallest may be zero.
        largest: The largest eigenvalue.
        smallest: The smallest.
        largest_residual: Some eigenvalue is within this distance.
        smallest_residual: Likewise.
        status: "converged"; "not_converged": `value` is a lower bound only; "not_positive": A has
            a negative eigenvalue; "singular": the smallest is zero, or no more than rounding.
        note: The same in words.
        products: Vectors multiplied by the operator.
        seed: Of the random start.
    """

    value: float
    lower: float
    upper: float
    largest: float
    smallest: float
    largest_residual: float
    smallest_residual: float
    status: Status
    note: str
    products: int
    seed: int

    def __float__(self) -> float:
        return self.value

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, infinity as None."""
        return {name: plain_number(x) for name, x in asdict(self).items()}

    def __str__(self) -> str:
        return (
            f"condition number {self.value:.4g} in [{self.lower:.4g}, {self.upper:.4g}], "
            f"eigenvalues {self.smallest:.4g} to {self.largest:.4g}, {self.products} products: "
            f"{self.note}"
        )


def condition_number(
    A: Probeable,
    *,
    rtol: float = 1e-2,
    basis: int | None = None,
    max_products: int | None = None,
    seed: int = 0,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> ConditionNumber:
    """lambda_max / lambda_min of a symmetric positive-definite operator.

    Lanczos runs to both ends at once until the residual of each is `rtol` of itself. Products grow
    with the root of the condition number.

    Args:
        A: See `Probeable`.
        rtol: Relative residual of either eigenvalue, and so about half the relative width of the
            bounds.
        basis: Vectors in a full basis; see `eigenvalues`. A larger one converges faster.
        max_products: Most vectors multiplied. None takes 1000, or more for a large basis.
        seed: Of the random start.
        progress: Whether to show a progress bar.
        checkpoint: A folder to go on from and to keep what is done in, at every restart.

    Returns:
        The number and its bounds. A RuntimeWarning says so where Lanczos has not converged.

    Raises:
        TypeError: A is something else.
        ValueError: An argument does not fit, or a product is not finite.
    """
    header = {"estimator": "condition_number", "rtol": rtol, "basis": basis}
    probed = Probed(A, seed=seed, probes="gaussian", checkpoint=checkpoint, header=header)
    state, keep = journaled(probed.journal)
    found = lanczos(
        probed.operator,
        probed.draw,
        1,
        which="both",
        basis=basis,
        rtol=rtol,
        relative_to_each=True,
        max_products=max_products,
        state=state,
        on_restart=keep,
        progress=progress,
    )
    values, residuals = found.values.tolist(), found.residual_norm.tolist()
    largest, smallest = values[0], values[-1]
    off_largest, off_smallest = residuals[0], residuals[-1]
    rounding = ROUNDING * torch.finfo(probed.proto.dtype).eps * max(largest, -smallest)
    lower = upper = math.inf
    status: Status
    if smallest < -rounding:
        status = "not_positive"
        note = f"A has an eigenvalue of {smallest:.3g} or less: add more damping than that."
    elif smallest <= rounding:
        status = "singular"
        note = (
            f"A is singular to rounding: its smallest eigenvalue is {smallest:.2g} beside "
            f"{largest:.2g}. Add damping, or use a wider dtype."
        )
    else:
        lower = max(1.0, (largest - rounding) / (smallest + rounding))
        least = smallest - off_smallest - rounding
        if least > 0:
            upper = (largest + off_largest + rounding) / least
        status, note = "converged", "both eigenvalues have converged."
        if not bool(found.converged.all()):
            status, note = "not_converged", f"a lower bound: {not_converged(found)}"
            warnings.warn(not_converged(found), RuntimeWarning, stacklevel=2)
    definite = status in ("converged", "not_converged")
    return ConditionNumber(
        value=largest / smallest if definite else math.inf,
        lower=lower,
        upper=upper,
        largest=largest,
        smallest=smallest,
        largest_residual=off_largest,
        smallest_residual=off_smallest,
        status=status,
        note=note,
        products=found.products,
        seed=seed,
    )
