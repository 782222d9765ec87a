"""Which probes a fit uses, and with what weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..methods.base import Problem
from ..preconditioners.probes import curvature_probes, gradient_probes
from ..problem import LQRProblem
from ..solvers.dots import row_dots

Probes: TypeAlias = Literal["gradients", "curvature"] | Tensor | Sequence[Tensor]

ROWS = 8
"""Probes of all problems together, where `count` does not say how many."""


def probe_rows(
    problems: Sequence[Problem],
    probes: Probes,
    *,
    count: int | None,
    isotropic: float,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """Probe rows (k_b, P) of every problem, scaled by the square roots of their weights.

    Problems weigh the same, and so do the probes of a problem but for the isotropic ones, which
    together weigh `isotropic`; see `fit`.

    Raises:
        ValueError: The probes asked for do not exist or do not fit.
    """
    if generator is None:
        generator = torch.Generator(problems[0].device).manual_seed(0)
    blocks = given_rows(problems, probes)
    made = []
    for b, problem in enumerate(problems):
        if blocks is not None:
            rows = blocks[b]
        elif probes == "gradients":
            rows = gradient_probes(*_splittable(problem, count or _default(problem, len(problems))))
        else:
            if not isinstance(problem, LQRProblem):
                raise ValueError(
                    "curvature probes need one batch's layers, and a StreamedProblem has many: "
                    "use probes='gradients' or rows of your own."
                )
            rows = curvature_probes(problem, count or -(-ROWS // len(problems)), generator)
        made.append(_weighted(rows, isotropic, generator) / len(problems) ** 0.5)
    return made


def given_rows(problems: Sequence[Problem], probes: Probes) -> list[Tensor] | None:
    """The user's own rows, one block per problem; None where `probes` is a name."""
    if isinstance(probes, str):
        if probes not in ("gradients", "curvature"):
            raise ValueError(
                f"probes='{probes}' is unknown: choose 'gradients', 'curvature' or rows (k, P)."
            )
        return None
    blocks = [probes] * len(problems) if isinstance(probes, Tensor) else list(probes)
    if len(blocks) != len(problems):
        raise ValueError(
            f"`probes` has {len(blocks)} blocks and {len(problems)} problems are fitted (the last "
            "of several is held out by default): give one block of rows for each."
        )
    for rows in blocks:
        if rows.ndim != 2 or rows.shape[1] != problems[0].size or len(rows) == 0:
            raise ValueError(
                f"a block of probes has shape {tuple(rows.shape)}: give rows of shape "
                f"(k, {problems[0].size})."
            )
    return blocks


def _default(problem: Problem, problems: int) -> int:
    """How many gradients: `ROWS` in all, as far as the samples go."""
    if not isinstance(problem, LQRProblem) or problem.origin is None:
        return 1
    return min(-(-ROWS // problems), len(problem.origin.outputs))


def _splittable(problem: Problem, count: int) -> tuple[LQRProblem, int]:
    if count > 1 and not isinstance(problem, LQRProblem):
        raise ValueError("a StreamedProblem has one gradient: use count=1, or several problems.")
    return problem, count  # type: ignore[return-value]


def _weighted(rows: Tensor, isotropic: float, generator: torch.Generator) -> Tensor:
    k, size = rows.shape
    if isotropic == 0:
        return rows / k**0.5
    noise = torch.randn(k, size, generator=generator, device=rows.device, dtype=rows.dtype)
    noise *= (row_dots(rows, rows).mean() / size).sqrt().to(rows.dtype)
    return torch.cat([rows * ((1 - isotropic) / k) ** 0.5, noise * (isotropic / k) ** 0.5])
