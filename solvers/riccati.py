"""The dense Riccati recursion in float64: the oracle that every other method is checked against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .status import Code, Status

ROUNDING = 100 * torch.finfo(torch.float64).eps
"""Relative rounding of a sum of products, per row of the matrix."""


@dataclass(frozen=True)
class RiccatiResult:
    """The whole solution of a linear-quadratic problem.

    Args:
        controls: u_t, shape (m_t,).
        states: x_0..x_T.
        values: P_0..P_T; half their quadratic form plus p_t' x is the least cost-to-go.
        value_slopes: p_0..p_T.
        gains: K_t in u_t = K_t x_t + k_t, shape (m_t, n_t).
        offsets: k_t.
        status: CONVERGED, or INDEFINITE with the first stage (from the end) where
            R_t + B_t' P_{t+1} B_t is not positive definite. The controls are then the stationary
            point, which is no minimum.
    """

    controls: tuple[Tensor, ...]
    states: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    value_slopes: tuple[Tensor, ...]
    gains: tuple[Tensor, ...]
    offsets: tuple[Tensor, ...]
    status: Status


def riccati(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    Q: Sequence[Tensor],
    R: Sequence[Tensor],
    S: Sequence[Tensor],
    q: Sequence[Tensor],
    r: Sequence[Tensor],
    f: Sequence[Tensor],
    x0: Tensor,
) -> RiccatiResult:
    """Minimises the LQR cost by the backward recursion; design.md section 2.

    The cost is the sum over t of 1/2 x'Q x + u'S x + 1/2 u'R u + q'x + r'u, and at the end
    1/2 x'Q_T x + q_T'x, with x_{t+1} = A x + B u + f.

    Args:
        A: T matrices (n_{t+1}, n_t).
        B: T matrices (n_{t+1}, m_t).
        Q: T + 1 symmetric matrices (n_t, n_t).
        R: T symmetric matrices (m_t, m_t).
        S: T matrices (m_t, n_t).
        q: T + 1 vectors (n_t,).
        r: T vectors (m_t,).
        f: T vectors (n_{t+1},).
        x0: First state.

    Returns:
        Controls, states, values and gains, all in float64.
    """
    A, B, Q, R, S, q, r, f = ([m.double() for m in part] for part in (A, B, Q, R, S, q, r, f))
    P, p = Q[-1], q[-1]
    values, slopes, gains, offsets = [P], [p], [], []
    bad: tuple[int, float] | None = None
    singular: list[int] = []
    unbounded = False
    # What rounding leaves of P, and of slopes, where the gain takes nearly all of them away.
    noise, largest, steepest = 0.0, float(P.norm()), 0.0
    for t in range(len(A) - 1, -1, -1):
        curvature = _symmetric(R[t] + B[t].mT @ P @ B[t])
        cross = S[t] + B[t].mT @ P @ A[t]
        ahead = p + P @ f[t]
        slope = r[t] + B[t].mT @ ahead
        steepest = max(steepest, float(slope.norm()))
        inverse, least = _inverse(curvature, float(B[t].norm()) ** 2 * noise)
        if least == 0:
            singular.append(t)
            # A slope along a direction without curvature is a way down without end.
            gap = float((slope - curvature @ (inverse @ slope)).norm())
            unbounded = unbounded or gap > 1e-8 * steepest
        if (least < 0 or unbounded) and bad is None:
            bad = (t, least)
        K, k = -inverse @ cross, -inverse @ slope
        whole = float((Q[t] + A[t].mT @ P @ A[t]).norm())
        carried = float(torch.linalg.matrix_norm(A[t], 2)) ** 2 * noise if A[t].numel() else 0.0
        largest = max(largest, whole)
        noise = min(ROUNDING * len(Q[t]) * whole + carried, 1e-8 * largest)
        P, p = (
            _symmetric(Q[t] + A[t].mT @ P @ A[t] + cross.mT @ K),
            q[t] + A[t].mT @ ahead + K.mT @ slope,
        )
        values.append(P)
        slopes.append(p)
        gains.append(K)
        offsets.append(k)
    gains.reverse()
    offsets.reverse()
    states, controls = [x0.double()], []
    for t, (K, k) in enumerate(zip(gains, offsets, strict=True)):
        u = K @ states[-1] + k
        controls.append(u)
        states.append(A[t] @ states[-1] + B[t] @ u + f[t])
    return RiccatiResult(
        controls=tuple(controls),
        states=tuple(states),
        values=tuple(reversed(values)),
        value_slopes=tuple(reversed(slopes)),
        gains=tuple(gains),
        offsets=tuple(offsets),
        status=_status(bad, singular, Q, R, S),
    )


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _inverse(matrix: Tensor, noise: float) -> tuple[Tensor, float]:
    """The (pseudo-)inverse of a symmetric matrix and its least eigenvalue, 0 if it is rounding."""
    if len(matrix) == 0:
        return matrix, float("inf")
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    tolerance = ROUNDING * len(matrix) * eigenvalues.abs().max() + noise
    singular = eigenvalues.abs() <= tolerance
    inverse = torch.where(singular, 0.0, 1 / torch.where(singular, 1.0, eigenvalues))
    least = float(eigenvalues[0])
    if least >= -float(tolerance) and bool(singular.any()):
        least = 0.0
    return (vectors * inverse) @ vectors.mT, least


def _status(
    bad: tuple[int, float] | None,
    singular: list[int],
    Q: Sequence[Tensor],
    R: Sequence[Tensor],
    S: Sequence[Tensor],
) -> Status:
    if bad is not None:
        t, least = bad
        return Status(
            Code.INDEFINITE,
            f"R_t + B_t' P_(t+1) B_t has least eigenvalue {least:.3g} at stage {t}: the objective "
            "has no minimum and the step is only its stationary point. Raise the damping, or use "
            "method='cg' with a trust-region radius.",
        )
    note = ""
    if singular:
        note = (
            f" R_t + B_t' P_(t+1) B_t is singular at stages {singular}: of the many minimisers, "
            "the one with the least control there."
        )
    joint = [t for t in range(len(R)) if _joint_least(Q[t], S[t], R[t]) < 0]
    if joint:
        note += (
            f" The stage cost [[Q, S'], [S, R]] is indefinite at stages {joint}, and the whole "
            "objective is convex all the same."
        )
    return Status(Code.CONVERGED, "Solved by the dense Riccati recursion in float64." + note)


def _joint_least(Q: Tensor, S: Tensor, R: Tensor) -> float:
    joint = torch.cat([torch.cat([Q, S.mT], 1), torch.cat([S, R], 1)])
    if len(joint) == 0 or not bool(joint.any()):
        return 0.0
    eigenvalues = torch.linalg.eigvalsh(joint)
    rounding = eigenvalues.abs().max() * len(joint) * torch.finfo(torch.float64).eps
    least = float(eigenvalues[0])
    return least if least < -float(rounding) else 0.0
