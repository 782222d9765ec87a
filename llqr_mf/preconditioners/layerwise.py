"""The exact inverse of each layer's block of H: what there is without cross-layer curvature."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..methods.base import Problem
from ..operators import HessianBlockOperator
from ..problem import LQRProblem
from ..solvers.cg import cg
from ..solvers.status import Code
from .base import Parts, Structure
from .spd import spd_logdet

DENSE_BLOCK = 4096
"""Largest block whose log-determinant is taken from the dense matrix."""


class LayerBlocks(Structure):
    """The blocks H_tt of a problem's Hessian (damping included), one per layer; lazy.

    A parameter that enters at several layers counts to the first of them; its block has all its
    uses. It is fixed and has no state.

    Args:
        problem: Whose Hessian.
        groups: Patterns of parameter names (`Layout.select`), one for each block, that cover every
            parameter once; None takes the layers.
        rtol: Tolerance of the CGs of the inverse, relative and layer by layer.
        max_iterations: Their limit; None takes `solvers.krylov.default_iterations`.

    Raises:
        TypeError: The problem has no layers at hand.
        ValueError: The groups leave a parameter out, or have it twice.
    """

    kind = "layer_blocks"

    def __init__(
        self,
        problem: LQRProblem,
        *,
        groups: Sequence[str | Sequence[str]] | None = None,
        rtol: float = 1e-6,
        max_iterations: int | None = None,
    ) -> None:
        if not isinstance(problem, LQRProblem):
            raise TypeError(
                f"layer by layer needs an LQRProblem, not a {type(problem).__name__}: make one "
                "from a batch."
            )
        super().__init__(problem)
        self.problem, self.groups = problem, groups
        self.rtol, self.max_iterations = rtol, max_iterations
        chosen = layer_blocks(problem) if groups is None else grouped_blocks(problem, groups)
        self.blocks = tuple(problem._block(mine, mine) for mine in chosen)
        self._places = [problem.layout.places(mine).to(problem.device) for mine in chosen]

    def _times_block(self, block: HessianBlockOperator, v: Tensor) -> Tensor:
        return block.times_rows(v)

    def _rows(self, v: Tensor) -> Tensor:
        out = torch.empty_like(v)
        for block, place in zip(self.blocks, self._places, strict=True):
            out[:, place] = self._times_block(block, v[:, place])
        return out

    def times_parts(self, parts: Mapping[str, Tensor]) -> Parts:
        """The product of every layer."""
        return self.split(self._rows(self.join(parts, next(iter(parts.values())))))

    def inverse(self) -> Structure:
        """The solve with every block."""
        return Layerwise(self.problem, **self._options())

    @torch.no_grad()
    def logdet(self) -> Tensor:
        """The sum over layers, from dense blocks.

        Raises:
            NotImplementedError: A layer has more than `DENSE_BLOCK` parameters.
        """
        largest = max(len(place) for place in self._places)
        if largest > DENSE_BLOCK:
            raise NotImplementedError(
                f"a layer has {largest} parameters and the log-determinant needs its dense block, "
                f"{DENSE_BLOCK} at most: estimate it from `problem.hessian` instead."
            )
        parts = [spd_logdet(block.to_dense(), "a block of H") for block in self.blocks]
        return torch.stack(parts).sum()

    def scale_(self, c: float) -> None:
        """Refused.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(f"{type(self).__name__} is fixed: multiply its products.")

    def blend_(self, other: LayerBlocks, weight: float) -> None:
        """Refused.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is a problem's and cannot be averaged: make it anew."
        )

    def _options(self) -> dict[str, Any]:
        return {
            "groups": self.groups,
            "rtol": self.rtol,
            "max_iterations": self.max_iterations,
        }

    def assign_(self, other: LayerBlocks) -> None:
        """Takes over the problem of another."""
        self.check_alike(other)
        self.__dict__.update(other.__dict__)


class Layerwise(LayerBlocks):
    """M = blockdiag(H_tt)^{-1}, each product one CG per layer: the layerwise second-order step.

    Exact but for the terms across layers, so it shows what those are worth. An iteration costs a
    product with the whole H per layer: a baseline for comparisons, not for training.

    Args:
        problem: Whose Hessian.
        groups: As of `LayerBlocks`.
        rtol: Tolerance of the CGs, relative and layer by layer.
        max_iterations: Their limit; None takes `solvers.krylov.default_iterations`.

    Raises:
        TypeError: The problem has no layers at hand.
        ValueError: The groups leave a parameter out, or have it twice.
    """

    kind = "layerwise"

    def _times_block(self, block: HessianBlockOperator, v: Tensor) -> Tensor:
        result = cg(block, v.mT, rtol=self.rtol, max_iterations=self.max_iterations)
        code = result.status.code
        if code in (Code.NEGATIVE_CURVATURE, Code.NOT_FINITE):
            raise ValueError(f"a layer's block of H has no inverse: {result.status}")
        if code is Code.MAX_ITERATIONS:
            worst = float(result.residual_norm.max())
            warnings.warn(
                f"a layer's solve has a relative residual of {worst:.1e}: {result.status}",
                RuntimeWarning,
                stacklevel=2,
            )
        return result.x.mT

    def inverse(self) -> Structure:
        """The blocks H_tt themselves."""
        return LayerBlocks(self.problem, **self._options())

    def logdet(self) -> Tensor:
        """Minus that of the blocks; raises as `LayerBlocks.logdet`."""
        return -super().logdet()


def layer_blocks(problem: Problem) -> list[tuple[int, ...]]:
    """Ids of the parameters of every layer that has some, each in one layer."""
    left = set(range(len(problem.layout.names)))
    made = []
    for owned in (*problem.owned, range(len(problem.layout.names))):
        mine = tuple(i for i in dict.fromkeys(owned) if i in left)
        left.difference_update(mine)
        if mine:
            made.append(mine)
    return made


def grouped_blocks(
    problem: Problem, groups: Sequence[str | Sequence[str]]
) -> list[tuple[int, ...]]:
    """Ids of the parameters of every group.

    Raises:
        ValueError: The groups leave a parameter out, or have it twice.
    """
    made = [problem.layout.select(patterns) for patterns in groups]
    taken = [i for mine in made for i in mine]
    odd = [name for i, name in enumerate(problem.layout.names) if taken.count(i) != 1]
    if odd:
        raise ValueError(
            f"groups must have every parameter once: {odd[:4]} are left out or come twice."
        )
    return made
