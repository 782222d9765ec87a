"""A system from operators or tensors that the user gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from linear_operator import LinearOperator
from torch import Tensor

from .operators import ControlCost, OperatorStage, StateCost, System
from .operators.apply import as_operator
from .operators.tangent import Tangent

Given = LinearOperator | Tensor


def system_from_operators(
    A: Sequence[Given],
    B: Sequence[Given],
    Q: Sequence[Given | None] | None,
    R: Sequence[Given | float] | None,
    S: Sequence[Given | None] | None,
    q: Sequence[Tensor | None] | None,
    r: Sequence[Tensor | None] | None,
    x0: Tensor | None,
    f: Sequence[Tensor | None] | None,
) -> tuple[System, list[Tangent], Tensor, Tangent | None]:
    """The system, its linear terms on states and controls, and the first state.

    Raises:
        ValueError: A length, shape, dtype or device does not fit.
    """
    T = len(A)
    if T == 0:
        raise ValueError("A is empty: give at least one stage.")
    B, R_, S_, r_, f_ = (
        _listed(part, T, name)
        for part, name in ((B, "B"), (R, "R"), (S, "S"), (r, "r"), (f, "f"))
    )
    Q_, q_ = _listed(Q, T + 1, "Q"), _listed(q, T + 1, "q")
    ops_A, ops_B = [as_operator(a) for a in A], [as_operator(b) for b in B]
    proto = torch.empty(0, dtype=ops_A[0].dtype, device=ops_A[0].device)
    n = [a.shape[1] for a in ops_A] + [ops_A[-1].shape[0]]
    m = [b.shape[1] for b in ops_B]
    for t in range(T):
        _fits(ops_A[t], (n[t + 1], n[t]), f"A[{t}]", proto)
        _fits(ops_B[t], (n[t + 1], m[t]), f"B[{t}]", proto)
        _fits(S_[t], (m[t], n[t]), f"S[{t}]", proto)
        _fits(r_[t], (m[t],), f"r[{t}]", proto)
        _fits(f_[t], (n[t + 1],), f"f[{t}]", proto)
        if not isinstance(R_[t], int | float):
            _fits(R_[t], (m[t], m[t]), f"R[{t}]", proto)
    for t in range(T + 1):
        _fits(Q_[t], (n[t], n[t]), f"Q[{t}]", proto)
        _fits(q_[t], (n[t],), f"q[{t}]", proto)
    _fits(x0, (n[0],), "x0", proto)
    groups = tuple(
        ((t,), float(R or 0.0) if isinstance(R, int | float | None) else as_operator(R))
        for t, R in enumerate(R_)
    )
    system = System(
        stages=tuple(
            OperatorStage(a, b, None, None if s is None else as_operator(s), None, proto)
            for a, b, s in zip(ops_A, ops_B, S_, strict=True)
        ),
        state_costs=tuple(() if c is None else (StateCost(as_operator(c)),) for c in Q_),
        control_cost=ControlCost(groups, tuple(m)),
        blocks=tuple((size,) for size in m),
        owned=tuple((t,) for t in range(T)),
        proto=proto,
        affine=() if all(part is None for part in f_) else tuple(f_),
    )
    controls = torch.cat(
        [proto.new_zeros(m[t]) if r_[t] is None else r_[t] for t in range(T)]
    )
    first: Tangent | None = None if x0 is None else (x0.unsqueeze(0),)
    return system, [(part,) for part in q_], controls, first


def _listed(part: Sequence[Any] | None, length: int, name: str) -> list[Any]:
    if part is None:
        return [None] * length
    if len(part) != length:
        raise ValueError(f"{name} has {len(part)} entries, not {length} (None stands for zero).")
    return list(part)


def _fits(part: Any, shape: tuple[int, ...], name: str, proto: Tensor) -> None:
    if part is None:
        return
    if tuple(part.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(part.shape)}, not {shape}.")
    if part.dtype != proto.dtype or part.device != proto.device:
        raise ValueError(
            f"{name} is {part.dtype} on {part.device} and A[0] is {proto.dtype} on "
            f"{proto.device}: convert them to one dtype and device."
        )
    if isinstance(part, Tensor) and not bool(torch.isfinite(part).all()):
        raise ValueError(f"{name} has entries that are NaN or infinite.")
