"""Curvature in the activations, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from linear_operator import LinearOperator
from torch import Tensor
from tqdm import tqdm

from ..factors import DUAL_SIZE
from ..output_sweep import terminal_factor
from ..problem import LQRProblem
from ..solve import solve
from .eigenvalues import eigenvalues
from .estimate import Estimate
from .trace import trace

Kind = Literal["curvature", "value", "cost"]

PRODUCTS = 64
"""Vectors multiplied for each trace, unless the state is shorter."""


@dataclass(frozen=True, eq=False)
class DepthRow:
    """The curvature in the activations before one layer.

    Args:
        time: t: the state x_t enters layer t; T is the output.
        name: Of the layer that x_t enters, or "output".
        size: n_t, over all samples of the batch.
        values: The largest eigenvalues, by which of the three curvatures.
        residuals: How far off each may be.
        traces: tr, with standard errors.
    """

    time: int
    name: str
    size: int
    values: dict[str, Tensor]
    residuals: dict[str, Tensor]
    traces: dict[str, Estimate]


@dataclass(frozen=True, eq=False)
class Depth:
    """Spectra through depth; `print` it.

    Args:
        rows: First to last time.
        seed: Of the random vectors.
        products: Vectors multiplied; one product with P_t may be a solve.
    """

    rows: tuple[DepthRow, ...]
    seed: int
    products: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "seed": self.seed,
            "products": self.products,
            "rows": [
                {
                    "time": row.time,
                    "name": row.name,
                    "size": row.size,
                    "values": {kind: x.tolist() for kind, x in row.values.items()},
                    "residuals": {kind: x.tolist() for kind, x in row.residuals.items()},
                    "traces": {kind: x.to_dict() for kind, x in row.traces.items()},
                }
                for row in self.rows
            ],
        }

    def __str__(self) -> str:
        """The largest eigenvalue by each curvature, its residual, and the trace."""
        kinds = list(self.rows[0].values)
        head = "".join(f"{f'|{kind}|':>14}{'residual':>10}{f'tr {kind}':>24}" for kind in kinds)
        width = max(6, *(len(row.name) for row in self.rows))
        lines = [f"{'t':>3} {'layer':{width}}{'size':>9}{head}"]
        for row in self.rows:
            numbers = ""
            for kind in kinds:
                total = row.traces[kind]
                spread = f"{float(total):.4g} +- {float(total.standard_error):.1g}"
                top, residual = float(row.values[kind][0]), float(row.residuals[kind][0])
                numbers += f"{top:14.4g}{residual:10.1g}{spread:>24}"
            lines.append(f"{row.time:3d} {row.name:{width}}{row.size:9d}{numbers}")
        return "\n".join(lines)


def through_depth(
    problem: LQRProblem,
    k: int = 3,
    *,
    kinds: Sequence[Kind] = ("curvature", "value"),
    times: Sequence[int] | None = None,
    rtol: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
) -> Depth:
    """Largest eigenvalues and traces of the curvature in the activations x_t.

    "curvature" is C_t = Q_t + A_t'C_{t+1}A_t, with the weights held; "value" is the cost-to-go
    matrix P_t <= C_t, with the best answer of all later weights to a change of x_t; "cost" is the
    stage's own Q_t, which only Newton-like and intermediate-layer metrics have before the output.
    P_t comes from one low-rank sweep where the costs are small enough and damping is positive, and
    by one CG per product otherwise. Without damping P_t is zero where the later weights can undo
    any change of x_t, and its eigenvalues are rounding.

    Activations often have an eigenvalue for every sample or class, so that k vectors are multiplied
    together: a single one would find each multiple eigenvalue once.

    Args:
        problem: Of one batch; damping counts for P_t.
        k: Eigenvalues of each.
        kinds: Which curvatures.
        times: Which t; None takes all that have a state.
        rtol: Of the eigenvalues' residuals.
        seed: Of the random vectors.
        progress: Whether to show a progress bar over the times.

    Raises:
        TypeError: The problem is a `StreamedProblem` or something else.
        ValueError: A kind or a time is unknown, or k is less than 1.
    """
    if not isinstance(problem, LQRProblem):
        raise TypeError(
            f"problem is a {type(problem).__name__}: the curvature in activations is that of one "
            "batch; give LQRProblem.from_network(layers, inputs, targets, ...)."
        )
    if k < 1:
        raise ValueError(f"k is {k}: give at least 1.")
    unknown = sorted(set(kinds) - {"curvature", "value", "cost"})
    if unknown or not kinds:
        raise ValueError(f"kinds has {unknown}: choose of 'curvature', 'value' and 'cost'.")
    all_times = range(problem.horizon + 1)
    chosen = [t for t in all_times if problem.Q[t].shape[0]] if times is None else list(times)
    wrong = [t for t in chosen if t not in all_times]
    if wrong or not chosen:
        raise ValueError(f"times has {wrong}: give some of 0..{problem.horizon}.")
    values = _values(problem) if "value" in kinds else None
    names = [layer.name for layer in problem.origin.layers] if problem.origin else []
    rows, products = [], 0
    for t in tqdm(chosen, desc="depth", disable=not progress):
        made: dict[str, LinearOperator] = {}
        for kind in kinds:
            if kind == "curvature":
                made[kind] = problem.state_curvature(t)
            elif kind == "cost":
                made[kind] = problem.Q[t]
            else:
                made[kind] = problem.value(t) if values is None else values[t]
        size = problem.Q[t].shape[0]
        most = min(k, size)
        tops = {
            kind: eigenvalues(A, most, block=most, rtol=rtol, seed=seed) for kind, A in made.items()
        }
        traces = {
            kind: trace(A, products=min(PRODUCTS, size), seed=seed) for kind, A in made.items()
        }
        products += sum(top.products for top in tops.values())
        products += sum(total.products for total in traces.values())
        name = "output" if t == problem.horizon else (names[t] if names else f"{t}")
        rows.append(
            DepthRow(
                time=t,
                name=name,
                size=size,
                values={kind: top.values for kind, top in tops.items()},
                residuals={kind: top.residual_norm for kind, top in tops.items()},
                traces=traces,
            )
        )
    return Depth(tuple(rows), seed, products)


@torch.no_grad()
def _values(problem: LQRProblem) -> Sequence[LinearOperator] | None:
    """P_0..P_T from one sweep, or None where that does not apply."""
    factor = terminal_factor(problem)
    if factor is None or (factor.rank or 0) * factor.samples > DUAL_SIZE:
        return None
    try:
        return solve(problem, "low_rank").values
    except ValueError:
        # R has no inverse, or a cost on a layer has no factor.
        return None
