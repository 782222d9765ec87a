"""`fit`: learn a structured preconditioner on the LQR objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import FactorizationError
from ..methods.base import Problem
from ..preconditioners.base import Structure
from ..problem import LQRProblem
from ..streamed import StreamedProblem
from .authors_ekronecker import AuthorsEKronecker
from .cg_fit import Stopping, fit_by_cg
from .found import Found
from .measure import exact_step, mean, measure
from .momentum_fit import Momentum, fit_by_momentum
from .objective import FitFailed, ProbeObjective
from .report import FitReport
from .rows import Probes, probe_rows

Problems: TypeAlias = Problem | Sequence[Problem]
"""One batch's problem, or several at the same weights."""


@torch.no_grad()
def fit(
    M: Structure,
    problems: Problems,
    *,
    method: Literal["cg", "momentum"] = "cg",
    held_out: Problems | None = None,
    probes: Probes = "gradients",
    count: int | None = None,
    isotropic: float = 0.0,
    anchor: float = 0.0,
    sweeps: int | None = None,
    max_iterations: int = 10,
    rtol: float = 1e-4,
    floor: float = 1e-6,
    generator: torch.Generator | None = None,
    exact: bool = True,
    progress: bool = False,
    steps: int = 50,
    learning_rate: float = 1e-3,
    momentum: float = 0.9,
    clip: float = 5.0,
    ema: float = 0.95,
) -> FitReport:
    """Fits M, in place, so that -M v is a good step for the gradients v that a model meets.

    Minimises the mean over problems b and their probes v of 1/2 (M v)'H_b (M v) - v'M v, the LQR
    objective of u = -M v for the gradient v. With C = mean v v', the minimiser is H^{-1} whatever
    C is if M can be anything; a diagonal solves (H o C) d = diag(C). **One probe says next to
    nothing about any other gradient**, and C = I nothing across layers: give several batches.

    The new M is kept only if the objective of the held-out problems falls (without any, that of
    the probes); else, and where anything is not finite, M stays as it was, bit for bit.

    method="cg": M is first multiplied by its best number; then the normal equations of each of its
    charts are solved in turn, by projected and conjugate gradients that keep M positive definite
    (`minimise_projected`). method="momentum" is the recipe of
    the authors (arXiv:2605.04230), a control: steps on all tensors jointly, with the full gradient
    of the first problem as the only probe, and an average with the old M; it takes the last five
    options, and of the others none that chooses probes, anchors or stops. Their diagonal is clipped
    as here; their matrices are unconstrained and may become indefinite, where these are projected.

    Args:
        M: Any structure with charts. For method="momentum" also `AuthorsEKronecker`.
        problems: One problem, or several: different batches at the same weights.
        method: Which fitter.
        held_out: One or more problems that are not fitted. None: the last of several problems, and
            none if there is one. An empty list: none.
        probes: "gradients" of micro-batches; "curvature": J'L z with random signs z, whose
            covariance is J'Q J; or rows (k, P) for every problem; or one such block per fitting
            problem.
        count: Probes per fitting problem. None: 8 in all, at least one each (one each where a
            problem's batch cannot be split).
        isotropic: Share in [0, 1) of the objective that Gaussian probes get: as many as the others,
            and of the same mean square.
        anchor: Adds anchor c/2 ||M - M_0||_F^2, with c = mean(v'v) / P times the Rayleigh quotient
            of H along M_0 v: at 1 a relative change of M costs about what it costs in curvature.
            M_0 is the M given times its best number; with several charts, M as it stands when
            the turn comes to a chart.
        sweeps: Over the charts. None: 1 if there is one, else 3; fewer where the objective has
            stopped falling.
        max_iterations: Most iterations on a chart, of one product with every probe each. Few
            regularise: they leave what few probes say little about where it was. Give more, or an
            anchor, with many probes.
        rtol: Stops a chart's iterations: residual over right side of the normal equations.
        floor: Least entry or eigenvalue of every tensor, relative to its mean.
        generator: Of random probes, on the problems' device. None: a fresh one with seed 0.
        exact: Whether to solve all problems exactly, for the report.
        progress: Whether to show a progress bar of products.
        steps: momentum: how many.
        learning_rate: momentum: of a step.
        momentum: momentum: of the heavy ball.
        clip: momentum: largest norm of one tensor's gradient.
        ema: momentum: the share of the old M in the new.

    Returns:
        What was found, and how it compares with the M given and with the exact steps.

    Raises:
        ValueError: An argument does not fit; nothing has been changed then.
    """
    fitting, held = _split(problems, held_out)
    recipe = Momentum(steps, learning_rate, momentum, clip, ema)
    _check(M, [*fitting, *held], method)
    _check_numbers(count, isotropic, anchor, sweeps, max_iterations, rtol, floor)
    if method == "cg":
        rows = probe_rows(fitting, probes, count=count, isotropic=isotropic, generator=generator)
        options = Stopping(anchor, sweeps, max_iterations, rtol, floor)
        fitter = partial(fit_by_cg, M, options=options)
    else:
        _check_recipe(probes, count, isotropic, anchor, sweeps)
        rows = [fitting[0].gradient.unsqueeze(0)]
        fitter = partial(fit_by_momentum, M, recipe=recipe, floor=floor)
    old = M.clone()
    try:
        with tqdm(desc=f"fit {M.kind}", unit=" products", disable=not progress) as bar:
            found = _run(fitter, fitting[: len(rows)], rows, M, bar)
        report = _report(M, old, method, found, fitting, held, exact)
    except BaseException:
        M.assign_(old)
        raise
    if not report.accepted:
        M.assign_(old)
    return report


def _run(
    fitter: Callable[[ProbeObjective], Found],
    problems: Sequence[Problem],
    rows: Sequence[Tensor],
    M: Structure,
    bar: tqdm,
) -> Found:
    """Runs a fitter, and turns what is not finite into a failure."""
    objective = None
    try:
        objective = ProbeObjective(problems, rows, M, bar)
        found = fitter(objective)
    except (FitFailed, FactorizationError) as error:
        found = Found(math.nan, math.nan, 0, failure=str(error))
    return replace(found, products=0 if objective is None else objective.products)


def _report(
    M: Structure,
    old: Structure,
    method: str,
    found: Found,
    fitting: Sequence[Problem],
    held: Sequence[Problem],
    exact: bool,
) -> FitReport:
    """Measures the new M beside the old, and decides."""
    new = old if found.failure else M
    on_fitting = _Comparison(old, new, fitting, exact)
    on_held = _Comparison(old, new, held, exact)
    if held:
        what, before, after = "the held-out objective", on_held.before, on_held.after
    else:
        what, before, after = "the objective of the probes", found.before, found.after
    verb = "fell" if after < before else "did not fall"
    reason = found.failure or f"{what} {verb} ({before:.6g} to {after:.6g})"
    if not found.failure and not math.isfinite(on_fitting.after):
        reason = "the gradient of a fitting problem, or M times it, holds NaN or infinity"
    finite = math.isfinite(on_fitting.after) and math.isfinite(after)
    accepted = not found.failure and finite and after < before
    return FitReport(
        method=method,
        accepted=accepted,
        reason=f"{reason}; {found.remark}" if found.remark else reason,
        objective=on_fitting.after,
        objective_before=on_fitting.before,
        optimum=on_fitting.optimum,
        fraction=on_fitting.fraction,
        cosine=on_fitting.cosine,
        held_out=on_held.after if held else None,
        held_out_before=on_held.before if held else None,
        held_out_optimum=on_held.optimum,
        held_out_fraction=on_held.fraction,
        held_out_cosine=on_held.cosine,
        fit_objective=found.after,
        fit_objective_before=found.before,
        iterations=found.iterations,
        products=found.products,
        measuring_products=on_fitting.products + on_held.products,
        preconditioner=M,
    )


class _Comparison:
    """The old and the new M on some problems, beside the exact steps if these are asked for."""

    def __init__(
        self, old: Structure, new: Structure, problems: Sequence[Problem], exact: bool
    ) -> None:
        steps = [exact_step(problem) if exact else None for problem in problems]
        known = [step for step in steps if step is not None]
        before, after = measure([_apply(old), _apply(new)], problems, steps)
        self.before, self.after = before.objective, after.objective
        self.optimum = _number(mean([step.optimum for step in known]))
        self.cosine = _number(after.cosine)
        self.fraction = _number(self.after / self.optimum) if self.optimum else None
        self.products = 2 * len(problems) + sum(step.products for step in known)


def _apply(M: Structure) -> Callable[[Tensor], Tensor]:
    return lambda rows: M.times_rows(rows.to(M.dtype))


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None


# ---- arguments


def _split(problems: Problems, held_out: Problems | None) -> tuple[list[Problem], list[Problem]]:
    """The problems to fit and those to hold out."""
    fitting = _listed(problems)
    if not fitting:
        raise ValueError("`problems` is empty: give at least one problem.")
    if held_out is not None:
        return fitting, _listed(held_out)
    return (fitting[:-1], fitting[-1:]) if len(fitting) > 1 else (fitting, [])


def _listed(problems: Problems) -> list[Problem]:
    listed = [problems] if isinstance(problems, LQRProblem | StreamedProblem) else list(problems)
    for problem in listed:
        if not isinstance(problem, LQRProblem | StreamedProblem):
            raise TypeError(
                f"a {type(problem).__name__} was given as a problem: make an LQRProblem or a "
                "StreamedProblem."
            )
        if isinstance(problem, LQRProblem):
            problem.system.check(look="all")  # as `solve`
    return listed


def _check(M: Structure, problems: Sequence[Problem], method: str) -> None:
    if method not in ("cg", "momentum"):
        raise ValueError(f"method='{method}' is unknown: choose 'cg' or 'momentum'.")
    name = type(M).__name__
    if isinstance(M, AuthorsEKronecker) and method != "momentum":
        raise ValueError(f"{name} is fitted by method='momentum' only: its tensors are all free.")
    if not M.charts() and not isinstance(M, AuthorsEKronecker):
        raise ValueError(
            f"{name} has nothing to fit (no charts): use Scalar, Diagonal, Kronecker, EKronecker "
            "or another structure that has."
        )
    for problem in problems:
        if problem.layout != M.layout:
            raise ValueError(
                f"the parameters of M and of a problem differ: M has {M.layout.names[:4]}..., the "
                f"problem {problem.layout.names[:4]}...; make M for that problem or model."
            )
        if problem.device != M.device or problem.dtype != problems[0].dtype:
            raise ValueError(
                f"M is on {M.device}, and a problem is {problem.dtype} on {problem.device}: all "
                "problems need one dtype, and the device of M."
            )


def _check_numbers(
    count: int | None,
    isotropic: float,
    anchor: float,
    sweeps: int | None,
    max_iterations: int,
    rtol: float,
    floor: float,
) -> None:
    for name, whole in (("count", count), ("sweeps", sweeps), ("max_iterations", max_iterations)):
        if whole is not None and whole < 1:
            raise ValueError(f"{name} is {whole}: give at least 1.")
    if not 0 <= isotropic < 1:
        raise ValueError(f"isotropic is {isotropic}: it is a share, from 0 to less than 1.")
    if not (anchor >= 0 and rtol >= 0):
        raise ValueError(f"anchor={anchor} and rtol={rtol} cannot be negative.")
    if not 0 < floor < 1:
        raise ValueError(f"floor is {floor}: give a small positive number, such as 1e-6.")


def _check_recipe(
    probes: Probes, count: int | None, isotropic: float, anchor: float, sweeps: int | None
) -> None:
    asked = {
        "probes": not (isinstance(probes, str) and probes == "gradients"),
        "count": count is not None,
        "isotropic": isotropic != 0,
        "anchor": anchor != 0,
        "sweeps": sweeps is not None,
    }
    for name, given in asked.items():
        if given:
            raise ValueError(
                f"`{name}` does not go with method='momentum', whose only probe is the gradient of "
                "the first problem: use method='cg'."
            )
