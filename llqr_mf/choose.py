"""Which method `auto` takes: what each needs, then what each costs."""

from __future__ import annotations

from typing import Literal

import torch

from . import factors
from .gram_matrix import sketch_columns
from .methods import Options
from .output_sweep import calls, samples_are_apart, terminal_factor
from .problem import LQRProblem
from .streamed import StreamedProblem

Method = Literal["auto", "cg", "minres", "dual", "low_rank", "riccati"]

HALF = (torch.float16, torch.bfloat16)
"""Precisions in which only CG is chosen by `auto`."""

AUTO_DENSE = 256
"""Given matrices up to this size are solved densely by `auto`."""

CG_ITERATIONS = 30
"""Iterations of CG that the cost model reckons with: what dampings about 1e-4 take."""

SKETCHED_ITERATIONS = 15
"""The same of the dual's CG with a sketch of the Gram matrix."""

SKETCHED_SIZE = 2**17
"""Most unknowns of the dual."""

CHOLESKY = 2.0
"""Time of a float64 flop of the factorisation, in float32 flops of the products."""


def choose(options: Options) -> tuple[str, str]:
    """The method that `auto` takes, and why."""
    problem = options.problem
    if isinstance(problem, StreamedProblem):
        return "cg", "the batches are linearised in turn"
    asked = only_some(options)
    if asked:
        name = next(iter(asked))
        return asked[name][0], f"`{name}` was given"
    if problem.origin is None:
        largest = problem.system.largest_block
        if largest <= AUTO_DENSE:
            return "riccati", f"the matrices are small (at most {largest})"
        return "cg", f"the matrices are large ({largest})"
    if problem.dtype in HALF:
        return "cg", "the products are in half precision, too coarse for a Gram matrix"
    if problem.origin.linearization.remakes:
        return "cg", "the layers' linearisations are made again for every product (checkpoint)"
    factor = terminal_factor(problem)
    if factor is None:
        return "cg", "the costs are not one terminal cost with a known factor"
    size = factor.samples * (factor.rank or 0)
    if size > SKETCHED_SIZE:
        return "cg", f"the dual would have N r = {size} > {SKETCHED_SIZE} unknowns"
    damping = problem.control_cost.block_values
    if damping is None or min(damping) <= 0:
        return "cg", "damping is an operator, or not positive on every layer"
    if not samples_are_apart(problem):
        return "cg", "a layer mixes samples or shares a weight, so the Gram matrix is not cheap"
    costs = relative_costs(problem, factor.rank or 0, size)
    told = ", ".join(f"{name} {cost:.2g}" for name, cost in costs.items())
    told = f"gradients' worth of flops: {told} (of {CG_ITERATIONS} iterations)"
    whole = size <= factors.DUAL_SIZE
    if costs["dual"] <= costs["cg"]:
        what = "the Gram matrix has" if whole else "columns of the Gram matrix have"
        return "dual", f"{what} a closed form with N r = {size} rows; {told}"
    what = f"N r = {size}" if whole else f"N r = {size} > {factors.DUAL_SIZE}: a sketch"
    return "cg", f"the Gram matrix ({what}) would cost more; {told}"


def relative_costs(problem: LQRProblem, rank: int, size: int) -> dict[str, float]:
    """Flops of the dual and of CG, in flops of one gradient.

    A pass through the weights is F flops forward, as many again to pull back to the states, and
    as many to the weights. A gradient is 3 F, a condensed product 4 F. The dual pulls r columns
    back to the states, multiplies per-sample gradients, factors, and makes about four products;
    with a sketch it pulls them back twice and makes some more.
    """
    every = list(calls(problem))
    forward = sum(bound.node.flops for bound in every)
    columns = size if size <= factors.DUAL_SIZE else sketch_columns(size)
    gram = sum(bound.node.gram_flops(size) for bound in every) * columns / max(1, size)
    if columns == size:
        dual = rank * forward + gram + CHOLESKY * size**3 / 3 + 4 * 4 * forward
    else:
        dual = 2 * rank * forward + 2 * gram + CHOLESKY * size * columns**2
        dual += SKETCHED_ITERATIONS * 4 * forward
    if forward == 0:
        return {"dual": 0.0 if columns == size else 1.0, "cg": 0.0}
    return {"dual": dual / (3 * forward), "cg": CG_ITERATIONS * 4 / 3}


def only_some(options: Options) -> dict[str, tuple[str, ...]]:
    """Options that were given and belong to some methods only, with those methods."""
    given = {
        "preconditioner": (options.preconditioner is not None, ("cg", "minres")),
        "recurrence_dtype": (options.recurrence_dtype is not None, ("cg", "minres")),
        "initial": (options.initial is not None, ("cg",)),
        "radius": (options.radius is not None, ("cg",)),
        "flexible": (options.flexible, ("cg",)),
        "on_negative_curvature": (options.on_negative_curvature != "truncate", ("cg",)),
        "products": (options.products != "plain", ("cg",)),
        "vector_device": (options.vector_device is not None, ("cg",)),
        "form_step": (not options.form_step, ("dual",)),
    }
    return {name: methods for name, (is_given, methods) in given.items() if is_given}
