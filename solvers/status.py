"""How a solve ended, in words that say what to change."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Code(Enum):
    """The ways a solver can end."""

    CONVERGED = "converged"
    TRUST_REGION = "trust region"
    MAX_ITERATIONS = "max iterations"
    STAGNATED = "stagnated"
    NEGATIVE_CURVATURE = "negative curvature"
    INDEFINITE = "indefinite"
    NOT_FINITE = "not finite"


SEVERITY = tuple(Code)
"""The codes from best to worst; a block of columns reports its worst."""

MESSAGES = {
    Code.CONVERGED: "the true residual is within tolerance.",
    Code.TRUST_REGION: (
        "the step stopped on the boundary of the trust region. This is a valid answer; raise "
        "`radius` if the model is trusted further out."
    ),
    Code.MAX_ITERATIONS: (
        "`max_iterations` was reached before the tolerance. Raise `max_iterations`, loosen "
        "`rtol`, give a `preconditioner`, or add damping to lower the condition number."
    ),
    Code.STAGNATED: (
        "the recurrence converged and the true residual b - A x did not: the precision of the "
        "products limits it. Loosen `rtol`, run the operator in a wider dtype, or add damping."
    ),
    Code.NEGATIVE_CURVATURE: (
        "a direction p was met along which p'Ap is negative, or zero to the rounding of the "
        "products: the quadratic model has no minimiser there. Add damping, use a Gauss-Newton or "
        "Fisher metric, set `radius`, or solve with `minres`."
    ),
    Code.INDEFINITE: (
        "the preconditioner is not positive definite: r'Mr <= 0 was met. Give one that is, or "
        "None; if it is inexact, make its inner solve tighter."
    ),
    Code.NOT_FINITE: (
        "a product with the operator or the preconditioner gave NaN or infinity; x is the last "
        "finite iterate. Look for an overflow in the model, or run it in a wider dtype."
    ),
}


@dataclass(frozen=True)
class Status:
    """How a solve ended.

    Attributes:
        code: What happened, to test against.
        message: What happened and which option to change, to read.
    """

    code: Code
    message: str

    @property
    def ok(self) -> bool:
        """Whether the answer is what was asked for."""
        return self.code in (Code.CONVERGED, Code.TRUST_REGION)

    def __str__(self) -> str:
        return f"{self.code.value}: {self.message}"


def worst_status(codes: tuple[Code, ...], messages: dict[Code, str] = MESSAGES) -> Status:
    """The status of a block of columns: its worst code, and how many columns share it."""
    worst = max(codes, key=SEVERITY.index, default=Code.CONVERGED)
    message = messages[worst]
    if len(codes) > 1 and worst is not Code.CONVERGED:
        message = f"in {codes.count(worst)} of {len(codes)} columns, {message}"
    return Status(worst, message)
