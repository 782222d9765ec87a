"""R: the cost of the controls, one number or operator per group of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from linear_operator import LinearOperator
from torch import Tensor

from .apply import apply_rows, inverse_operator


@dataclass(frozen=True)
class ControlCost:
    """1/2 u' R u with R block diagonal over groups of control blocks.

    Args:
        groups: Pairs (blocks, R): the ids of the blocks the group spans, in flat order, and a
            number (times the identity) or an operator on their concatenation.
        sizes: Length of every block.
    """

    groups: tuple[tuple[tuple[int, ...], float | LinearOperator], ...]
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        """The numbers, and of operators what kind they are."""
        if self.uniform is not None:
            return f"{self.uniform:g} I"
        kinds = [v if isinstance(v, float) else type(v).__name__ for _, v in self.groups]
        named = [f"{kind:g} I" if isinstance(kind, float) else kind for kind in kinds]
        return f"({', '.join(named[:4])}{', ...' if len(named) > 4 else ''})"

    @staticmethod
    def scalar(value: float, sizes: Sequence[int]) -> ControlCost:
        """R = value * I."""
        return ControlCost(((tuple(range(len(sizes))), float(value)),), tuple(sizes))

    def add_product(self, u: Tensor, out: Tensor, *, in_place: bool) -> Tensor:
        """Out + R u for rows of shape (k, P)."""
        uniform = self.uniform
        if uniform is not None:
            if uniform == 0:
                return out
            return out.add_(u, alpha=uniform) if in_place else out + uniform * u
        return out.add_(self._map(u)) if in_place else out + self._map(u)

    def product(self, u: Tensor) -> Tensor:
        """R u for rows of shape (k, P)."""
        return u * self.uniform if self.uniform is not None else self._map(u)

    def inverse_product(self, v: Tensor) -> Tensor:
        """R^{-1} v for rows of shape (k, P).

        Raises:
            ValueError: R is not positive definite.
        """
        return self._inverse.product(v)

    @cached_property
    def _inverse(self) -> ControlCost:
        groups = tuple(
            (blocks, _inverted(value) if any(self.sizes[i] for i in blocks) else value)
            for blocks, value in self.groups
        )
        return ControlCost(groups, self.sizes)

    @property
    def uniform(self) -> float | None:
        """The number c when R = c I, else None."""
        values = {value for _, value in self.groups if not isinstance(value, LinearOperator)}
        if len(values) != 1 or any(isinstance(value, LinearOperator) for _, value in self.groups):
            return None
        return next(iter(values))

    @property
    def block_values(self) -> tuple[float, ...] | None:
        """The number of every block when all are numbers, else None."""
        if any(isinstance(value, LinearOperator) for _, value in self.groups):
            return None
        values = {i: value for blocks, value in self.groups for i in blocks}
        return tuple(values[i] for i in range(len(self.sizes)))

    def restrict(self, blocks: Sequence[int]) -> ControlCost:
        """R on some of the blocks, renumbered in the order given.

        Raises:
            ValueError: A group with one operator spans blocks inside and outside of the choice.
        """
        place = {block: i for i, block in enumerate(blocks)}
        groups: list[tuple[tuple[int, ...], float | LinearOperator]] = []
        for members, value in self.groups:
            inside = tuple(place[i] for i in members if i in place)
            if not inside:
                continue
            if isinstance(value, LinearOperator) and (
                len(inside) < len(members) or list(inside) != sorted(inside)
            ):
                raise ValueError(
                    "the control cost couples several layers in one operator, so it has no R_t: "
                    "give one operator per layer, or solve with method='cg'."
                )
            groups.append((inside, value))
        return ControlCost(tuple(groups), tuple(self.sizes[i] for i in blocks))

    def inverse(self) -> ControlCost:
        """R^{-1}; raises as `inverse_product` does."""
        return self._inverse

    def diagonal(self, proto: Tensor) -> Tensor:
        """The diagonal of R, shape (P,)."""
        out = proto.new_empty(sum(self.sizes))
        parts = list(out.split(self.sizes)) if self.sizes else []
        for blocks, value in self.groups:
            if isinstance(value, LinearOperator):
                sizes = [self.sizes[i] for i in blocks]
                for i, piece in zip(blocks, value.diagonal().split(sizes), strict=True):
                    parts[i].copy_(piece)
            else:
                for i in blocks:
                    parts[i].fill_(value)
        return out

    def _map(self, u: Tensor) -> Tensor:
        parts = list(u.split(self.sizes, dim=1))
        for blocks, value in self.groups:
            if isinstance(value, LinearOperator):
                joined = torch.cat([parts[i] for i in blocks], dim=1)
                product = apply_rows(value, joined)
                pieces = product.split([self.sizes[i] for i in blocks], dim=1)
            else:
                pieces = tuple(parts[i] * value for i in blocks)
            for i, piece in zip(blocks, pieces, strict=True):
                parts[i] = piece
        return torch.cat(parts, dim=1) if parts else u


def _inverted(value: float | LinearOperator) -> float | LinearOperator:
    if isinstance(value, LinearOperator):
        return inverse_operator(value)
    if value <= 0:
        raise ValueError(
            "this method needs R^{-1}: give damping > 0 on every layer, or use method='cg'."
        )
    return 1.0 / value
