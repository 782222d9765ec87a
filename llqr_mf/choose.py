"""Which method `auto` takes: what each needs, then what each costs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from . import factors
from .gram_matrix import sketch_columns
from .methods import Options
from .methods.base import has_inverse, rows_of
from .operators.apply import apply_rows
from .output_sweep import calls, samples_are_apart, terminal_factor
from .problem import LQRProblem
from .solvers.dots import row_dots
from .streamed import StreamedProblem

Method = Literal["auto", "cg", "minres", "dual", "low_rank", "riccati"]

HALF = (torch.float16, torch.bfloat16)
"""Precisions in which only CG is chosen by `auto`."""

AUTO_DENSE = 256
"""Given matrices up to this size are solved densely by `auto`."""

SKETCHED_ITERATIONS = 15
"""Iterations of the dual's CG with a sketch of the Gram matrix that the cost model reckons with."""

SKETCHED_SIZE = 2**17
"""Most unknowns of the dual."""

AT_ONCE = 4.0
"""Iterations of CG in whose time a dual is taken without a look: hardly a solve takes fewer."""

LIKELY_FROM = 10.0
"""The same where CG seems likely to take half as many at least."""

TOLD_TO = 20.0
"""Times fewer iterations than seem likely that CG takes at its best."""

LOOKED_AHEAD = 30.0
"""The longest dual, in iterations of CG, for which the likely ones are told before CG begins."""

FIRST_LOOK = 4
"""Iterations of CG before its rate says something."""

TRIED = 0.5
"""Share of the dual's time from which CG has to look like ending sooner."""

AT_FIRST = 2.0
"""Times the dual's that CG may seem to take still when it begins: it often speeds up."""

IN_THE_END = 0.7
"""The same from `TRIED` on; what is told from the rate is more often too little than too much."""

# Times in flops of a float32 GEMM, 1 / 80 ns on one core of a server. Fitted to both methods' times
# on the networks of benchmarks/auto_choice.py that are marked as tuned on.

CALL = 4e6
"""A call that a column passes through, however small."""

ELEMENT = 100.0
"""A number written by what is no GEMM."""

CHOLESKY = 2.5
"""A float64 flop of the factorization."""

ENTRY = 200.0
"""An entry of the Gram matrix, for every call that adds to it."""

SOLVED_ENTRY = 1200.0
"""An entry of its factor in the float64 solves of the dual."""

VECTORS = 450.0
"""A weight in the vectors of CG, per iteration."""

ITERATION = 4e7
"""An iteration of CG, beside its product and its vectors."""

DUAL_PRODUCTS = 4.5
"""Products of the dual beside its Gram matrix: the residual, the step, its check, a correction."""

DUAL_CALLS = 2e8
"""What else it calls."""


@dataclass(frozen=True)
class Choice:
    """The method that `auto` begins with.

    Args:
        name: The method.
        reason: Why.
        instead: What to go on with where it does not do, None for nothing.
        patience: Iterations of CG that cost as much as what is instead.
    """

    name: str
    reason: str
    instead: str | None = None
    patience: float = math.inf


def choose(options: Options) -> Choice:
    """The method that `auto` takes, and why."""
    problem = options.problem
    if isinstance(problem, StreamedProblem):
        return Choice("cg", "the batches are linearised in turn")
    asked = only_some(options)
    if asked:
        name = next(iter(asked))
        return Choice(asked[name][0], f"`{name}` was given")
    if problem.origin is None:
        largest = problem.system.largest_block
        if largest <= AUTO_DENSE:
            return Choice("riccati", f"the matrices are small (at most {largest})")
        return Choice("cg", f"the matrices are large ({largest})")
    if problem.dtype in HALF:
        return Choice("cg", "the products are in half precision, too coarse for a Gram matrix")
    if problem.origin.linearization.remakes:
        return Choice(
            "cg", "the layers' linearisations are made again for every product (checkpoint)"
        )
    factor = terminal_factor(problem)
    if factor is None:
        return Choice("cg", "the costs are not one terminal cost with a known factor")
    size = factor.samples * (factor.rank or 0)
    if size > SKETCHED_SIZE:
        return Choice("cg", f"the dual would have N r = {size} > {SKETCHED_SIZE} unknowns")
    damping = problem.control_cost.block_values
    if damping is None or min(damping) <= 0:
        return Choice("cg", "damping is an operator, or not positive on every layer")
    if not has_inverse(problem):
        return Choice("cg", f"damping {min(damping):.3g} has no inverse in {problem.dtype}")
    if not samples_are_apart(problem):
        return Choice(
            "cg", "a layer mixes samples or shares a weight, so the Gram matrix is not cheap"
        )
    if not _has_memory(problem, size):
        return Choice("cg", f"the Gram matrix with N r = {size} rows would take half of the memory")
    patience = dual_in_iterations(problem, factor.rank or 0, factor.samples)
    sketched = "" if size <= factors.DUAL_SIZE else ", of which a sketch is made"
    told = f"the dual costs as much as {patience:.2g} iterations of cg by a count of flops"
    told += f" (its Gram matrix has N r = {size} rows{sketched})"
    if patience <= AT_ONCE:
        return Choice("dual", told, "cg")
    if patience <= LOOKED_AHEAD:
        likely = likely_iterations(options, min(damping))
        if patience <= max(min(LIKELY_FROM, 2 * likely), likely / TOLD_TO):
            return Choice("dual", f"{told}, and cg may take {likely:.0f}", "cg")
    return Choice("cg", f"{told}: cg begins, and gives way if it looks slower", "dual", patience)


def likely_iterations(options: Options, damping: float) -> float:
    """Iterations of CG, to a factor of three and sometimes ten, for half a product.

    The condition number is put at that along b: kappa = 1 + b'J'QJb / (damping b'b). With rtol the
    bound of CG is sqrt(kappa) log(2 / rtol) / 2, where the spectrum is flat in its logarithm; where
    it falls fast log(kappa) / 3 takes the root's place. Most networks are between.
    """
    problem = options.problem
    assert isinstance(problem, LQRProblem)
    b = rows_of(options.b)[:1]
    reached = problem.system.output_product(b)
    bent = row_dots(reached, apply_rows(problem.Q[-1], reached))
    along = float(bent / row_dots(b, b))
    kappa = 1 + along / damping
    if not 1 < kappa < math.inf:
        return 0.0
    wanted = math.log(2 / min(1.0, max(options.rtol, 1e-15))) / 2
    return wanted * math.sqrt(math.sqrt(kappa) * math.log(kappa) / 3)


def dual_in_iterations(problem: LQRProblem, rank: int, samples: int) -> float:
    """Time of the dual, in that of an iteration of CG.

    A column takes one product of each call's size on its way forward, as many back to the states,
    and as many back to the weights: a product of H 4. The dual pulls r columns back to the
    states, multiplies per-sample gradients, factors, solves, and makes some products; with a
    sketch it pulls them back twice.
    """
    assert problem.origin is not None
    shapes, size = problem.origin.linearization.shapes, rank * samples
    wide = 2.0 if problem.dtype == torch.float64 else 1.0
    flops = passed = gram = pulled = 0.0
    adding = 0
    for bound in calls(problem):
        work = bound.node.work()
        written = work.elements or sum(float(math.prod(shapes[i])) for i in bound.outputs)
        # Through vmap r columns take one start; their numbers are theirs.
        started, numbers = CALL * work.kernels, wide * ELEMENT * written
        flops += wide * work.flops
        passed += 2 * (started + numbers)
        many = 1.0
        if min(bound.inputs) < len(problem.names):
            adding += 1
            gram += wide * bound.node.gram_flops(size)
            many = bound.node.gram_passes(rank, samples)
        pulled += many * (started + rank * (wide * work.flops + numbers))
    product = 4 * flops + passed
    iteration = product + ITERATION + VECTORS * problem.size
    dual = DUAL_CALLS + DUAL_PRODUCTS * product + pulled
    if size <= factors.DUAL_SIZE:
        dual += gram + size**2 * (adding * ENTRY + SOLVED_ENTRY) + CHOLESKY * size**3 / 3
    else:
        columns = sketch_columns(size)
        dual += pulled + (2 * gram / size + adding * ENTRY * size) * columns
        dual += 2 * CHOLESKY * size * columns**2
        dual += SKETCHED_ITERATIONS * (product + ENTRY * size * columns)
    return dual / iteration


def _has_memory(problem: LQRProblem, size: int) -> bool:
    """Whether half of the device's memory holds the Gram matrix, its factor and a copy of each."""
    if problem.device.type == "cuda":
        memory = torch.cuda.get_device_properties(problem.device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    columns = size if size <= factors.DUAL_SIZE else sketch_columns(size)
    return 4 * 8 * size * columns <= memory / 2


def gives_up(patience: float, rtol: float) -> Callable[[int, float], bool]:
    """When CG should make room for a method that costs `patience` iterations.

    Its remaining iterations are told from the rate at which the least residual has fallen, from
    the start or over the last half, whichever is faster. That is compared with the patience, with
    less and less credit, so that a CG which is given up has mostly cost a fraction of it.

    Args:
        patience: In iterations of CG.
        rtol: Where it is to get.
    """
    least = [0.0]

    def give_up(iterations: int, residual: float) -> bool:
        least.append(min(math.log(max(residual, 1e-300)), least[-1]))
        wanted = least[-1] - math.log(max(rtol, 1e-300))
        if iterations < FIRST_LOOK or wanted <= 0:
            return False
        seen = len(least) - 1
        half = seen // 2
        rate = max(-least[-1] / seen, (least[half] - least[-1]) / (seen - half), 1e-12)
        spent = min(1.0, iterations / (TRIED * patience))
        return wanted / rate > patience * (AT_FIRST + (IN_THE_END - AT_FIRST) * spent)

    return give_up


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
