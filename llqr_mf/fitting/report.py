"""What a fit did, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ..preconditioners.base import Structure

VERSION = 1
"""Of what `FitReport.to_dict` returns."""


@dataclass(frozen=True, eq=False)
class FitReport:
    """What `fit` found, whether it was kept, and what it cost.

    J is the LQR objective g'u + 1/2 u'Hu of the step u = -M g, in units of the mean loss, a mean
    over the problems named. `objective` and `held_out` are those of the M that was fitted, also
    where it was not accepted; with `_before` they are those of the M given.

    Attributes:
        method: "cg" or "momentum".
        accepted: Whether M now has the new values.
        reason: Why, or why not.
        objective: J of the fitting problems at their own full gradients.
        objective_before: With the M given.
        optimum: The least J of these problems, -1/2 g'H^{-1}g; None without exact steps.
        fraction: objective / optimum; 1 is the exact step, negative a step that raises the model.
        cosine: Between -M g and the exact step.
        held_out: J of the held-out problems, None without any; `held_out_before`,
            `held_out_optimum`, `held_out_fraction`, `held_out_cosine` likewise.
        fit_objective: The mean that was minimised, over the probes; `fit_objective_before`.
        iterations: Steps of the fitter.
        products: Condensed products that the fitter spent: a rollout and an adjoint sweep for one
            vector on one problem. A block of k probes is k of them. Probes are not in it: a
            micro-batch gradient is one adjoint sweep, about half a product.
        measuring_products: Those spent on this report and the decision to accept: two per problem,
            and the exact solves.
        preconditioner: M.
    """

    method: str
    accepted: bool
    reason: str
    objective: float
    objective_before: float
    optimum: float | None
    fraction: float | None
    cosine: float | None
    held_out: float | None
    held_out_before: float | None
    held_out_optimum: float | None
    held_out_fraction: float | None
    held_out_cosine: float | None
    fit_objective: float
    fit_objective_before: float
    iterations: int
    products: int
    measuring_products: int
    preconditioner: Structure

    def to_dict(self) -> dict[str, Any]:
        """All but M, as plain numbers and strings, NaN as None: ready for JSON, with a version."""
        held: dict[str, Any] = {"version": VERSION}
        held |= {f.name: getattr(self, f.name) for f in fields(self) if f.name != "preconditioner"}
        return {name: plain_number(x) for name, x in held.items()}

    def __str__(self) -> str:
        """A few lines to read."""
        kept = "accepted" if self.accepted else "not accepted"
        lines = [f"{type(self.preconditioner).__name__} by {self.method}: {kept}, {self.reason}."]
        head = ("", "before", "after", "optimum", "fraction", "cosine")
        rows = [("fitting batches", self._numbers(""))]
        if self.held_out is not None:
            rows.append(("held out", self._numbers("held_out_")))
        on_probes = (self.fit_objective_before, self.fit_objective, None, None, None)
        rows.append(("probes", on_probes))
        lines.append("{:16}{:>12}{:>12}{:>12}{:>10}{:>8}".format(*head))
        for name, numbers in rows:
            cells = [format_number(x, ".4g") for x in numbers[:3]]
            cells += [format_number(x, ".3f") for x in numbers[3:]]
            lines.append("{:16}{:>12}{:>12}{:>12}{:>10}{:>8}".format(name, *cells))
        lines.append(
            f"{self.iterations} iterations, {self.products} products, "
            f"{self.measuring_products} more to measure."
        )
        return "\n".join(lines)

    def _numbers(self, prefix: str) -> tuple[float | None, ...]:
        after = self.held_out if prefix else self.objective
        before = self.held_out_before if prefix else self.objective_before
        rest = (getattr(self, f"{prefix}{name}") for name in ("optimum", "fraction", "cosine"))
        return (before, after, *rest)


def format_number(x: float | None, spec: str) -> str:
    """A number for a table, or a dash where there is none."""
    return "-" if x is None or math.isnan(x) else format(x, spec)


def plain_number(x: Any) -> Any:
    """What JSON can hold: NaN and infinity become None, anything else stays."""
    return None if isinstance(x, float) and not math.isfinite(x) else x
