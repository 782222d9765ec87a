"""LayerNorm, RMSNorm, GroupNorm and BatchNorm in closed form.

Nested transforms of `torch.func` through these are silently wrong on torch 2.13 (design.md
section 6; test_norms.py holds a case); nothing here differentiates a backward.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Call, Curvature, Node, Scales, Slot, Tangents, plain, register
from .gram import Deltas, Rows, Term


class Standardise:
    """z = c / s with c = x - mean(x) (or x) and s = sqrt(mean(c^2) + eps) over some axes.

    With P the projection c = P x, the Jacobian (P - z z'/n) / s (applied after P) is symmetric.

    Args:
        x: Input, viewed so that the statistics run over `dims`.
        dims: Axes of the statistics.
        eps: Added to the mean square.
        centre: Whether the mean is taken off.
    """

    def __init__(self, x: Tensor, dims: tuple[int, ...], eps: float, centre: bool) -> None:
        self.shape, self.dims, self.centre = x.shape, dims, centre
        c = self._project(x)
        self.inverse = (c.square().mean(dims, keepdim=True) + eps).rsqrt()
        self.z = c * self.inverse

    def product(self, v: Tensor) -> Tensor:
        """Jacobian (= its transpose) times (k, *shape)."""
        return self._project(v - self.z * self._mean(self.z * v)) * self.inverse

    def second(self, p: Tensor, v: Tensor) -> Tensor:
        """Derivative of Jacobian' p along v, (k, *shape); symmetric in the sense of <., w>."""
        slope = self._mean(self.z * p)
        dv = self._project(v)
        ds = self._mean(self.z * dv)
        dz = (dv - self.z * ds) * self.inverse
        turned = dz * slope + self.z * self._mean(p * dz)
        stretched = ds * self.inverse * (p - self.z * slope)
        return -self._project(turned + stretched) * self.inverse

    def _mean(self, v: Tensor) -> Tensor:
        # Axes count from the right, so a leading column axis does not move them.
        return v.mean(self.dims, keepdim=True)

    def _project(self, v: Tensor) -> Tensor:
        return v - self._mean(v) if self.centre else v


class FixedScale:
    """z = (x - m) / s with m and s given: BatchNorm in evaluation mode."""

    def __init__(self, x: Tensor, mean: Tensor, inverse: Tensor) -> None:
        self.shape, self.inverse = x.shape, inverse
        self.z = (x - mean) * inverse

    def product(self, v: Tensor) -> Tensor:
        """V / s."""
        return v * self.inverse

    second = None


class NormNode(Node):
    """y = gamma z(x) + beta.

    Args:
        call: The norm's call.
        x: Input.
        weight: gamma or None.
        bias: beta or None.
        core: z(x).
        broadcast: Shape that gamma and beta take to multiply the input.
    """

    def __init__(
        self,
        call: Call,
        x: Any,
        weight: Any,
        bias: Any,
        core: Standardise | FixedScale,
        broadcast: tuple[int, ...],
    ) -> None:
        named = {"x": x, "weight": weight, "bias": bias}
        self.roles = [role for role, value in named.items() if isinstance(value, Slot)]
        super().__init__(call.evaluate(), [named[role] for role in self.roles])
        value = plain(x)
        self.core, self.shape, self.dtype = core, value.shape, value.dtype
        self.broadcast = broadcast
        self.gamma = None if weight is None else plain(weight).to(core.z).reshape(broadcast)
        self.parameter_shapes = {
            role: plain(named[role]).shape for role in self.roles if role != "x"
        }
        self.couples_batch = isinstance(core, Standardise) and len(core.shape) in [
            -axis for axis in core.dims
        ]

    @property
    def _z(self) -> Tensor:
        return self.core.z.reshape(self.shape)

    def _core_product(self, v: Tensor) -> Tensor:
        return self.core.product(v.reshape(len(v), *self.core.shape)).reshape(v.shape)

    def push(self, tangents: Tangents) -> Tensor:
        """Gamma dz + dgamma z + dbeta."""
        given = dict(zip(self.roles, tangents, strict=True))
        k = next(len(t) for t in tangents if t is not None)
        total: Tensor | None = None
        dx, dw, db = (given.get(role) for role in ("x", "weight", "bias"))
        if dx is not None:
            total = self._core_product(dx.to(self.core.z.dtype))
            total = total if self.gamma is None else total * self.gamma
        if dw is not None:
            term = self._z * self._spread(dw)
            total = term if total is None else total + term
        if db is not None:
            term = self._spread(db)
            total = term.expand(k, *self.shape) if total is None else total + term
        assert total is not None
        return total.to(self.dtype)

    def pull(
        self, cotangent: Tensor, needed: Sequence[bool], out: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """J'(gamma c), the sums of c z and of c."""
        c = cotangent.to(self.core.z.dtype)
        results: list[Tensor | None] = []
        for role, wanted in zip(self.roles, needed, strict=True):
            if not wanted:
                results.append(None)
            elif role == "x":
                scaled = c if self.gamma is None else c * self.gamma
                results.append(self._core_product(scaled).to(self.dtype))
            else:
                results.append(self._gather(c * self._z if role == "weight" else c, role))
        return results

    def reads_none_of(self, storages: Collection[int]) -> bool:
        """True: z is the node's own."""
        return True

    def curvature(self, costate: Tensor) -> Curvature | None:
        """Second derivative of <p, gamma z(x)> in x, and in x and gamma together."""
        p = costate.to(self.core.z.dtype)
        scaled = (p if self.gamma is None else p * self.gamma).reshape(self.core.shape)

        def product(tangents: Tangents) -> list[Tensor | None]:
            given = dict(zip(self.roles, tangents, strict=True))
            dx, dw = given.get("x"), given.get("weight")
            made: dict[str, Tensor | None] = {}
            if dx is not None:
                v = dx.to(p.dtype)
                if self.core.second is not None:
                    inner = v.reshape(len(v), *self.core.shape)
                    made["x"] = self.core.second(scaled, inner).reshape(v.shape)
                if "weight" in self.roles:
                    made["weight"] = self._gather(p * self._core_product(v), "weight")
            if dw is not None and "x" in self.roles:
                cross = self._core_product(p * self._spread(dw))
                before = made.get("x")
                made["x"] = cross if before is None else before + cross
            moved = made.get("x")
            made["x"] = None if moved is None else moved.to(self.dtype)
            return [made.get(role) for role in self.roles]

        return product

    def gram_terms(self, deltas: Deltas, scales: Scales) -> list[Term] | None:
        """Per-sample sums of c z (or c), which are no larger than the activations."""
        given = dict(zip(self.roles, scales, strict=True))
        if given.get("x") is not None:
            return super().gram_terms(deltas, scales)
        return [
            Rows(self._sums(deltas.values, role, deltas.select(self._z)), scale)
            for role, scale in given.items()
            if scale is not None
        ]

    def sample_gradients(self, deltas: Tensor, index: int) -> Tensor:
        """Gradients of every sample in the weight or bias, (r, N, *out) to (r, N, width)."""
        return self._sums(deltas, self.roles[index], self._z)

    def _sums(self, deltas: Tensor, role: str, z: Tensor) -> Tensor:
        c = deltas * z if role == "weight" else deltas
        lead = len(self.shape) - len(self.broadcast)
        dims = [
            i + 1 for i in range(1, len(self.shape)) if i < lead or self.broadcast[i - lead] == 1
        ]
        rows = c.sum(dims) if dims else c
        return rows.reshape(*deltas.shape[:2], -1)

    def _spread(self, parameter: Tensor) -> Tensor:
        k = len(parameter)
        missing = len(self.shape) - len(self.broadcast)
        shaped = parameter.reshape(k, *(1,) * missing, *self.broadcast)
        return shaped.to(self.core.z.dtype)

    def _gather(self, c: Tensor, role: str) -> Tensor:
        missing = len(self.shape) - len(self.broadcast)
        dims = list(range(1, 1 + missing)) + [
            i + 1 + missing for i, size in enumerate(self.broadcast) if size == 1
        ]
        total = c.sum(dims) if dims else c
        shape = self.parameter_shapes[role]
        return total.reshape(len(c), *shape).to(self.dtype)


def _wide(x: Tensor) -> Tensor:
    """Half precisions are normalised in float32, as torch does."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@register(F.layer_norm)
def layer_norm(call: Call) -> Node | None:
    """Rule of `F.layer_norm(input, normalized_shape, weight, bias, eps)`."""
    x, shape = call.argument(0, "input"), call.argument(1, "normalized_shape")
    dims = tuple(range(-len(shape), 0))
    core = Standardise(_wide(plain(x)), dims, call.argument(4, "eps", 1e-5), centre=True)
    return NormNode(
        call, x, call.argument(2, "weight"), call.argument(3, "bias"), core, tuple(shape)
    )


@register(F.rms_norm)
def rms_norm(call: Call) -> Node | None:
    """Rule of `F.rms_norm(input, normalized_shape, weight, eps)`."""
    x, shape = call.argument(0, "input"), call.argument(1, "normalized_shape")
    value, eps = _wide(plain(x)), call.argument(3, "eps")
    eps = torch.finfo(value.dtype).eps if eps is None else eps
    core = Standardise(value, tuple(range(-len(shape), 0)), eps, centre=False)
    return NormNode(call, x, call.argument(2, "weight"), None, core, tuple(shape))


@register(F.group_norm)
def group_norm(call: Call) -> Node | None:
    """Rule of `F.group_norm(input, num_groups, weight, bias, eps)`."""
    x, groups = call.argument(0, "input"), call.argument(1, "num_groups")
    value = plain(x)
    viewed = _wide(value).reshape(value.shape[0], groups, -1)
    core = Standardise(viewed, (-1,), call.argument(4, "eps", 1e-5), centre=True)
    return NormNode(
        call, x, call.argument(2, "weight"), call.argument(3, "bias"), core, _channels(value)
    )


@register(F.batch_norm)
def batch_norm(call: Call) -> Node | None:
    """Rule of `F.batch_norm(input, mean, var, weight, bias, training, momentum, eps)`."""
    x = call.argument(0, "input")
    value, eps = plain(x), call.argument(7, "eps", 1e-5)
    core: Standardise | FixedScale
    if call.argument(5, "training", False):
        dims = tuple(axis - value.ndim for axis in range(value.ndim) if axis != 1)
        core = Standardise(_wide(value), dims, eps, centre=True)
    else:
        mean, variance = (
            _wide(plain(call.argument(i, name))).reshape(_channels(value))
            for i, name in ((1, "running_mean"), (2, "running_var"))
        )
        core = FixedScale(_wide(value), mean, (variance + eps).rsqrt())
    return NormNode(
        call, x, call.argument(3, "weight"), call.argument(4, "bias"), core, _channels(value)
    )


def _channels(x: Tensor) -> tuple[int, ...]:
    return (x.shape[1], *(1,) * (x.ndim - 2))
