"""The linear-quadratic problem: what `split` and a metric make of a network, or given matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from linear_operator import LinearOperator
from torch import Tensor

from .layer_operators import LayerOperators
from .layout import Layout
from .operators import (
    CondensedHessianOperator,
    ControlCost,
    HessianBlockOperator,
    OutputJacobianOperator,
    System,
    TangentKernelOperator,
)
from .operators.tangent import Tangent, size_of, to_rows
from .origin import NetworkOrigin

if TYPE_CHECKING:
    from .network import Layer

Given: TypeAlias = LinearOperator | Tensor


class LQRProblem(LayerOperators):
    """Minimise over u the quadratic model of a step; design.md section 2.

        sum_t 1/2 x'Q_t x + u'S_t x + 1/2 u'R_t u + q_t'x + r_t'u  +  1/2 x_T'Q_T x_T + q_T'x_T
        x_{t+1} = A_t x_t + B_t u_t + f_t

    Made from a network by `from_network`, or from given operators or dense tensors. All are
    lazy; the flat control of a network follows `model.named_parameters()`, that of given
    matrices is u_0, ..., u_{T-1} one after the other.

    Args:
        A: T operators (n_{t+1}, n_t).
        B: T operators (n_{t+1}, m_t).
        Q: T + 1 symmetric operators (n_t, n_t), None for zero. Default: all zero.
        R: T symmetric operators (m_t, m_t), or numbers times the identity. Default: zero.
        S: T operators (m_t, n_t), None for zero. Default: zero.
        q: T + 1 vectors (n_t,), None for zero.
        r: T vectors (m_t,), None for zero.
        x0: First state (n_0,). Default: zero.
        f: T vectors (n_{t+1},), None for zero.

    Raises:
        ValueError: Sizes, dtypes or devices do not fit, or nothing is linear or quadratic.
    """

    system: System
    origin: NetworkOrigin | None

    def __init__(
        self,
        *,
        A: Sequence[Given],
        B: Sequence[Given],
        Q: Sequence[Given | None] | None = None,
        R: Sequence[Given | float] | None = None,
        S: Sequence[Given | None] | None = None,
        q: Sequence[Tensor | None] | None = None,
        r: Sequence[Tensor | None] | None = None,
        x0: Tensor | None = None,
        f: Sequence[Tensor | None] | None = None,
    ) -> None:
        from .given import system_from_operators

        system, linear, controls, first = system_from_operators(A, B, Q, R, S, q, r, x0, f)
        names = tuple(f"u{t}" for t in range(len(A)))
        self._assemble(system, names, linear, controls, first)

    @classmethod
    def from_network(
        cls,
        layers: Sequence[Layer],
        inputs: Any,
        targets: Tensor,
        *,
        loss: Any,
        metric: Any = "gauss_newton",
        damping: Any = 1e-3,
        columns: int | None = None,
        check: bool = True,
        checkpoint: bool = False,
    ) -> LQRProblem:
        """The problem whose solution is the steepest-descent step of a network's loss.

        The network runs once, in curvature mode: attention by the MATH backend, BatchNorm
        statistics and the random state untouched, dropout masks those of the model's own next
        forward pass. The gradient is that of the mean loss, the curvature that of the mean
        divergence.

        Args:
            layers: All layers of `split(model)`.
            inputs: One batch, samples first; a tuple of tensors for several inputs.
            targets: What the loss compares with.
            loss: "cross_entropy", "mse", "bce_with_logits", a loss module or `Loss`, or a callable
                (outputs, targets) that is a mean over samples.
            metric: "gauss_newton", "newton", "fisher", "fisher_mc", "empirical_fisher", "kl",
                "reverse_kl", "renyi", "squared_error", or a `Metric`.
            damping: R_t: a number (times I), one number or operator per layer (a sequence of
                length T, or a mapping from layer names), or one operator (P, P).
            columns: Most columns multiplied in one pass; each costs one tangent of the
                activations. None: as many as pay (`System.columns_per_pass`).
            check: Whether the model is run once more, to see that it is deterministic and that
                the layers compute what it does.
            checkpoint: Whether only what enters each layer is kept, and a layer is linearised
                again for every sweep through it: memory for one layer's activations, and half a
                product's time more. For cg, minres and low_rank.

        Raises:
            ValueError: Something about the batch, the model or an option is wrong; the message
                names it and the remedy. Nothing has been changed by then.
        """
        from .from_network import network_problem

        return network_problem(
            cls,
            *(layers, inputs, targets),
            loss=loss,
            metric=metric,
            damping=damping,
            columns=columns,
            check=check,
            checkpoint=checkpoint,
        )

    def _assemble(
        self,
        system: System,
        names: Sequence[str],
        linear: Sequence[Tangent],
        controls: Tensor | None,
        first: Tangent | None,
        origin: NetworkOrigin | None = None,
        columns: int | None = None,
    ) -> LQRProblem:
        """Fills the problem in; linear terms are on states (no column axis) and flat controls."""
        self.system, self.names, self.origin = system, tuple(names), origin
        self._linear, self._controls, self._first = tuple(linear), controls, first
        self._columns = system.columns_per_pass if columns is None else columns
        return self

    def __repr__(self) -> str:
        """What it is of, how large, and by which costs."""
        size = f"P={self.size}, {self.dtype} on {self.device}, R={self.control_cost}"
        if self.origin is None:
            return f"LQRProblem(given matrices, T={self.horizon}, {size})"
        origin = self.origin
        return (
            f"LQRProblem(network of {self.horizon} layers, N={len(origin.outputs)}, {size}, "
            f"loss={origin.loss}, metric={origin.metric})"
        )

    # ---- sizes and the flat layout

    @property
    def size(self) -> int:
        """P, the length of a flat step."""
        return self.system.control_size

    @property
    def control_cost(self) -> ControlCost:
        """R of all controls; `R` has it layer by layer."""
        return self.system.control_cost

    @property
    def owned(self) -> tuple[tuple[int, ...], ...]:
        """For every layer, the places in `names` of the parameters that enter there."""
        return self.system.owned

    @cached_property
    def layout(self) -> Layout:
        """Which parameter stands where in a flat step."""
        return Layout(self.names, self.system.blocks)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a flat step (P,) by parameter name, in the parameters' shapes (views)."""
        return self.layout.unflatten(flat)

    def flatten(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The flat step (P,) of parts by parameter name."""
        return self.layout.flatten(parts)

    # ---- operators

    @cached_property
    def q(self) -> tuple[Tensor, ...]:
        """q_0..q_T, the linear costs of the states, flat."""
        return tuple(self._flat_state(part, t) for t, part in enumerate(self._linear))

    @cached_property
    def r(self) -> tuple[Tensor, ...]:
        """r_t, the linear costs of the controls, flat."""
        flat = self._zeros(self.size) if self._controls is None else self._controls
        parts = [part.reshape(-1) for part in self.system.split_control(flat.unsqueeze(0))]
        return tuple(
            torch.cat([self._zeros(0), *(parts[i] for i in owned)]) for owned in self.system.owned
        )

    @cached_property
    def f(self) -> tuple[Tensor, ...]:
        """f_t, the dynamics' constant terms, flat."""
        given = self.system.affine or (None,) * self.horizon
        return tuple(
            self._zeros(size_of(stage.next_state)) if f is None else f
            for f, stage in zip(given, self.system.stages, strict=True)
        )

    @cached_property
    def output_gradient(self) -> Tensor:
        """q_T as a row (1, n_T): for a network, the gradient of the mean loss at the outputs."""
        return self._flat_state(self._linear[-1], self.horizon).unsqueeze(0)

    @property
    def x0(self) -> Tensor:
        """The first state, flat."""
        if self._first is None:
            return self._zeros(size_of(self.system.state_shapes(0)))
        return to_rows(self._first, self.system.state_shapes(0), self.system.proto, 1)[0]

    @cached_property
    def hessian(self) -> CondensedHessianOperator:
        """H, the Hessian in the flat control with R included; shape (P, P)."""
        return CondensedHessianOperator(
            self.system.proto, system=self.system, columns=self._columns
        )

    def block(
        self,
        rows: str | Sequence[str],
        columns: str | Sequence[str] | None = None,
        *,
        damped: bool = True,
    ) -> HessianBlockOperator:
        """The part of H in some parameters, by name; no vector of the length P is made.

        Args:
            rows: Patterns of names, or of modules (`Layout.select`).
            columns: The same for the columns; None takes those of the rows.
            damped: Whether R is included.

        Raises:
            ValueError: A pattern matches nothing.
        """
        chosen = self.layout.select(rows)
        others = chosen if columns is None else self.layout.select(columns)
        return self._block(chosen, others, damped=damped)

    def curvature_block(self, rows: Sequence[int], columns: Sequence[int]) -> HessianBlockOperator:
        """H_st without R, of parameters by number."""
        return self._block(rows, columns, damped=False)

    def _block(
        self, rows: Sequence[int], columns: Sequence[int], *, damped: bool = True
    ) -> HessianBlockOperator:
        return HessianBlockOperator(
            self.system.proto,
            system=self.system,
            rows=rows,
            cols=columns,
            damped=damped,
            columns=self._columns,
        )

    @cached_property
    def output_jacobian(self) -> OutputJacobianOperator:
        """J, the derivative of the last state in the flat control; shape (n_T, P)."""
        return OutputJacobianOperator(self.system.proto, system=self.system, columns=self._columns)

    @cached_property
    def tangent_kernel(self) -> TangentKernelOperator:
        """K = J R^{-1} J', the tangent kernel of the outputs; shape (n_T, n_T). Needs R > 0."""
        return TangentKernelOperator(self.system.proto, system=self.system, columns=self._columns)

    # ---- the objective

    @cached_property
    def gradient(self) -> Tensor:
        """Gradient of the objective at u = 0, flat (P,); for a network, that of the mean loss."""
        system = self.system
        system.check(look="glance")
        with torch.no_grad():
            trajectory = system.rollout(None, self._first, with_affine=True)
            zero: Tangent = tuple(None for _ in system.state_shapes(system.horizon))
            out = system.proto.new_empty(1, self.size)
            linear = [
                tuple(None if part is None else part.unsqueeze(0) for part in parts)
                for parts in self._linear
            ]
            system.adjoint(zero, trajectory, linear=linear, out=out)
        return out[0] if self._controls is None else out[0] + self._controls

    @cached_property
    def constant(self) -> Tensor:
        """The objective at u = 0; zero for a network."""
        total = self._zeros(())
        if self._first is None and not self.system.affine:
            return total
        x = self.x0
        for t in range(self.horizon + 1):
            total = total + x @ (self.Q[t] @ x) / 2 + self.q[t] @ x
            if t < self.horizon:
                x = self.A[t] @ x + self.f[t]
        return total

    def objective(self, u: Tensor) -> Tensor:
        """The model's value at a flat step (P,), a scalar, or at columns (P, k), shape (k,).

        Zero at u = 0 for a network: the predicted change of the mean loss.
        """
        with torch.no_grad():
            curved = self.hessian @ u
            linear = self.gradient if u.ndim == 1 else self.gradient.unsqueeze(1)
            return self.constant + (u * (curved / 2 + linear)).sum(0)

    def with_damping(self, damping: Any) -> LQRProblem:
        """The same problem, linearisation shared, with another damping (see `from_network`)."""
        from .damping import control_cost

        names = None if self.origin is None else [layer.name for layer in self.origin.layers]
        return self._with_control_cost(control_cost(damping, self.system, names))

    def _with_control_cost(self, cost: ControlCost) -> LQRProblem:
        return self._with_system(replace(self.system, control_cost=cost))

    def _with_system(self, system: System) -> LQRProblem:
        """The same problem on another system; the gradient is kept if it is known."""
        other = LQRProblem.__new__(LQRProblem)
        other._assemble(
            *(system, self.names, self._linear, self._controls, self._first, self.origin),
            self._columns,
        )
        if "gradient" in self.__dict__:
            other.__dict__["gradient"] = self.gradient
        return other

    # ---- helpers

    def _flat_state(self, part: Tangent, t: int) -> Tensor:
        rows = tuple(None if p is None else p.unsqueeze(0) for p in part)
        return to_rows(rows, self.system.state_shapes(t), self.system.proto, 1)[0]

    def _zeros(self, *size: Any) -> Tensor:
        return self.system.proto.new_zeros(*size)
