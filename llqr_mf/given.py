"""A system from operators or tensors that the user gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from linear_operator import LinearOperator
from torch import Tensor

from .operators import ControlCost, OperatorStage, StateCost, System
from .operators.apply import checked_operator
from .operators.tangent import Tangent

Given: TypeAlias = LinearOperator | Tensor


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
    B_, R_, S_, r_, f_ = (
        _listed(part, T, name) for part, name in ((B, "B"), (R, "R"), (S, "S"), (r, "r"), (f, "f"))
    )
    Q_, q_ = _listed(Q, T + 1, "Q"), _listed(q, T + 1, "q")
    for name, part in (("A", A), ("B", B_)):
        for t, matrix in enumerate(part):
            if not isinstance(matrix, LinearOperator | Tensor) or len(matrix.shape) != 2:
                raise ValueError(f"{name}[{t}] must be a matrix: a 2-D tensor or a LinearOperator.")
    proto = torch.empty(0, dtype=A[0].dtype, device=A[0].device)
    n = [a.shape[1] for a in A] + [A[-1].shape[0]]
    m = [b.shape[1] for b in B_]

    def operators(part: Sequence[Any], name: str, rows: list[int], columns: list[int]) -> list[Any]:
        return [
            None
            if matrix is None
            else checked_operator(
                *(matrix, (rows[t], columns[t]), f"{name}[{t}]", proto), symmetric=name in "QR"
            )
            for t, matrix in enumerate(part)
        ]

    ops_A, ops_B = operators(A, "A", n[1:], n), operators(B_, "B", n[1:], m)
    ops_Q, ops_S = operators(Q_, "Q", n, n), operators(S_, "S", m, n)
    numbers = [0.0 if R is None else R for R in R_]
    ops_R = operators([None if _is_number(R) else R for R in numbers], "R", m, m)
    for t, number in enumerate(numbers):
        if _is_number(number) and not math.isfinite(number):
            raise ValueError(f"R[{t}] is {number}: give a finite number.")
    for name, vectors, sizes in (("q", q_, n), ("r", r_, m), ("f", f_, n[1:]), ("x0", [x0], n)):
        for t, vector in enumerate(vectors):
            _check_vector(vector, sizes[t], name if name == "x0" else f"{name}[{t}]", proto)
    groups = tuple(
        ((t,), float(number) if operator is None else operator)
        for t, (number, operator) in enumerate(zip(numbers, ops_R, strict=True))
    )
    system = System(
        stages=tuple(
            OperatorStage(a, b, None, s, None, proto)
            for a, b, s in zip(ops_A, ops_B, ops_S, strict=True)
        ),
        state_costs=tuple(() if c is None else (StateCost(c),) for c in ops_Q),
        control_cost=ControlCost(groups, tuple(m)),
        blocks=tuple((size,) for size in m),
        owned=tuple((t,) for t in range(T)),
        proto=proto,
        affine=() if all(part is None for part in f_) else tuple(f_),
    )
    controls = torch.cat([proto.new_zeros(m[t]) if r_[t] is None else r_[t] for t in range(T)])
    first: Tangent | None = None if x0 is None else (x0.unsqueeze(0),)
    return system, [(part,) for part in q_], controls, first


def _listed(part: Sequence[Any] | None, length: int, name: str) -> list[Any]:
    if part is None:
        return [None] * length
    if len(part) != length:
        raise ValueError(f"{name} has {len(part)} entries, not {length} (None stands for zero).")
    return list(part)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _check_vector(part: Any, size: int, name: str, proto: Tensor) -> None:
    if part is None:
        return
    if not isinstance(part, Tensor):
        raise TypeError(f"{name} is a {type(part).__name__}: give a tensor of shape ({size},).")
    if tuple(part.shape) != (size,):
        raise ValueError(f"{name} has shape {tuple(part.shape)}, not ({size},).")
    if part.dtype != proto.dtype or part.device != proto.device:
        raise ValueError(
            f"{name} is {part.dtype} on {part.device} and A[0] is {proto.dtype} on "
            f"{proto.device}: convert them to one dtype and device."
        )
    if not bool(torch.isfinite(part).all()):
        raise ValueError(f"{name} has entries that are NaN or infinite.")
