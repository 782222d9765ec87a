"""What the step that knows nothing across layers reaches, from the layers' Gram matrices alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..output_sweep import factor_columns, required_factor
from ..problem import LQRProblem

SEEN = 1e-5
"""Relative part of the loss's slope that may lie outside of the factor's range, as rounding."""


def shares_by_grams(
    problem: LQRProblem, grams: Sequence[Tensor], damping: float
) -> tuple[float, float] | None:
    """J(u) / J(u*) for u = -blockdiag(H_tt + damping I)^{-1} g, and that of its best multiple.

    With Q_T = L L' and the loss's slope q = L c, everything is in the coordinates of L: the layers
    answer with y_t = L'J_t u_t = -(damping I + G_t)^{-1} G_t c, and

        J(u) = c'y + 1/2 |y|^2 + damping / 2 |u|^2,   y the sum of all y_t,

    with damping |u_t|^2 = w'G_t w / damping for w = (I + G_t / damping)^{-1} c. One Cholesky factor
    for each layer; the weights are not seen.

    Args:
        problem: A network's, with a factored terminal cost alone.
        grams: G_t = L'J_t J_t'L of all layers, (r N, r N).
        damping: R = damping I.

    Returns:
        The two shares, or None if q has a part outside of the range of L.
    """
    c = _coordinates(problem)
    if c is None or not damping > 0:
        return None
    y, square = torch.zeros_like(c), c.new_zeros(())
    for gram in grams:
        w, answer = _answer(gram, c, damping)
        y -= answer
        square += w @ answer
    whole = torch.zeros_like(grams[0], dtype=torch.float64)
    for gram in grams:
        whole += gram
    optimum = -(c @ _answer(whole, c, damping)[1]) / 2
    slope, curvature = c @ y, y @ y + square
    objective, best = slope + curvature / 2, -(slope**2) / (2 * curvature)
    return float(objective / optimum), float(best / optimum)


def _answer(gram: Tensor, c: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(I + G / damping)^{-1} c = w and (damping I + G)^{-1} G c = G w / damping, float64."""
    scaled = gram.double() / damping
    shifted = scaled.clone()
    shifted.diagonal().add_(1)
    lower = torch.linalg.cholesky(shifted)
    w = torch.cholesky_solve(c.unsqueeze(1), lower).squeeze(1)
    return w, scaled @ w


def _coordinates(problem: LQRProblem) -> Tensor | None:
    """The shortest c with L c = q, float64, (r N,) in the order j N + n; None if there is none."""
    factor = required_factor(problem, "shares by Gram matrices")
    columns = torch.cat(list(factor_columns(factor))).double().permute(1, 2, 0)
    q = problem.output_gradient.double().reshape(*columns.shape[:2], 1)
    c = torch.linalg.pinv(columns) @ q
    if float((columns @ c - q).norm()) > SEEN * float(q.norm()):
        return None
    return c.squeeze(-1).mT.reshape(-1)
