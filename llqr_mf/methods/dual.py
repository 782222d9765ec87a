"""The exact step through the output space."""

from __future__ import annotations

import math

from torch import Tensor

from .. import factors
from ..gram_matrix import gram_matrix, nystrom_sketch
from ..operators.apply import apply_rows
from ..operators.fresh import fresh_rows
from ..operators.output_curvature import OutputCurvature
from ..operators.tangent import from_rows
from ..output_sweep import add_controls
from ..problem import LQRProblem
from ..solvers.costate import CostateEquation
from ..solvers.dots import row_dots
from ..solvers.dual import Dual, safe_cholesky
from ..solvers.nystrom import Nystrom
from ..solvers.residual import Measured, can_measure
from ..solvers.status import Code, Status
from .base import Found, Options, check_inverse, like, rows_of

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
    check_inverse(problem, "dual")
    factor = factors.output_factor(problem)
    by_costate = options.in_output_space and can_measure(problem.system)
    if not (by_costate or options.form_step):
        raise ValueError("an unformed step needs damping by numbers: leave form_step out.")
    gram, how = gram_matrix(problem, factor)
    sketch = None
    if gram is None:
        sketch, how = nystrom_sketch(problem, factor)
    how = f"{how}, N r = {(factor.rank or 0) * factor.samples}"
    if by_costate:
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
        q = q + apply_rows(problem.Q[-1], reached)
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
    step: Tensor | None = None
    if options.form_step:
        step, relative, decrease, spent = _formed(options, equation, problem, limit)
    else:
        relative, decrease, spent = *_unformed(equation, problem), 0
    return Found(
        step,
        _status(equation, relative, options.rtol, limit, how),
        equation.iterations,
        equation.products + spent,
        relative=relative,
        decrease=decrease,
        extra={"costate": equation.p[0], "damping": problem.control_cost.block_values},
    )


def _formed(
    options: Options, equation: CostateEquation, problem: LQRProblem, limit: int
) -> tuple[Tensor, float, float, int]:
    """U = previous - R^{-1} J' p, its true residual, decrease, and products; corrected if it helps.

    Where damping is small, J' p is a small difference of large terms and rounds accordingly; a
    correction is added to what was formed, so that its own rounding is relative to itself.
    """
    system, previous = problem.system, options.previous
    values = system.control_cost.block_values
    assert values is not None
    rows = fresh_rows(system.proto, 1, problem.size)
    uniform = system.control_cost.uniform
    p = equation.p if uniform is None else equation.p / -uniform
    system.adjoint(from_rows(p, system.state_shapes(system.horizon)), out=rows)
    targets = [view[0] for view in system.split_control(rows)]
    if uniform is None:
        for target, value in zip(targets, values, strict=True):
            target.div_(-value)
    if previous is not None:
        rows.add_(previous)
    carried = 0.0 if previous is None else system.output_product(previous.unsqueeze(0))

    def look() -> tuple[Measured, float]:
        found = options.measure(rows[0])
        assert found is not None
        return found, found.residual / (equation.gradient_norm or 1.0)

    measured, relative = look()
    rounds = 1
    while relative > options.rtol and rounds < ROUNDS and equation.iterations < limit:
        equation.estimate, kept = relative, (equation.y, equation.p)
        residual = equation.observed(measured.state - carried)
        change = equation.correct(residual, options.rtol, limit, progress=options.progress)
        add_controls(problem, change, targets, [-1 / value for value in values])
        again, now = look()
        rounds += 1
        if not now < relative:
            add_controls(problem, change, targets, [1 / value for value in values])
            equation.y, equation.p = kept
            break
        halved, measured, relative = now < relative / 2, again, now
        if not (halved or equation.direct):
            break
        equation.direct = equation.direct and halved
    return rows[0], relative, measured.decrease, 2 * rounds


def _unformed(equation: CostateEquation, problem: LQRProblem) -> tuple[float, float]:
    """Residual and decrease from the costate alone: x_T = -K p, and u'R u = p'K p."""
    p, q, response = equation.p, problem.output_gradient, equation.response
    bent = apply_rows(problem.Q[-1], response)
    decrease = row_dots(response, q) - (row_dots(response, bent) + row_dots(response, p)) / 2
    return equation.unformed_residual(), float(decrease)


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
