"""A problem's twin whose GEMMs run in bfloat16, and products in TensorFloat-32."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from .network import NetworkStage
from .network.modes import LOCK
from .operators.base import MatrixFreeOperator
from .problem import LQRProblem
from .rules.base import Node, Scales, Tangents
from .rules.conv import ConvNode
from .rules.gram import Deltas, Term
from .rules.linear import LinearNode

Narrow = Literal["bf16", "tf32"]

CHUNK = 2**20
"""Weights converted at a time: a copy that stays in the cache and is given back at once."""


def wide_and_narrow(
    problem: LQRProblem, products: Narrow
) -> tuple[MatrixFreeOperator, MatrixFreeOperator]:
    """H exactly, and H with its GEMMs in low precision; both of the problem's dtype and device.

    The first is `problem.hessian` with TF32 switched off: by default torch runs the convolutions
    of a CUDA device in TF32, and a residual measured with them would be no true one.

    Args:
        problem: From a network, in float32 or float64 ("tf32": in float32, on a CUDA device).
        products: "bf16" or "tf32".

    Raises:
        ValueError: The problem or the device does not have such products.
    """
    if products not in ("bf16", "tf32"):
        raise ValueError(f"products='{products}' is unknown: choose 'bf16' or 'tf32'.")
    if products == "tf32" and (problem.device.type, problem.dtype) != ("cuda", torch.float32):
        raise ValueError(
            f"products='tf32' needs float32 on a CUDA device, and the problem is {problem.dtype} "
            f"on {problem.device}: use products='bf16', which any device has."
        )
    narrow: MatrixFreeOperator
    if products == "tf32":
        narrow = TensorFloat32Operator(problem.hessian)
    else:
        narrow = low_precision_twin(problem).hessian
    if problem.device.type != "cuda":
        return problem.hessian, narrow
    return TensorFloat32Operator(problem.hessian, enabled=False), narrow


def low_precision_twin(problem: LQRProblem, dtype: torch.dtype = torch.bfloat16) -> LQRProblem:
    """The same problem with the GEMMs of Linear layers and convolutions in bfloat16.

    Tangents and cotangents stay in the problem's dtype between calls, and so do biases, norms,
    activations, embeddings, attention's core and all costs: only the operands of a GEMM are
    rounded. Weights and layer inputs are rounded once, when first read, and kept: 2 bytes per
    weight (none for a first layer, whose weight no product reads) and per input entry.
    The gradient is the wide problem's, and so are the linearisation behind `origin` and the
    closed forms that are made from it.

    Args:
        problem: From a network, in float32 or float64.
        dtype: Of the operands; torch.bfloat16. (The cotangents of a mean leave the range of
            float16.)

    Raises:
        ValueError: Another dtype, a problem without a network, or one without such layers.
    """
    if dtype != torch.bfloat16:
        raise ValueError(f"a twin in {dtype} is not offered: use torch.bfloat16.")
    if problem.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the problem is {problem.dtype}, no wider than its twin: solve it as it is, or "
            "convert the model to float32."
        )
    stages = problem.system.stages
    if problem.origin is None or not all(isinstance(stage, NetworkStage) for stage in stages):
        raise ValueError(
            "products in bfloat16 need a problem from a network: given matrices have no layers to "
            "lower. Leave `products` out."
        )
    if problem.origin.linearization.remakes:
        raise ValueError(
            "products in bfloat16 need the layers' linearisation, which checkpoint=True lets go: "
            "make the problem without it."
        )
    casts = _Casts(dtype)
    twins = tuple(_twin_stage(stage, casts) for stage in stages)  # type: ignore[arg-type]
    if not casts.readers:
        raise ValueError(
            "no Linear layer or convolution of this network has a rule, so nothing would run in "
            "bfloat16: leave `products` out."
        )
    # So that the twin takes over the gradient, which is the wide problem's.
    _ = problem.gradient
    return problem._with_system(replace(problem.system, stages=twins))


@contextmanager
def tensor_float32(enabled: bool = True) -> Iterator[None]:
    """GEMMs and convolutions of float32 tensors on a GPU in TF32, or surely not; put back after.

    Torch keeps the choice for the whole process, so other threads share it meanwhile.
    """
    backends: Any = torch.backends
    value: str | bool
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        # torch >= 2.9, which refuses to read the old switches once the new ones were used.
        name, value = "fp32_precision", "tf32" if enabled else "ieee"
        places = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    else:
        name, value = "allow_tf32", enabled
        places = [backends.cuda.matmul, backends.cudnn]
    with LOCK:
        before = [getattr(place, name) for place in places]
        try:
            for place in places:
                setattr(place, name, value)
            yield
        finally:
            for place, was in zip(places, before, strict=True):
                setattr(place, name, was)


class TensorFloat32Operator(MatrixFreeOperator):
    """A symmetric operator whose products run under `tensor_float32`.

    Args:
        base: The operator.
        enabled: Whether TF32 is on in them, or off.
        columns: Columns per pass; None leaves that to the operator.
    """

    symmetric = True

    def __init__(
        self, base: MatrixFreeOperator, *, enabled: bool = True, columns: int | None = None
    ) -> None:
        super().__init__(base._proto, columns=columns)
        self.base, self.enabled = base, enabled

    def _sizes(self) -> tuple[int, int]:
        return self.base._sizes()

    def _rows(self, v: Tensor) -> Tensor:
        with tensor_float32(self.enabled):
            return self.base.times_rows(v)

    def _rows_into(self, v: Tensor, out: Tensor) -> Tensor:
        with tensor_float32(self.enabled):
            return self.base._rows_into(v, out)


class _Casts:
    """Tensors in a narrow dtype, made when first read and shared by all who read them.

    The wide tensors live as long as this does, so an address stands for one tensor.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.readers = dtype, 0
        self._made: dict[tuple[object, ...], Tensor] = {}

    def __call__(self, wide: Tensor) -> Tensor:
        key = (wide.data_ptr(), wide.shape, wide.stride())
        if key not in self._made:
            self._made[key] = wide.to(self.dtype)
        return self._made[key]


class _NarrowNode(Node):
    """A node that takes and gives wide tangents; everything but its products is the wide node's."""

    def __init__(self, wide: LinearNode | ConvNode, casts: _Casts) -> None:
        super().__init__(None, ())
        self.inputs, self.wide, self.casts = wide.inputs, wide, casts
        self.couples_batch, self.moves, self.per_sample = (
            wide.couples_batch,
            wide.moves,
            wide.per_sample,
        )
        self.flops = wide.flops
        casts.readers += 1

    def gram_terms(self, deltas: Deltas, scales: Scales) -> list[Term] | None:
        """The wide node's."""
        return self.wide.gram_terms(deltas, scales)

    def gram_flops(self, size: int) -> float:
        """The wide node's."""
        return self.wide.gram_flops(size)


class _NarrowLinear(_NarrowNode):
    """y = x W' + b. The parts of the weight's size go through the cache piece by piece."""

    wide: LinearNode

    def push(self, tangents: Tangents) -> Tensor:
        """Dx W' + x dW' + db, summed in the wide dtype."""
        wide, casts = self.wide, self.casts
        given = dict(zip(wide.roles, tangents, strict=True))
        dx, dw, db = (given.get(role) for role in ("x", "weight", "bias"))
        some = next(t for t in tangents if t is not None)
        k, rows = len(some), wide.lead.numel()
        total = some.new_zeros(k, rows, len(wide.weight)) if dw is None else self._push_weight(dw)
        if dx is not None:
            flat = dx.reshape(-1, dx.shape[-1]).to(casts.dtype) @ casts(wide.weight).mT
            total += flat.reshape(total.shape)
        if db is not None:
            total += db.unsqueeze(1)
        return total.reshape(k, *wide.lead, total.shape[-1])

    def pull(
        self, cotangent: Tensor, needed: Sequence[bool], out: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """C W, c' x and the sum of c."""
        wide, casts = self.wide, self.casts
        k = len(cotangent)
        columns = cotangent.reshape(k, -1, cotangent.shape[-1])
        narrow = columns.to(casts.dtype)
        results: list[Tensor | None] = []
        for role, wanted, buffer in zip(wide.roles, needed, out, strict=True):
            if not wanted:
                results.append(None)
            elif role == "x":
                flat = narrow.reshape(-1, narrow.shape[-1]) @ casts(wide.weight)
                results.append(flat.to(cotangent.dtype).reshape(k, *wide.lead, -1))
            elif role == "weight":
                if buffer is None:
                    buffer = cotangent.new_empty(k, *wide.weight.shape)
                results.append(self._pull_weight(narrow, buffer))
            else:
                results.append(columns.sum(1))
        return results

    def _push_weight(self, dw: Tensor) -> Tensor:
        assert self.wide.x is not None
        x = self.casts(self.wide.x)
        if dw.numel() <= CHUNK:
            return torch.matmul(x, dw.to(x.dtype).mT).to(dw.dtype)
        total = dw.new_empty(len(dw), len(x), dw.shape[1])
        step = max(1, CHUNK // dw.shape[2])
        for weight, target in zip(dw, total, strict=True):
            for part, place in zip(weight.split(step), target.split(step, dim=1), strict=True):
                place.copy_(x @ part.to(x.dtype).mT)
        return total

    def _pull_weight(self, columns: Tensor, out: Tensor) -> Tensor:
        assert self.wide.x is not None
        x = self.casts(self.wide.x)
        if out.numel() <= CHUNK:
            return out.copy_(torch.matmul(columns.mT, x))
        step = max(1, CHUNK // out.shape[2])
        for column, target in zip(columns, out, strict=True):
            for part, place in zip(column.split(step, dim=1), target.split(step), strict=True):
                place.copy_(part.mT @ x)
        return out


class _NarrowConv(_NarrowNode):
    """A convolution by its own rule on rounded operands; the bias stays wide."""

    wide: ConvNode

    @property
    def _rounded(self) -> ConvNode:
        node = copy.copy(self.wide)
        node.x, node.weight = self.casts(node.x), self.casts(node.weight)
        return node

    def push(self, tangents: Tangents) -> Tensor:
        """conv(dx, W) + conv(x, dW) + db."""
        bias = [role == "bias" for role in self.wide.roles]
        moved = [
            None if t is None or is_bias else t.to(self.casts.dtype)
            for t, is_bias in zip(tangents, bias, strict=True)
        ]
        some = next(t for t in tangents if t is not None)
        total: Tensor | None = None
        if any(t is not None for t in moved):
            total = self._rounded.push(moved).to(some.dtype)
        alone = [t if is_bias else None for t, is_bias in zip(tangents, bias, strict=True)]
        if any(t is not None for t in alone):
            term = self.wide.push(alone)
            total = term if total is None else total + term
        assert total is not None
        return total

    def pull(
        self, cotangent: Tensor, needed: Sequence[bool], out: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The transposed convolution, the weight's correlation and the sum over positions."""
        roles = self.wide.roles
        bias = [need and role == "bias" for role, need in zip(roles, needed, strict=True)]
        rest = [need and role != "bias" for role, need in zip(roles, needed, strict=True)]
        results = self.wide.pull(cotangent, bias, out)
        if any(rest):
            rounded = self._rounded.pull(cotangent.to(self.casts.dtype), rest, out)
            for i, part in enumerate(rounded):
                if part is not None:
                    results[i] = part.to(cotangent.dtype)
        return results


def _twin_stage(stage: NetworkStage, casts: _Casts) -> NetworkStage:
    nodes = []
    for bound in stage.nodes:
        if isinstance(bound.node, LinearNode):
            bound = replace(bound, node=_NarrowLinear(bound.node, casts))
        elif isinstance(bound.node, ConvNode):
            bound = replace(bound, node=_NarrowConv(bound.node, casts))
        nodes.append(bound)
    return replace(stage, nodes=tuple(nodes))
