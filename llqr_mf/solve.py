"""`solve`: one problem, several exact methods, one answer."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .choose import Choice, Method, choose, gives_up, only_some
from .judge import check_numbers, default_rtol, judged
from .low_precision import tensor_float32
from .methods import METHODS, Found, Options
from .methods.base import Problem, Products, rows_of, worst
from .operators.apply import apply_rows, as_operator
from .problem import LQRProblem
from .solution import Solution
from .solvers.dots import row_dots, row_norms
from .solvers.dual import FactorizationError
from .solvers.status import Code, Status
from .streamed import StreamedProblem


def solve(
    problem: Problem,
    method: Method = "auto",
    *,
    rtol: float | None = None,
    max_iterations: int | None = None,
    preconditioner: Any = None,
    initial: Tensor | None = None,
    rhs: Tensor | None = None,
    previous: Tensor | None = None,
    momentum: float = 0.9,
    radius: float | None = None,
    on_negative_curvature: Literal["truncate", "direction", "raise"] = "truncate",
    recurrence_dtype: torch.dtype | None = None,
    flexible: bool = False,
    products: Products = "plain",
    vector_device: torch.device | str | None = None,
    form_step: bool = True,
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

    `auto` takes riccati for small given matrices, and else cg or dual. Where the dual's Gram matrix
    has a closed form, its time is reckoned in iterations of cg; it is taken at once where that is
    few, and else once cg seems to take longer. Either steps in where the other fails. The status
    says which it was and why.

    Args:
        problem: From a network, from matrices, or a `StreamedProblem` (cg and minres only).
        method: Which.
        rtol: Wanted true relative residual |H u + g| / |g|, per column; the status says whether it
            was reached. Default: 1e-6 in float64, 1e-5 in float32 and 1e-2 in half precisions, or,
            where that is more, what the rounding of the products leaves, up to 3e-4 in float32 and
            2e-2 in half precisions.
        max_iterations: Limit of the iterative methods.
        preconditioner: For cg and minres: an operator (P, P), or a function of rows (k, P), that
            approximates H^{-1} and is positive definite.
        initial: For cg: where to start, of the step's shape (the last step, scaled, is a good
            warm start).
        rhs: Right-hand sides (P,) or (P, k) in place of -g.
        previous: The last step u_old (P,), for momentum: R pulls to momentum * u_old in place of
            zero, so that H u = -g + momentum R u_old. What this batch says nothing about carries on
            from batch to batch (SPRING, Goldshlager et al. 2024, with R in place of its lambda).
        momentum: See `previous`; at least 0 and less than 1.
        radius: For cg: trust region |u| <= radius (Steihaug).
        on_negative_curvature: For cg: stop there ("truncate"), also return the direction, or
            raise.
        recurrence_dtype: For cg and minres: dtype of the vectors; None takes float64 while the
            block is small.
        flexible: For cg: for a preconditioner that changes between calls.
        products: For cg, how H is multiplied: "plain"; "compiled" by torch.compile; "graphed", as
            one CUDA graph; "bf16" or "tf32", most products in that precision and the true residual
            from exact ones (`solvers.refined_cg`; docs/numerical-stability.md says when it pays).
        vector_device: For cg: where its vectors live, say "cpu" where a GPU has room for two only.
        form_step: For dual: False leaves the step unformed, for weights so many that a second
            vector of their size does not fit; `apply_step_` then adds it in place.
        progress: Whether to show a progress bar.

    Returns:
        The step with its true residual and status.

    Raises:
        ValueError: The method does not apply, and the message says which does.
        RuntimeError: The weights or the batch were written to after the problem was made.
    """
    if not isinstance(problem, LQRProblem | StreamedProblem):
        raise ValueError(f"problem is a {type(problem).__name__}: give an lq.LQRProblem.")
    check_numbers(rtol, max_iterations, momentum, radius, recurrence_dtype)
    _check_right_hand_side(problem, rhs)
    if isinstance(preconditioner, Tensor):
        preconditioner = as_operator(preconditioner)
    options = Options(
        problem=problem,
        rhs=rhs,
        previous=_carried(problem, previous, momentum, rhs, form_step),
        rtol=default_rtol(problem.dtype) if rtol is None else float(rtol),
        max_iterations=max_iterations,
        preconditioner=preconditioner,
        initial=initial,
        radius=radius,
        on_negative_curvature=on_negative_curvature,
        recurrence_dtype=recurrence_dtype,
        flexible=flexible,
        products=products,
        vector_device=vector_device,
        progress=progress,
        form_step=form_step,
    )
    if products not in get_args(Products):
        raise ValueError(f"products='{products}' is unknown: choose one of {get_args(Products)}.")
    if isinstance(problem, LQRProblem):
        # Writes through `.data` too, once: a product sees those only that torch counts.
        problem.system.check(look="all")
    with torch.no_grad():
        choice = choose(options) if method == "auto" else Choice(str(method), "")
    name = choice.name
    if name not in METHODS:
        raise ValueError(f"method '{name}' is unknown: choose one of {['auto', *METHODS]}.")
    if isinstance(problem, StreamedProblem) and name not in ("cg", "minres"):
        raise ValueError(
            f"method='{name}' needs one batch's layers, and a StreamedProblem has many: use "
            "method='cg'."
        )
    for option, only in only_some(options).items():
        if name not in only:
            raise ValueError(
                f"`{option}` does not go with method='{name}': use method='{only[0]}'."
            )
    if not form_step and not options.in_output_space:
        raise ValueError("form_step=False is for a network's own gradient: leave `rhs` out.")
    with torch.no_grad():
        _check_finite(options, name)
        return _run(options, choice, literal=rtol is not None)


def _run(options: Options, choice: Choice, *, literal: bool) -> Solution:
    """By the method chosen, and by what is instead where that would cost less or is needed."""
    name, other = choice.name, choice.instead
    gave_up: list[str] = []
    if other is not None and name == "cg":
        sooner = gives_up(choice.patience, options.rtol)

        def give_up(iterations: int, residual: float) -> bool:
            if not sooner(iterations, residual):
                return False
            gave_up.append(f"its residual was {residual:.1e} after {iterations} iterations")
            return True

        options = replace(options, give_up=give_up)
    try:
        found = METHODS[name](options)
    except FactorizationError as error:
        if other is None:
            raise
        found = METHODS[other](options)
        return _solution(options, other, f"{choice.reason}, but {error}", found, literal=literal)
    if gave_up:
        assert other is not None
        further = _after(found, METHODS[other](replace(options, give_up=None)))
        return _solution(options, other, f"{choice.reason}; {gave_up[0]}", further, literal=literal)
    first = _solution(options, name, choice.reason, found, literal=literal)
    if (
        other is None
        or first.status.ok
        or first.status.code not in (Code.STAGNATED, Code.NOT_FINITE)
    ):
        return first
    if name == "cg" and first.iterations < choice.patience / 2:
        return first
    warm = first.formed if other == "cg" and first.residual_norm < 1 else None
    why = f"{choice.reason}; {name} left a residual of {first.residual_norm:.1e}"
    try:
        further = _after(found, METHODS[other](replace(options, initial=warm, give_up=None)))
    except FactorizationError:
        return first
    second = _solution(options, other, why, further, literal=literal)
    kept = first.residual_norm <= second.residual_norm or math.isnan(second.residual_norm)
    return first if kept else second


def _after(first: Found, found: Found) -> Found:
    """What was found, with what was spent before it."""
    return replace(
        found,
        iterations=found.iterations + first.iterations,
        products=found.products + first.products,
    )


def _solution(
    options: Options, method: str, reason: str, found: Found, *, literal: bool
) -> Solution:
    """What was found, with its true residual, what that says of it, and the model's decrease."""
    relative, decrease, products = _measured(options, found)
    status = judged(options, found, relative, literal=literal)
    if reason:
        status = Status(status.code, f"auto chose {method}: {reason}. {status.message}")
    return Solution(
        formed=found.step,
        iterations=found.iterations,
        residual_norm=relative,
        status=status,
        model_decrease=decrease,
        method=method,
        products=products,
        **(found.extra or {}),
    )


def _measured(options: Options, found: Found) -> tuple[float, Tensor, int]:
    """Relative residual, model decrease, and the products that this took with all before."""
    if found.relative is not None and found.decrease is not None:
        proto = options.problem.output_gradient  # type: ignore[union-attr]
        return found.relative, proto.new_tensor(found.decrease), found.products
    u = found.step
    assert u is not None
    b, extra = options.b, 1
    with tensor_float32(False) if options.products in ("bf16", "tf32") else nullcontext():
        # An ambient TF32 would make another operator of H than the one that was solved.
        measured = options.measure(u)
    if measured is not None:
        norm = float(row_norms(rows_of(b))) or 1.0
        return measured.residual / norm, u.new_tensor(measured.decrease), found.products + 1
    correction = u if options.previous is None else u - options.previous
    rows, sides = rows_of(correction), rows_of(b)
    left = apply_rows(options.problem.hessian, rows).neg_().add_(sides)
    relative = worst(row_norms(left), row_norms(sides))
    if options.previous is not None:
        # The decrease is that of the whole step, in the model without momentum.
        b = -options.problem.gradient
        rows, sides = rows_of(u), rows_of(b)
        left = apply_rows(options.problem.hessian, rows).neg_().add_(sides)
        extra = 2
    # u'b - 1/2 u'H u with H u = b - (the residual left).
    decrease = ((row_dots(rows, sides) + row_dots(rows, left)) / 2).to(b.dtype)
    return relative, decrease[0] if b.ndim == 1 else decrease, found.products + extra


def _check_right_hand_side(problem: Problem, rhs: Tensor | None) -> None:
    if rhs is None:
        return
    if rhs.ndim not in (1, 2) or rhs.shape[0] != problem.size or rhs.shape[1:] == (0,):
        raise ValueError(
            f"rhs has shape {tuple(rhs.shape)}: give ({problem.size},) or ({problem.size}, k)."
        )
    if rhs.dtype != problem.dtype or rhs.device != problem.device:
        raise ValueError(
            f"rhs is {rhs.dtype} on {rhs.device} and the problem is {problem.dtype} on "
            f"{problem.device}: convert rhs with .to()."
        )


def _check_finite(options: Options, method: str) -> None:
    what = "the gradient"
    if options.rhs is not None:
        what, tensor = "rhs", options.rhs
    elif options.in_output_space and method == "dual":
        # The gradient of the weights is not formed for this; its norm is looked at later.
        tensor = options.problem.output_gradient  # type: ignore[union-attr]
    else:
        tensor = options.problem.gradient
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} has entries that are NaN or infinite: there is no step.")


def _carried(
    problem: Problem, previous: Tensor | None, momentum: float, rhs: Tensor | None, form_step: bool
) -> Tensor | None:
    """Momentum * the last step, once it is known to fit."""
    if previous is None:
        return None
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}: give a number in [0, 1).")
    if rhs is not None or not form_step:
        raise ValueError("`previous` goes with the gradient and a formed step: leave `rhs` out.")
    fits = previous.dtype == problem.dtype and previous.device == problem.device
    if previous.shape != (problem.size,) or not fits:
        raise ValueError(
            f"previous has shape {tuple(previous.shape)} and is {previous.dtype} on "
            f"{previous.device}: give the last step, ({problem.size},) of {problem.dtype} on "
            f"{problem.device}."
        )
    if not bool(torch.isfinite(previous).all()):
        raise ValueError("previous has entries that are NaN or infinite: leave it out.")
    return momentum * previous
