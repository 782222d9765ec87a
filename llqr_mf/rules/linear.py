"""`F.linear`: two GEMMs forward, two backward, and nothing of the weight's size besides."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Call, Curvature, Node, Scales, Slot, Tangents, plain, register
from .gram import Deltas, Outer, Rows, Term, outer_flops


class LinearNode(Node):
    """y = x W' + b, with x of shape (..., in) and W of shape (out, in)."""

    couples_batch: bool | None = False

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
        if self.samples is None:
            # A vector's entries may be samples.
            self.couples_batch = None
        self.flops = 2.0 * self.lead.numel() * self.weight.numel()

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

    def gram_flops(self, size: int) -> float:
        """Those of the weight's share."""
        positions = self.lead[1:].numel()
        return outer_flops(size, positions, *self.weight.shape) if self.x is not None else 0.0

    def respond_all(
        self,
        tangents: Tangents,
        cotangents: Sequence[Tensor | None],
        scales: Sequence[float | None],
    ) -> tuple[Tensor | None, ...]:
        """Dx W' + (a X X' + b 1 1') C: where rows are fewer than features, no dW is formed."""
        scale = dict(zip(self.roles, scales, strict=True))
        given = dict(zip(self.roles, tangents, strict=True))
        rows = self.lead.numel()
        (cotangent,) = cotangents
        wide = rows * sum(self.weight.shape) < 2 * self.weight.numel()
        moved = given.get("weight") is not None or given.get("bias") is not None
        moved = moved or scale.get("x") is not None
        by_weight, by_bias = scale.get("weight"), scale.get("bias")
        if cotangent is None or by_weight is None or moved or not wide:
            return super().respond_all(tangents, cotangents, scales)
        mixing = self.inner * by_weight
        if by_bias is not None:
            mixing += by_bias
        columns = cotangent.reshape(len(cotangent), rows, -1)
        dx = given.get("x")
        if dx is None:
            out = torch.matmul(mixing, columns)
        else:
            out = dx.reshape(-1, dx.shape[-1]) @ self.weight.mT
            out = out.reshape(columns.shape)
            torch.baddbmm(out, mixing.expand(len(columns), rows, rows), columns, out=out)
        return (out.reshape(cotangent.shape),)

    def add_pulled(
        self, cotangents: Sequence[Tensor | None], index: int, target: Tensor, scale: float
    ) -> None:
        """A weight takes scale * C' X in place."""
        (cotangent,) = cotangents
        if self.roles[index] != "weight" or self.x is None or cotangent is None:
            super().add_pulled(cotangents, index, target, scale)
        else:
            columns = cotangent[0].reshape(-1, cotangent.shape[-1])
            target.addmm_(columns.mT, self.x, alpha=scale)

    def reads_none_of(self, storages: Collection[int]) -> bool:
        """Whether the input is an activation: no product for the weight reads a weight."""
        return self.x is None or self.x.untyped_storage().data_ptr() not in storages

    def pulled_squares(self, cotangents: Sequence[Tensor | None], index: int) -> Tensor:
        """|C' X|^2 = <C C', X X'>, where rows are fewer than features."""
        (cotangent,) = cotangents
        rows = self.lead.numel()
        # Products in float64 take twice the time.
        wide = 2 * rows < min(self.weight.shape)
        if cotangent is None or self.x is None or self.roles[index] != "weight" or not wide:
            return super().pulled_squares(cotangents, index)
        columns = cotangent.reshape(len(cotangent), rows, -1).double()
        x = self.x.double()
        return (torch.matmul(columns, columns.mT) * (x @ x.mT)).sum((1, 2))

    @cached_property
    def inner(self) -> Tensor:
        """X X' (rows, rows)."""
        assert self.x is not None
        return self.x @ self.x.mT

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

    def gram_terms(self, deltas: Deltas, scales: Scales) -> list[Term] | None:
        """(X X') o (D D') for the weight, with a constant for the bias; design.md 2, fact 3."""
        given = dict(zip(self.roles, scales, strict=True))
        if given.get("x") is not None or self.samples is None:
            return super().gram_terms(deltas, scales)
        weight, bias = given.get("weight"), given.get("bias")
        values = deltas.values
        columns = values.reshape(*values.shape[:2], -1, values.shape[-1])
        if weight is None:
            return [] if bias is None else [Rows(columns.sum(2), bias)]
        assert self.x is not None
        x = self.x.reshape(self.samples, 1, -1, self.x.shape[-1])
        return [
            Outer(
                columns.unsqueeze(2),
                lambda part: deltas.select(x, part),
                x.shape[-1],
                weight,
                bias or 0.0,
            )
        ]


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
