"""One time step of a linear-quadratic system, as the sweeps see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias

import torch
from linear_operator import LinearOperator
from torch import Tensor

from .apply import apply_rows, apply_rows_t
from .control_cost import ControlCost
from .tangent import SQUARED, Shape, Tangent, add, from_rows, to_rows

Look: TypeAlias = Literal["count", "glance", "all"]
"""How closely weights are compared with what was linearized: where torch counted a write, at some
entries too, or at all of them."""


class Stage(Protocol):
    """dx' = A dx + B u, with the stage's own curvature [[Q, S'], [S, R]].

    `forward` and `backward` are the only products; A, B, Q, R and S are read off them by giving
    zeros (None), so one linearisation serves them all.
    """

    @property
    def state(self) -> tuple[Shape, ...]:
        """Shapes of the components of x."""

    @property
    def next_state(self) -> tuple[Shape, ...]:
        """Shapes of the components of x'."""

    @property
    def controls(self) -> tuple[Shape, ...]:
        """Shapes of the controls."""

    @property
    def curved(self) -> bool:
        """Whether the stage has any curvature of its own."""

    def forward(self, x: Tangent, u: Tangent) -> tuple[Tangent, Any]:
        """A x + B u, and a record from which `backward` can add the curvature."""

    def backward(
        self,
        costate: Tangent,
        record: Any,
        *,
        need_state: bool = True,
        need_control: bool = True,
        out: Sequence[Tensor] | None = None,
    ) -> tuple[Tangent, Tangent]:
        """A' p + Q x + S' u and B' p + S x + R u; x and u are those of the record.

        Args:
            costate: p, the tangent at the next state.
            record: What `forward` returned, or None for no curvature.
            need_state: Whether the first result is wanted.
            need_control: Whether the second result is wanted.
            out: Buffers that the second result is written to, one per control, overwritten.
        """

    def costate(
        self, costate: Tangent, inverse: ControlCost, *, need_state: bool
    ) -> tuple[Tangent, Any]:
        """A' p, and a record from which `respond` can take B' p with the same `inverse`."""

    def respond(self, x: Tangent, record: Any, inverse: ControlCost) -> Tangent:
        """A x + B R^{-1} B' p, p being that of the record and `inverse` being R^{-1}."""

    def control_squares(self, record: Any, inverse: ControlCost, k: int) -> Tensor:
        """|B' p|^2 and p'B R^{-1} B' p of the record's k columns, in float64, (2, k)."""


def respond_by_controls(
    stage: Stage, x: Tangent, costate: Tangent, inverse: ControlCost
) -> Tangent:
    """A x + B R^{-1} B' p through the controls of the whole stage."""
    _, controls = stage.backward(costate, None, need_state=False)
    some = next((part for part in controls if part is not None), None)
    if some is None:
        return stage.forward(x, tuple(None for _ in controls))[0]
    rows = inverse.product(to_rows(controls, stage.controls, some, len(some)))
    return stage.forward(x, from_rows(rows, stage.controls))[0]


def squares_of_controls(stage: Stage, costate: Tangent, inverse: ControlCost, k: int) -> Tensor:
    """|B' p|^2 and p'B R^{-1} B' p through the controls of the whole stage, (2, k)."""
    _, controls = stage.backward(costate, None, need_state=False)
    some = next((part for part in controls if part is not None), None)
    if some is None:
        return torch.zeros(2, k, dtype=torch.float64)
    rows = to_rows(controls, stage.controls, some, len(some))
    return dots_of_rows(rows, inverse.product(rows))


def dots_of_rows(rows: Tensor, scaled: Tensor) -> Tensor:
    """Dot products of rows with themselves and with scaled ones, in float64, (2, k)."""
    parts = max(1, SQUARED // max(1, len(rows)))
    total = torch.zeros(2, len(rows), dtype=torch.float64, device=rows.device)
    for a, b in zip(rows.split(parts, dim=1), scaled.split(parts, dim=1), strict=True):
        wide = a.double()
        total[0] += wide.square().sum(1)
        total[1] += (wide * b.double()).sum(1)
    return total


class OperatorStage:
    """A stage made of given operators on flat vectors.

    Args:
        A: Operator (n', n).
        B: Operator (n', m).
        Q: Symmetric operator (n, n) or None.
        S: Operator (m, n) or None; the cost's cross term is u'S x.
        R: Symmetric operator (m, m) or None. A problem keeps its R in the control cost; a stage
            that stands alone may carry it here.
        proto: A tensor with the dtype and device of the products.
    """

    def __init__(
        self,
        A: LinearOperator,
        B: LinearOperator,
        Q: LinearOperator | None,
        S: LinearOperator | None,
        R: LinearOperator | None,
        proto: Tensor,
    ) -> None:
        self.A, self.B, self.Q, self.S, self.R, self.proto = A, B, Q, S, R, proto
        self.state: tuple[Shape, ...] = ((A.shape[1],),)
        self.next_state: tuple[Shape, ...] = ((A.shape[0],),)
        self.controls: tuple[Shape, ...] = ((B.shape[1],),)
        self.curved = any(cost is not None for cost in (Q, S, R))

    def forward(self, x: Tangent, u: Tangent) -> tuple[Tangent, Any]:
        """A x + B u."""
        out = None if x[0] is None else apply_rows(self.A, x[0])
        if u[0] is not None:
            out = add(out, apply_rows(self.B, u[0]))
        return (out,), (x[0], u[0])

    def backward(
        self,
        costate: Tangent,
        record: Any,
        *,
        need_state: bool = True,
        need_control: bool = True,
        out: Sequence[Tensor] | None = None,
    ) -> tuple[Tangent, Tangent]:
        """A' p + Q x + S' u and B' p + S x + R u."""
        x, u = (None, None) if record is None else record
        p = costate[0]

        def total(*terms: tuple[LinearOperator | None, Tensor | None, bool]) -> Tensor | None:
            result = None
            for operator, v, transposed in terms:
                if operator is not None and v is not None:
                    product = apply_rows_t if transposed else apply_rows
                    result = add(result, product(operator, v))
            return result

        state = total((self.A, p, True), (self.Q, x, False), (self.S, u, True))
        control = total((self.B, p, True), (self.S, x, False), (self.R, u, False))
        if out is not None:
            out[0].zero_() if control is None else out[0].copy_(control)
        return (state,), (control,)

    def costate(
        self, costate: Tangent, inverse: ControlCost, *, need_state: bool
    ) -> tuple[Tangent, Any]:
        """A' p, and p."""
        return self.backward(costate, None, need_state=need_state, need_control=False)[0], costate

    def respond(self, x: Tangent, record: Any, inverse: ControlCost) -> Tangent:
        """A x + B R^{-1} B' p."""
        return respond_by_controls(self, x, record, inverse)

    def control_squares(self, record: Any, inverse: ControlCost, k: int) -> Tensor:
        """|B' p|^2 and p'B R^{-1} B' p."""
        return squares_of_controls(self, record, inverse, k)


class StateCost:
    """1/2 x' Q x on a state, or on one component of it.

    Args:
        operator: Q, of the size of the flat state (or component).
        component: Which component of the state it acts on; None takes the whole state.
    """

    def __init__(self, operator: LinearOperator, component: int | None = None) -> None:
        self.operator, self.component = operator, component

    def product(self, x: Tangent, shapes: Sequence[Shape]) -> Tangent:
        """Q x."""
        chosen = range(len(shapes)) if self.component is None else [self.component]
        some = next((x[i] for i in chosen if x[i] is not None), None)
        if some is None:
            return tuple(None for _ in shapes)
        parts = [shapes[i] for i in chosen]
        rows = to_rows(tuple(x[i] for i in chosen), parts, some, len(some))
        products = dict(zip(chosen, from_rows(apply_rows(self.operator, rows), parts), strict=True))
        return tuple(products.get(i) for i in range(len(shapes)))
