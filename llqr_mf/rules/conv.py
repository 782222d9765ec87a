"""`F.conv1d`, `conv2d`, `conv3d`: columns fold into the batch or into the channels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Call, Curvature, Node, Scales, Slot, Tangents, plain, register
from .gram import Deltas, Outer, Rows, Term, outer_flops


class ConvNode(Node):
    """y = conv(x, W) + b, with x of shape (N, in, ...) and W of shape (out, in / groups, ...)."""

    couples_batch = False

    def __init__(self, call: Call, parts: dict[str, Any], geometry: dict[str, Any]) -> None:
        self.roles = [role for role, value in parts.items() if isinstance(value, Slot)]
        super().__init__(call.evaluate(), [parts[role] for role in self.roles])
        self.x: Tensor = plain(parts["x"])
        self.weight: Tensor = plain(parts["weight"])
        self.shape = self.result.shape
        self.geometry = geometry
        self.function = call.function
        positions = self.result.numel() // self.result.shape[1]
        self.flops = 2.0 * positions * self.weight.numel()

    def push(self, tangents: Tangents) -> Tensor:
        """conv(dx, W) + conv(x, dW) + db."""
        given = dict(zip(self.roles, tangents, strict=True))
        dx, dw, db = (given.get(role) for role in ("x", "weight", "bias"))
        k = next(len(t) for t in tangents if t is not None)
        total: Tensor | None = None
        if dx is not None:
            flat = self._conv(dx.reshape(-1, *dx.shape[2:]), self.weight)
            total = flat.reshape(k, -1, *flat.shape[1:])
        if dw is not None:
            term = self._conv_weights(dw)
            total = term if total is None else total + term
        if db is not None:
            term = db.reshape(k, 1, -1, *(1,) * (self.x.ndim - 2))
            total = term.expand(k, *self.shape) if total is None else total + term
        assert total is not None
        return total

    def pull(
        self, cotangent: Tensor, needed: Sequence[bool], out: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The transposed convolution, the weight's correlation and the sum over positions."""
        results: list[Tensor | None] = []
        for role, wanted in zip(self.roles, needed, strict=True):
            if not wanted:
                results.append(None)
            elif role == "x":
                k, n = cotangent.shape[:2]
                # Only the shape of the input is read here.
                x = self.x if k == 1 else self.x[:1].expand(k * n, *self.x.shape[1:])
                flat = self._pull_x(cotangent.reshape(k * n, *cotangent.shape[2:]), x, self.weight)
                results.append(flat.reshape(k, n, *flat.shape[1:]))
            elif role == "weight":
                results.append(self._pull_weights(cotangent))
            else:
                results.append(cotangent.sum([1, *range(3, cotangent.ndim)]))
        return results

    def curvature(self, costate: Tensor) -> Curvature | None:
        """<p, conv(x, W)> is bilinear."""
        if not {"x", "weight"} <= set(self.roles):
            return None

        def product(tangents: Tangents) -> list[Tensor | None]:
            given = dict(zip(self.roles, tangents, strict=True))
            dx, dw = given["x"], given["weight"]
            made: dict[str, Tensor | None] = {}
            if dw is not None:
                made["x"] = torch.stack([self._pull_x(costate, self.x, w) for w in dw.unbind()])
            if dx is not None:
                made["weight"] = torch.stack(
                    [self._pull_weight(costate, x, self.weight) for x in dx.unbind()]
                )
            return [made.get(role) for role in self.roles]

        return product

    def reads_none_of(self, storages: Collection[int]) -> bool:
        """Whether the input is an activation: no product for the weight reads a weight."""
        return self.x.untyped_storage().data_ptr() not in storages

    def gram_flops(self, size: int) -> float:
        """Those of the weight's share."""
        positions = self.shape[2:].numel()
        return outer_flops(size, positions, len(self.weight), self.weight[0].numel())

    def gram_terms(self, deltas: Deltas, scales: Scales) -> list[Term] | None:
        """A convolution is a Linear on patches, in groups and summed over positions."""
        given = dict(zip(self.roles, scales, strict=True))
        weight, bias = given.get("weight"), given.get("bias")
        if given.get("x") is not None or (weight is not None and self.x.ndim > 4):
            return super().gram_terms(deltas, scales)
        columns = deltas.values.flatten(3)
        if weight is None:
            return [] if bias is None else [Rows(columns.sum(-1), bias)]
        groups = self.geometry["groups"]

        def patches(part: slice) -> Tensor:
            return self._unfolded(deltas.select(self.x, part)).unflatten(1, (groups, -1)).mT

        width = self.weight[0].numel()
        grouped = columns.unflatten(2, (groups, -1)).mT
        return [Outer(grouped, patches, width, weight, bias or 0.0)]

    @property
    def is_matrix(self) -> bool:
        """Whether `patches` can be formed: one group, at most two spatial axes."""
        return bool(self.geometry["groups"] == 1) and self.x.ndim <= 4

    def patches(self, samples: slice = slice(None)) -> Tensor | None:
        """Inputs of every position, (N, S, in * kernel), if `is_matrix`.

        Args:
            samples: Of which samples.
        """
        if not self.is_matrix:
            return None
        return self._unfolded(self.x[samples]).mT

    def _unfolded(self, x: Tensor) -> Tensor:
        """The patches of inputs with one or two spatial axes, (n, in * kernel, S)."""
        spatial = x.ndim - 2

        def pair(value: Sequence[int], filler: int) -> tuple[int, ...]:
            return tuple(value) if spatial == 2 else (filler, *value)

        return F.unfold(
            x if spatial == 2 else x.unsqueeze(2),
            pair(self.weight.shape[2:], 1),
            dilation=pair(self.geometry["dilation"], 1),
            padding=pair(self.geometry["padding"], 0),
            stride=pair(self.geometry["stride"], 1),
        )

    def _conv(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.function(x, weight, None, **self.geometry)

    def _conv_weights(self, dw: Tensor) -> Tensor:
        k = len(dw)
        if self.geometry["groups"] > 1:
            return torch.stack([self._conv(self.x, w) for w in dw.unbind()])
        stacked = self._conv(self.x, dw.reshape(-1, *dw.shape[2:]))
        return stacked.reshape(len(stacked), k, -1, *stacked.shape[2:]).movedim(1, 0)

    def _pull_weights(self, cotangent: Tensor) -> Tensor:
        k = len(cotangent)
        if k == 1 or self.geometry["groups"] > 1:
            parts = [self._pull_weight(c, self.x, self.weight) for c in cotangent.unbind()]
            return parts[0].unsqueeze(0) if k == 1 else torch.stack(parts)
        stacked = cotangent.movedim(0, 1).flatten(1, 2)
        shape = (k * self.weight.shape[0], *self.weight.shape[1:])
        flat = self._pull_weight(stacked, self.x, self.weight[:1].expand(shape))
        return flat.reshape(k, *self.weight.shape)

    def _pull_x(self, c: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(c, x, weight, [True, False, False])[0]

    def _pull_weight(self, c: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(c, x, weight, [False, True, False])[1]

    def _backward(self, c: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> Any:
        g = self.geometry
        transposed, output_padding = False, [0] * len(g["stride"])
        return torch.ops.aten.convolution_backward(
            *(c, x, weight, None, g["stride"], g["padding"], g["dilation"]),
            *(transposed, output_padding, g["groups"], mask),
        )


@register(F.conv1d, F.conv2d, F.conv3d)
def conv(call: Call) -> Node | None:
    """Rule of `F.convNd(input, weight, bias, stride, padding, dilation, groups)`."""
    parts = {
        "x": call.argument(0, "input"),
        "weight": call.argument(1, "weight"),
        "bias": call.argument(2, "bias"),
    }
    spatial = plain(parts["weight"]).ndim - 2
    padding = call.argument(4, "padding", 0)
    if plain(parts["x"]).ndim != spatial + 2 or isinstance(padding, str):
        return None

    def listed(value: Any) -> list[int]:
        return [value] * spatial if isinstance(value, int) else list(value)

    geometry = {
        "stride": listed(call.argument(3, "stride", 1)),
        "padding": listed(padding),
        "dilation": listed(call.argument(5, "dilation", 1)),
        "groups": call.argument(6, "groups", 1),
    }
    return ConvNode(call, parts, geometry)
