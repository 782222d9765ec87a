"""`F.linear`: two GEMMs forward, two backward, and nothing of the weight's size besides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Call, Curvature, Node, Slot, Tangents, plain, register
from .gram import outer_gram, row_gram


class LinearNode(Node):
    """y = x W' + b, with x of shape (..., in) and W of shape (out, in)."""

    couples_batch = False

    def __init__(self, call: Call, x: Any, weight: Any, bias: Any) -> None:
        named = {"x": x, "weight": weight, "bias": bias}
        self.roles = [role for role, value in named.items() if isinstance(value, Slot)]
        super().__init__(call.evaluate(), [named[role] for role in self.roles])
        self.weight: Tensor = plain(weight)
        value = plain(x)
        self.lead = value.shape[:-1]
        # Only the weight's products read the input.
        self.x = value.reshape(-1, value.shape[-1]) if "weight" in self.roles else None
        self.samples = value.shape[0] if value.ndim > 1 else None

    def push(self, tangents: Tangents) -> Tensor:
        """Dx W' + x dW' + db."""
        given = dict(zip(self.roles, tangents, strict=True))
        dx, dw, db = (given.get(role) for role in ("x", "weight", "bias"))
        k = next(len(t) for t in tangents if t is not None)
        out = _bias_and_weight(self.x, dw, db)
        if dx is not None:
            flat = dx.reshape(-1, dx.shape[-1])
            if out is None:
                out = flat @ self.weight.mT
            else:
                rows = len(flat) // k
                base = out.expand(k, rows, -1).reshape(len(flat), -1)
                out = torch.addmm(base, flat, self.weight.mT)
        assert out is not None
        rows = self.lead.numel()
        if out.numel() != k * rows * out.shape[-1]:
            out = out.expand(k, rows, -1)
        return out.reshape(k, *self.lead, out.shape[-1])

    def pull(
        self, cotangent: Tensor, needed: Sequence[bool], out: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """C W, c' x and the sum of c."""
        k = len(cotangent)
        columns = cotangent.reshape(k, -1, cotangent.shape[-1])
        results: list[Tensor | None] = []
        for role, wanted, buffer in zip(self.roles, needed, out, strict=True):
            if not wanted:
                results.append(None)
            elif role == "x":
                flat = columns.reshape(-1, columns.shape[-1]) @ self.weight
                results.append(flat.reshape(k, *self.lead, -1))
            elif role == "weight":
                assert self.x is not None
                results.append(weight_cotangent(columns, self.x, buffer))
            elif buffer is not None:
                results.append(torch.sum(columns, 1, out=buffer))
            else:
                results.append(columns.sum(1))
        return results

    def curvature(self, costate: Tensor) -> Curvature | None:
        """<p, x W'> is bilinear: p dW for x, p' dx for W."""
        if not {"x", "weight"} <= set(self.roles):
            return None
        p = costate.reshape(-1, costate.shape[-1])

        def product(tangents: Tangents) -> list[Tensor | None]:
            given = dict(zip(self.roles, tangents, strict=True))
            dx, dw = given["x"], given["weight"]
            made = {
                "x": None
                if dw is None
                else torch.matmul(p, dw).reshape(len(dw), *self.lead, dw.shape[-1]),
                "weight": None
                if dx is None
                else torch.matmul(p.mT, dx.reshape(len(dx), -1, dx.shape[-1])),
            }
            return [made.get(role) for role in self.roles]

        return product

    def gram(self, deltas: Tensor, index: int) -> Tensor | None:
        """(X X') o (D D') for the weight; design.md section 2, fact 3."""
        if self.roles[index] == "x" or self.samples is None:
            return super().gram(deltas, index)
        r, n = deltas.shape[:2]
        columns = deltas.reshape(r, n, -1, deltas.shape[-1])
        if self.roles[index] == "bias":
            return row_gram(columns.sum(2).reshape(r * n, -1))
        assert self.x is not None
        return outer_gram(self.x.reshape(n, -1, self.x.shape[-1]), columns)


def _bias_and_weight(x: Tensor | None, dw: Tensor | None, db: Tensor | None) -> Tensor | None:
    """X dW' + db, shape (k, rows, out), or (k, 1, out) when only the bias moves."""
    if dw is None:
        return None if db is None else db.unsqueeze(1)
    assert x is not None
    if len(dw) == 1:
        product = x @ dw[0].mT if db is None else torch.addmm(db[0], x, dw[0].mT)
        return product.unsqueeze(0)
    product = torch.matmul(x, dw.mT)
    return product if db is None else product + db.unsqueeze(1)


def weight_cotangent(columns: Tensor, x: Tensor, buffer: Tensor | None) -> Tensor:
    """C' x per column, (k, rows, out) and (rows, in) to (k, out, in), into the buffer if given."""
    if buffer is None:
        return torch.matmul(columns.mT, x)
    for column, target in zip(columns, buffer, strict=True):
        torch.mm(column.mT, x, out=target)
    return buffer


@register(F.linear)
def linear(call: Call) -> Node | None:
    """Rule of `F.linear(input, weight, bias=None)`."""
    x, weight = call.argument(0, "input"), call.argument(1, "weight")
    if plain(weight).ndim != 2:
        return None
    return LinearNode(call, x, weight, call.argument(2, "bias"))
