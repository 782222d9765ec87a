"""`solve`: one problem, several exact methods, one answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from linear_operator.operators import DenseLinearOperator
from torch import Tensor

from .factors import DUAL_SIZE, output_factor, state_factor
from .gram import closed_form_gram
from .operators.apply import apply_rows, as_operator
from .operators.tangent import size_of
from .output_sweep import samples_are_apart, terminal_factor
from .problem import LQRProblem
from .solution import Solution
from .solvers.cg import cg
from .solvers.dots import row_dots, row_norms
from .solvers.dual import Dual, gram_by_products
from .solvers.low_rank import low_rank
from .solvers.minres import minres
from .solvers.riccati import riccati
from .solvers.status import Code, Status
from .streamed import StreamedProblem

Problem: TypeAlias = LQRProblem | StreamedProblem

Method = Literal["auto", "cg", "minres", "dual", "low_rank", "riccati"]

HALF = (torch.float16, torch.bfloat16)
"""Precisions in which only CG is chosen by `auto`."""

GRAM_BY_PRODUCTS = 1024
"""Largest N r whose Gram matrix is formed by products when it has no closed form."""

DENSE_SIZE = 6000
"""Largest state or control that the dense Riccati recursion accepts."""

REFINEMENTS = 2
"""Solves of the residual that a low-rank sweep is followed by, where float32 asks for them."""

AUTO_DENSE = 256
"""Given matrices up to this size are solved densely by `auto`."""


@dataclass(frozen=True)
class _Options:
    rtol: float
    max_iterations: int | None
    preconditioner: Any
    initial: Tensor | None
    radius: float | None
    on_negative_curvature: Any
    recurrence_dtype: torch.dtype | None
    flexible: bool
    progress: bool
    given_rhs: bool


def solve(
    problem: Problem,
    method: Method = "auto",
    *,
    rtol: float | None = None,
    max_iterations: int | None = None,
    preconditioner: Any = None,
    initial: Tensor | None = None,
    rhs: Tensor | None = None,
    radius: float | None = None,
    on_negative_curvature: Literal["truncate", "direction", "raise"] = "truncate",
    recurrence_dtype: torch.dtype | None = None,
    flexible: bool = False,
    progress: bool = False,
) -> Solution:
    """Solves H u = -g exactly.

    | method | needs | cost |
    |---|---|---|
    | cg | nothing | one condensed product per iteration; O(1) memory beyond activations |
    | minres | nothing | as cg; for an indefinite H, where cg stops |
    | dual | terminal cost with a factor, damping > 0 | closed form: a few gradients, N r <= 4096 |
    | low_rank | costs with factors, damping > 0 | N r columns through every layer |
    | riccati | small sizes | dense float64: the oracle, with all values and gains |

    `auto` takes dual where its Gram matrix has a closed form and N r <= 4096, riccati for small
    given matrices, and else cg; the status says which and why.

    Args:
        problem: From a network, from matrices, or a `StreamedProblem` (cg and minres only).
        method: Which.
        rtol: Wanted true relative residual |H u + g| / |g|, per column. Default: 1e-6, and 1e-2 in
            half precisions, whose products are good for no more.
        max_iterations: Limit of the iterative methods.
        preconditioner: For cg and minres: an operator (P, P), or a function of rows (k, P), that
            approximates H^{-1} and is positive definite.
        initial: For cg: where to start, of the step's shape (the last step, scaled, is a good
            warm start).
        rhs: Right-hand sides (P,) or (P, k) in place of -g.
        radius: For cg: trust region |u| <= radius (Steihaug).
        on_negative_curvature: For cg: stop there ("truncate"), also return the direction, or
            raise.
        recurrence_dtype: For cg and minres: dtype of the vectors; None takes float64 while the
            block is small.
        flexible: For cg: for a preconditioner that changes between calls.
        progress: Whether to show a progress bar.

    Returns:
        The step with its true residual and status.

    Raises:
        ValueError: The method does not apply, and the message says which does.
    """
    b = _right_hand_side(problem, rhs)
    if rtol is None:
        rtol = 1e-2 if problem.dtype in HALF else 1e-6
    if max_iterations is not None and max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}: give at least 1, or None.")
    if isinstance(preconditioner, Tensor):
        preconditioner = as_operator(preconditioner)
    options = _Options(
        *(rtol, max_iterations, preconditioner, initial, radius),
        *(on_negative_curvature, recurrence_dtype, flexible, progress, rhs is not None),
    )
    reason = ""
    if method == "auto":
        method, reason = _choose(problem, options)
    solvers: dict[str, Callable[[Any, Tensor, _Options], _Found]] = {
        "cg": _cg,
        "minres": _minres,
        "dual": _dual,
        "low_rank": _low_rank,
        "riccati": _riccati,
    }
    if method not in solvers:
        raise ValueError(f"method '{method}' is unknown: choose one of {['auto', *solvers]}.")
    if isinstance(problem, StreamedProblem) and method not in ("cg", "minres"):
        raise ValueError(
            f"method='{method}' needs one batch's layers, and a StreamedProblem has many: use "
            "method='cg'."
        )
    for name, only in _asked(options).items():
        if method not in only:
            raise ValueError(
                f"`{name}` does not go with method='{method}': use method='{only[0]}'."
            )
    with torch.no_grad():
        found = solvers[method](problem, b, options)
        return _solution(problem, b, method, reason, found)


@dataclass(frozen=True)
class _Found:
    """What a method found: the step in the shape of b, and the rest of a `Solution`."""

    step: Tensor
    status: Status
    iterations: int = 0
    products: int = 0
    extra: dict[str, Any] | None = None


def _solution(problem: Problem, b: Tensor, method: str, reason: str, found: _Found) -> Solution:
    """Measures what was found: the true residual, and the model's decrease from it."""
    u = found.step
    rows, sides = _rows(u), _rows(b)
    left = apply_rows(problem.hessian, rows).neg_().add_(sides)
    norm, miss = row_norms(sides), row_norms(left)
    # u'b - 1/2 u'H u with H u = b - (the residual left).
    decrease = ((row_dots(rows, sides) + row_dots(rows, left)) / 2).to(b.dtype)
    status = found.status
    if reason:
        status = Status(status.code, f"auto chose {method}: {reason}. {status.message}")
    return Solution(
        step=u,
        iterations=found.iterations,
        residual_norm=_worst(miss, norm),
        status=status,
        model_decrease=decrease[0] if b.ndim == 1 else decrease,
        method=method,
        products=found.products + 1,
        **(found.extra or {}),
    )


def _worst(miss: Tensor, norm: Tensor) -> float:
    """The largest |H u - b| / |b| of all columns; |H u| where b is zero."""
    return float(torch.where(norm > 0, miss / norm, miss).max())


def _right_hand_side(problem: Problem, rhs: Tensor | None) -> Tensor:
    b, what = (-problem.gradient, "the gradient") if rhs is None else (rhs, "rhs")
    if b.ndim not in (1, 2) or b.shape[0] != problem.size or b.shape[1:] == (0,):
        raise ValueError(
            f"rhs has shape {tuple(b.shape)}: give ({problem.size},) or ({problem.size}, k)."
        )
    if b.dtype != problem.dtype or b.device != problem.device:
        raise ValueError(
            f"rhs is {b.dtype} on {b.device} and the problem is {problem.dtype} on "
            f"{problem.device}: convert rhs with .to()."
        )
    if not bool(torch.isfinite(b).all()):
        raise ValueError(f"{what} has entries that are NaN or infinite: there is no step.")
    return b


def _choose(problem: Problem, options: _Options) -> tuple[Method, str]:
    if isinstance(problem, StreamedProblem):
        return "cg", "the batches are linearised in turn"
    asked = _asked(options)
    if asked:
        return "cg", f"`{next(iter(asked))}` was given"
    if problem.origin is None:
        largest = max(
            max(size_of(s.state), size_of(s.next_state), size_of(s.controls))
            for s in problem.system.stages
        )
        if largest <= AUTO_DENSE:
            return "riccati", f"the matrices are small (at most {largest})"
        return "cg", f"the matrices are large ({largest})"
    if problem.dtype in HALF:
        return "cg", "the products are in half precision, too coarse for a Gram matrix"
    factor = terminal_factor(problem)
    if factor is None:
        return "cg", "the costs are not one terminal cost with a known factor"
    size = factor.samples * (factor.rank or 0)
    if size > DUAL_SIZE:
        return "cg", f"the Gram matrix would have N r = {size} > {DUAL_SIZE} rows"
    damping = problem.system.control_cost.block_values
    if damping is None or min(damping) <= 0:
        return "cg", "damping is an operator, or not positive on every layer"
    if not samples_are_apart(problem):
        return "cg", "a layer mixes samples or shares a weight, so the Gram matrix is not cheap"
    return "dual", f"the Gram matrix has a closed form with N r = {size} rows"


def _asked(options: _Options) -> dict[str, tuple[str, ...]]:
    """Options that were given and belong to some methods only, with those methods."""
    given = {
        "preconditioner": (options.preconditioner is not None, ("cg", "minres")),
        "recurrence_dtype": (options.recurrence_dtype is not None, ("cg", "minres")),
        "initial": (options.initial is not None, ("cg",)),
        "radius": (options.radius is not None, ("cg",)),
        "flexible": (options.flexible, ("cg",)),
        "on_negative_curvature": (options.on_negative_curvature != "truncate", ("cg",)),
    }
    return {name: methods for name, (is_given, methods) in given.items() if is_given}


def _rows(b: Tensor) -> Tensor:
    return b.reshape(1, -1) if b.ndim == 1 else b.mT


def _like(rows: Tensor, b: Tensor) -> Tensor:
    return rows[0] if b.ndim == 1 else rows.mT


def _cg(problem: Problem, b: Tensor, options: _Options) -> _Found:
    result = cg(
        problem.hessian,
        b,
        preconditioner=options.preconditioner,
        initial=options.initial,
        rtol=options.rtol,
        max_iterations=options.max_iterations,
        radius=options.radius,
        on_negative_curvature=options.on_negative_curvature,
        recurrence_dtype=options.recurrence_dtype,
        flexible=options.flexible,
        progress=options.progress,
    )
    extra = {"direction": result.direction}
    return _Found(result.x, result.status, result.iterations, result.products, extra)


def _minres(problem: Problem, b: Tensor, options: _Options) -> _Found:
    result = minres(
        problem.hessian,
        b,
        preconditioner=options.preconditioner,
        rtol=options.rtol,
        max_iterations=options.max_iterations,
        recurrence_dtype=options.recurrence_dtype,
        progress=options.progress,
    )
    return _Found(result.x, result.status, result.iterations, result.products)


def _dual(problem: LQRProblem, b: Tensor, options: _Options) -> _Found:
    factor = output_factor(problem)
    size = (factor.rank or 0) * factor.samples
    gram, how = None, "without a Gram matrix (N r is too large): matrix-free dual CG"
    if size <= DUAL_SIZE:
        gram, how = closed_form_gram(problem), "Gram matrix in closed form"
    if gram is None and size <= GRAM_BY_PRODUCTS:
        gram, how = gram_by_products(problem.system, factor), "Gram matrix by products"
    result = Dual(problem.system, factor, gram).solve(
        _rows(b),
        rtol=options.rtol,
        max_iterations=options.max_iterations,
        progress=options.progress,
    )
    status = Status(result.status.code, f"{result.status.message} ({how}, N r = {size}.)")
    return _Found(_like(result.u, b), status, result.iterations, result.products)


def _low_rank(problem: LQRProblem, b: Tensor, options: _Options) -> _Found:
    system = problem.system
    factors = [
        state_factor(problem, t) if system.state_costs[t] else None
        for t in range(problem.horizon + 1)
    ]
    terminal = factors[-1]
    if terminal is None:
        terminal = system.proto.new_zeros(0, size_of(system.state_shapes(problem.horizon)))
    result = low_rank(system, terminal, factors[:-1])
    rows = _rows(b)
    norm = row_norms(rows)
    u, left, worst = torch.zeros_like(rows), rows, math.inf
    for _ in range(1 + REFINEMENTS):
        refined = result.solve(left, system).add_(u)
        left = system.condensed_product(refined).neg_().add_(rows)
        before, worst = worst, _worst(row_norms(left), norm)
        if not worst < before:
            worst = before
            break
        u = refined
        if worst <= options.rtol:
            break
    values = tuple(result.value(t) for t in range(problem.horizon + 1))
    gains = tuple(result.gain(t) for t in range(problem.horizon))
    rank = max(len(factor) for factor in result.factors)
    code, message = Code.CONVERGED, f"One backward sweep of factors of rank at most {rank}."
    if not worst <= options.rtol:
        code = Code.STAGNATED
        message += (
            f" The residual stays at {worst:.2e}, which the precision of the sweep limits: use "
            "float64 parameters, more damping, a larger rtol, or method='cg'."
        )
    status = Status(code, message)
    return _Found(_like(u, b), status, extra={"values": values, "gains": gains})


def _riccati(problem: LQRProblem, b: Tensor, options: _Options) -> _Found:
    system = problem.system
    largest = max(
        max(size_of(s.state), size_of(s.next_state), size_of(s.controls)) for s in system.stages
    )
    if largest > DENSE_SIZE:
        raise ValueError(
            f"the dense Riccati recursion would form matrices of size {largest} > {DENSE_SIZE}: "
            "use method='cg' or 'dual'."
        )
    steps = []
    result = None
    A, B, Q, R, S = (
        [operator.to_dense() for operator in operators]
        for operators in (problem.A, problem.B, problem.Q, problem.R, problem.S)
    )
    for column in _rows(b).double():
        q, r, f, x0 = problem.q, problem.r, problem.f, problem.x0
        if options.given_rhs:
            # A right-hand side is a linear cost of the controls, in place of all other such terms.
            q, f = (tuple(torch.zeros_like(part) for part in parts) for parts in (q, f))
            pieces = system.split_control(-column.unsqueeze(0))
            empty = column.new_zeros(0)
            r = tuple(torch.cat([empty, *(pieces[i].reshape(-1) for i in o)]) for o in system.owned)
            x0 = torch.zeros_like(x0)
        result = riccati(A, B, Q, R, S, q, r, f, x0)
        steps.append(_flat(problem, result.controls))
    assert result is not None
    extra = {
        "values": tuple(DenseLinearOperator(P) for P in result.values),
        "gains": tuple(DenseLinearOperator(K) for K in result.gains),
    }
    u = torch.stack(steps).to(problem.dtype)
    return _Found(_like(u, b), result.status, extra=extra)


def _flat(problem: LQRProblem, controls: tuple[Tensor, ...]) -> Tensor:
    """Controls per stage as one flat step in the order of the blocks."""
    system = problem.system
    parts: dict[int, Tensor] = {}
    for owned, u in zip(system.owned, controls, strict=True):
        pieces = u.split([system.sizes[i] for i in owned]) if owned else ()
        parts.update(zip(owned, pieces, strict=True))
    return torch.cat([parts[i] for i in range(len(system.blocks))])
