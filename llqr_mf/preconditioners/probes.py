"""Vectors on which a preconditioner is fitted, as rows (k, P)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..output_sweep import required_factor, signed_columns
from ..problem import LQRProblem


def gradient_probes(problem: LQRProblem, count: int = 1) -> Tensor:
    """Gradients of `count` micro-batches of a problem's batch; their mean is its gradient.

    One adjoint sweep of `count` rows. Where samples interact (train-mode BatchNorm), a row is the
    derivative of that micro-batch's share of the loss, in the statistics of the whole batch.

    Args:
        problem: From a network.
        count: k, at most the number of samples.

    Raises:
        ValueError: The problem is of given matrices and `count` is more than 1, or there are
            fewer samples than that.
    """
    if count == 1:
        return problem.gradient.unsqueeze(0)
    origin = problem.origin
    if origin is None:
        raise ValueError("a problem of given matrices has no samples to split: use count=1.")
    (slope,) = problem._linear[-1]
    assert slope is not None
    samples = len(slope)
    if not 1 <= count <= samples:
        raise ValueError(f"{count} micro-batches of {samples} samples: give 1 to {samples}.")
    rows = slope.new_zeros(count, *slope.shape)
    owner = torch.arange(samples, device=slope.device) * count // samples
    rows[owner, torch.arange(samples, device=slope.device)] = slope * count
    return _pull(problem, rows)


def curvature_probes(problem: LQRProblem, count: int, generator: torch.Generator) -> Tensor:
    """J'L z with random signs z: their covariance is J'Q_T J, the curvature without damping.

    For the Fisher metric, gradients at targets that the model itself might draw. One adjoint
    sweep of `count` rows.

    Args:
        problem: Whose terminal cost has a factor Q_T = L L', and no other cost but R.
        count: k.
        generator: Of the signs, on the problem's device.

    Raises:
        ValueError: The terminal cost has no factor, or is not the only one.
    """
    factor = required_factor(problem, "curvature probes")
    assert problem.origin is not None
    rows = torch.cat(list(signed_columns(factor, count, generator)))
    return _pull(problem, rows)


def _pull(problem: LQRProblem, rows: Tensor) -> Tensor:
    """J' times cotangents of the output, (k, *outputs) to (k, P)."""
    with torch.no_grad():
        return problem.output_jacobian.times_rows(rows.flatten(1), transposed=True)
