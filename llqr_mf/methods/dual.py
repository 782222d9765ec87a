"""The exact step through the output space."""

from __future__ import annotations

import math

from torch import Tensor

from .. import factors
from ..gram_matrix import gram_matrix, nystrom_sketch
from ..operators.fresh import fresh_rows
from ..operators.output_curvature import OutputCurvature
from ..operators.tangent import from_rows
from ..output_sweep import add_controls
from ..problem import LQRProblem
from ..solvers.costate import CostateEquation
from ..solvers.dots import row_dots
from ..solvers.dual import Dual, safe_cholesky
from ..solvers.nystrom import Nystrom
from ..solvers.residual import Measured
from ..solvers.status import Code, Status
from .base import Found, Options, like, rows_of

FREE_ITERATIONS = 1000
"""Most iterations without a Gram matrix, unless told otherwise."""

ROUNDS = 4
"""Steps formed and measured, at most: one, and corrections where float32 asks for them."""


def by_dual(options: Options) -> Found:
    """By the terminal costate where the right-hand side is a network's -g; else by (I + G) y = h.

    Raises:
        ValueError: The costs are not one terminal cost with a factor, or R has no inverse.
    """
    problem = options.problem
    assert isinstance(problem, LQRProblem)
    factor = factors.output_factor(problem)
    gram, how = gram_matrix(problem, factor)
    sketch = None
    if gram is None:
        sketch, how = nystrom_sketch(problem, factor)
    how = f"{how}, N r = {(factor.rank or 0) * factor.samples}"
    if options.in_output_space:
        return _by_costate(options, problem, factor, gram, sketch, how)
    result = Dual(problem.system, factor, gram, sketch).solve(
        rows_of(options.b),
        rtol=options.rtol,
        max_iterations=options.max_iterations,
        progress=options.progress,
    )
    status = Status(result.status.code, f"{result.status.message} ({how}.)")
    step = options.complete(like(result.u, options.b))
    return Found(step, status, result.iterations, result.products)


def _by_costate(
    options: Options,
    problem: LQRProblem,
    factor: OutputCurvature,
    gram: Tensor | None,
    sketch: Nystrom | None,
    how: str,
) -> Found:
    q = problem.output_gradient
    if options.previous is not None:
        # The same pull of R to the last step, seen from the output.
        reached = problem.system.output_product(options.previous.unsqueeze(0))
        q = q + problem.Q[-1]._matmul(reached.mT).mT
    equation = CostateEquation(
        problem.tangent_kernel,
        factor,
        q,
        cholesky=None if gram is None else safe_cholesky(gram),
        preconditioner=sketch,
    )
    limit = FREE_ITERATIONS if options.max_iterations is None else options.max_iterations
    # Half of what is wanted: the step that is formed from p is rounded once more.
    equation.solve(options.rtol / 2, limit, progress=options.progress)
    if not options.form_step:
        return _unformed(options, equation, problem, how)
    step, measured, relative = _formed(options, equation, problem, limit)
    status = _status(equation, relative, options.rtol, limit, how)
    return Found(
        step,
        status,
        equation.iterations,
        equation.products + 2,
        relative=relative,
        decrease=None if measured is None else measured.decrease,
        extra={"costate": equation.p[0]},
    )


def _formed(
    options: Options, equation: CostateEquation, problem: LQRProblem, limit: int
) -> tuple[Tensor, Measured | None, float]:
    """U = previous - R^{-1} J' p with its true residual, corrected while that helps.

    Where damping is small, J' p is a small difference of large terms and rounds accordingly; a
    correction is added to what was formed, so that its own rounding is relative to itself.
    """
    system, previous = problem.system, options.previous
    rows = fresh_rows(system.proto, 1, problem.size)
    uniform = system.control_cost.uniform
    p = equation.p if uniform is None else equation.p / -uniform
    system.adjoint(from_rows(p, system.state_shapes(system.horizon)), out=rows)
    if uniform is None:
        rows = system.control_cost.inverse_product(rows).neg_()
    if previous is not None:
        rows.add_(previous)
    relative = math.inf
    for turn in range(ROUNDS):
        measured = options.measure(rows[0])
        if measured is None:
            return rows[0], None, equation.estimate
        before, relative = relative, measured.residual / (equation.gradient_norm or 1.0)
        done = relative <= options.rtol or not relative < before / 2
        if done or turn == ROUNDS - 1 or equation.iterations >= limit:
            break
        state = measured.state
        if previous is not None:
            state = state - system.output_product(previous.unsqueeze(0))
        equation.estimate = relative
        change = equation.correct(
            equation.observed(state), options.rtol, limit, progress=options.progress
        )
        values = system.control_cost.block_values
        assert values is not None
        targets = [view[0] for view in system.split_control(rows)]
        add_controls(problem, change, targets, [-1 / value for value in values])
    return rows[0], measured, relative


def _unformed(options: Options, equation: CostateEquation, problem: LQRProblem, how: str) -> Found:
    """The costate alone: x_T = -K p, and u'R u = p'K p."""
    p, q, response = equation.p, problem.output_gradient, equation.response
    bent = problem.Q[-1]._matmul(response.mT).mT
    decrease = row_dots(response, q) - (row_dots(response, bent) + row_dots(response, p)) / 2
    limit = FREE_ITERATIONS if options.max_iterations is None else options.max_iterations
    return Found(
        None,
        _status(equation, equation.estimate, options.rtol, limit, how),
        equation.iterations,
        equation.products,
        relative=equation.estimate,
        decrease=float(decrease),
        extra={"costate": p[0]},
    )


def _status(
    equation: CostateEquation, relative: float, rtol: float, limit: int, how: str
) -> Status:
    if not math.isfinite(relative):
        return Status(Code.NOT_FINITE, "A product was not finite: look at the inputs.")
    if relative <= rtol:
        found = f"Exact dual solve, {equation.iterations} CG iterations in the output space."
        return Status(Code.CONVERGED, f"{found} ({how}.)")
    if equation.iterations >= limit:
        return Status(Code.MAX_ITERATIONS, f"Raise max_iterations, or the damping. ({how}.)")
    return Status(
        Code.STAGNATED,
        f"The residual stays at {relative:.2e}, which the precision of the products limits: use "
        f"float64 parameters, more damping, a larger rtol, or method='cg'. ({how}.)",
    )
