"""CG and MINRES on the condensed Hessian."""

from __future__ import annotations

from typing import Any, cast

from ..low_precision import Narrow, wide_and_narrow
from ..operators.base import MatrixFreeOperator
from ..operators.compiled import compiled
from ..operators.condensed_hessian import CondensedHessianOperator
from ..operators.graphed import graphed
from ..problem import LQRProblem
from ..solvers.cg import cg
from ..solvers.inexact import refined_cg
from ..solvers.minres import minres
from ..solvers.status import Status
from .base import Found, Options

MARGIN = 0.95
"""Share of the tolerance that is aimed at: `solve` measures the residual in another order."""


def by_cg(options: Options) -> Found:
    """H u = b by (preconditioned, flexible, truncated) conjugate gradients."""
    if options.previous is not None and options.radius is not None:
        raise ValueError("`radius` bounds the whole step: it does not go with `previous`.")
    if options.products != "plain":
        _check_products(options)
    if options.products in ("bf16", "tf32"):
        return _by_refined_cg(options)
    result = cg(
        _hessian(options),
        options.b,
        **_common(options),
        initial=options.initial_correction,
        radius=options.radius,
        on_negative_curvature=options.on_negative_curvature,
        flexible=options.flexible,
        vector_device=options.vector_device,
        give_up=options.give_up,
    )
    step, extra = options.complete(result.x), {"direction": result.direction}
    return Found(step, result.status, result.iterations, result.products, extra=extra)


def _common(options: Options) -> dict[str, Any]:
    """What every Krylov method takes."""
    return {
        "preconditioner": options.preconditioner,
        "rtol": MARGIN * options.rtol,
        "max_iterations": options.max_iterations,
        "recurrence_dtype": options.recurrence_dtype,
        "progress": options.progress,
    }


def _check_products(options: Options) -> None:
    problem, name = options.problem, options.products
    if not isinstance(problem, LQRProblem):
        raise ValueError(
            f"products='{name}' needs one batch's layers, and a StreamedProblem has many: leave it "
            "out."
        )
    if problem.origin is not None and problem.origin.linearization.remakes:
        raise ValueError(
            f"products='{name}' needs the layers' linearisation, which checkpoint=True lets go: "
            "make the problem without it, or leave `products` out."
        )


def _hessian(options: Options) -> MatrixFreeOperator:
    """H, its products run as asked."""
    hessian = options.problem.hessian
    if options.products == "plain":
        return hessian
    assert isinstance(hessian, CondensedHessianOperator)
    if options.products == "compiled":
        return compiled(hessian)
    return graphed(hessian, 1 if options.b.ndim == 1 else options.b.shape[1])


def _by_refined_cg(options: Options) -> Found:
    for name in ("radius", "flexible", "vector_device"):
        if getattr(options, name):
            raise ValueError(f"`{name}` does not go with products='{options.products}': drop one.")
    if options.on_negative_curvature != "truncate":
        raise ValueError(
            f"`on_negative_curvature` does not go with products='{options.products}': drop one."
        )
    assert isinstance(options.problem, LQRProblem)
    wide, narrow = wide_and_narrow(options.problem, cast(Narrow, options.products))
    result = refined_cg(
        wide,
        narrow,
        options.b,
        **_common(options),
        initial=options.initial_correction,
    )
    spent = f"{result.coarse_products} products in {options.products}, {result.products} exact."
    status = Status(result.status.code, f"{result.status.message} {spent}")
    return Found(options.complete(result.x), status, result.iterations, result.products)


def by_minres(options: Options) -> Found:
    """H u = b by MINRES, for an indefinite H too."""
    result = minres(
        options.problem.hessian,
        options.b,
        **_common(options),
    )
    return Found(options.complete(result.x), result.status, result.iterations, result.products)
