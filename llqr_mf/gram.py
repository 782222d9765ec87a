"""The dual's Gram matrix in closed form: one backward pass per output, and products of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from .network.linearize import BoundNode
from .output_sweep import factor_columns, pull_back, samples_are_apart, terminal_factor
from .problem import LQRProblem


def closed_form_gram(problem: LQRProblem) -> Tensor | None:
    """G = L'J R^{-1} J'L of a network, or None where it has no closed form.

    Column j of every sample's factor is pulled back for all samples at once, which is right when
    samples do not interact. Each parametrised call then gives the Gram matrix of its per-sample
    gradients; a Linear layer's costs N r (N r + width) and never sees its weight.

    Args:
        problem: From a network, with a terminal cost that has a factor, and numbers as damping.

    Returns:
        Tensor (r N, r N), index j N + n; None if samples interact (train-mode BatchNorm), a
        parameter is read twice, damping is an operator, or a call's gradients are too large.
    """
    origin, damping = problem.origin, problem.system.control_cost.block_values
    curvature = terminal_factor(problem)
    if origin is None or damping is None or curvature is None:
        return None
    if min(damping) <= 0 or not samples_are_apart(problem):
        return None
    rank, samples = curvature.rank, curvature.samples
    assert rank is not None
    with torch.no_grad():
        deltas = torch.cat(list(factor_columns(curvature))).reshape(rank, *origin.outputs.shape)
        gram = deltas.new_zeros(rank * samples, rank * samples)
        for bound, cotangents in pull_back(problem, deltas):
            for index, i in enumerate(bound.inputs):
                if i >= len(damping):
                    continue
                part = _parameter_gram(bound, cotangents, index)
                if part is None:
                    return None
                gram.add_(part, alpha=1 / damping[i])
    return gram


def _parameter_gram(bound: BoundNode, cotangents: list[Tensor | None], index: int) -> Tensor | None:
    """The share of one input that is a parameter, without its damping."""
    if len(cotangents) != 1 or cotangents[0] is None:
        return None
    return bound.node.gram(cotangents[0], index)
