"""Tangent kernels between batches, lazy or in closed form.

Rows and columns stand in the order of the flattened outputs, index n D + c for output c of sample
n: the output is the fastest index, as in a `MultitaskMultivariateNormal` with interleaved=True.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..gram import scales_of
from ..network.linearize import BoundNode
from ..operators.base import MatrixFreeOperator
from ..operators.cross_kernel import CrossKernelOperator
from ..output_sweep import calls, pull_back, samples_are_apart
from ..problem import LQRProblem
from ..rules.gram import Deltas, mirror
from .checks import check_current
from .linearised import output_width, unit_columns

PULLED_ELEMENTS = 2**26
"""Numbers of a call's cotangents held at a time, for each of the two batches."""

BLOCK_SAMPLES = 16
"""Samples whose kernel is made at once where only its diagonal blocks are wanted."""

Columns = Callable[[int, int], Tensor]
"""Columns start to stop of the output, (stop - start, *output)."""


@dataclass(frozen=True, eq=False)
class Side:
    """A linearised batch and the columns of its output that are pulled back.

    Args:
        problem: Of the batch.
        count: Columns in all, r: one row of cotangents for all samples each.
        columns: Makes some of them; None takes the unit vectors of the output.
    """

    problem: LQRProblem
    count: int
    columns: Columns

    @staticmethod
    def of_outputs(problem: LQRProblem) -> Side:
        """The outputs themselves."""

        def columns(start: int, stop: int) -> Tensor:
            return unit_columns(problem, start, stop)

        return Side(problem, output_width(problem), columns)

    @property
    def samples(self) -> int:
        """N."""
        assert self.problem.origin is not None
        return len(self.problem.origin.outputs)

    def parts(self) -> Iterator[slice]:
        """Columns that are pulled back together."""
        assert self.problem.origin is not None
        shapes = self.problem.origin.linearization.shapes.values()
        # Weights are larger than activations, and are never pulled back to.
        moving = [math.prod(s) for s in shapes if s[:1] == (self.samples,)]
        step = max(1, PULLED_ELEMENTS // max([1, *moving]))
        for start in range(0, self.count, step):
            yield slice(start, min(start + step, self.count))


def kernel(problem1: LQRProblem, problem2: LQRProblem | None = None) -> MatrixFreeOperator:
    """K12 = J1 R^{-1} J2' as a lazy operator, (n_T of 1, n_T of 2).

    Args:
        problem1: Of the first batch.
        problem2: Of the second, of the same network; its R counts. None takes the first again,
            whose `tangent_kernel` this is.

    Raises:
        ValueError: The problems are of other networks, or R is not positive definite.
        RuntimeError: The weights or a batch changed since.
    """
    check_current(problem1)
    if problem2 is None or problem2 is problem1:
        return problem1.tangent_kernel
    check_current(problem2)
    check_same_network(problem1, problem2)
    columns = min(problem1._columns, problem2._columns)
    proto = problem2.system.proto
    return CrossKernelOperator(
        proto, first=problem1.system, second=problem2.system, columns=columns
    )


@torch.no_grad()
def kernel_matrix(problem1: LQRProblem, problem2: LQRProblem | None = None) -> Tensor:
    """The dense K12, in closed form where samples are apart and R is numbers, else by products.

    Memory: the matrix twice at most, and the cotangents of one call at a time.

    Args:
        problem1: As in `kernel`.
        problem2: Likewise.

    Returns:
        Tensor (N1 D, N2 D).

    Raises:
        ValueError: As in `kernel`.
    """
    lazy = kernel(problem1, problem2)
    found = closed_form_kernel(problem1, problem1 if problem2 is None else problem2)
    return lazy.to_dense() if found is None else found


@torch.no_grad()
def closed_form_kernel(problem1: LQRProblem, problem2: LQRProblem) -> Tensor | None:
    """`kernel_matrix` in closed form, or None where there is none."""
    left = Side.of_outputs(problem1)
    right = left if problem2 is problem1 else Side.of_outputs(problem2)
    total = paired_gram(left, right)
    return None if total is None else by_samples(total)


def by_samples(total: Tensor) -> Tensor:
    """(r, N, q, M) to a matrix (N r, M q), columns of a sample next to each other."""
    r, n, q, m = total.shape
    return total.permute(1, 0, 3, 2).reshape(n * r, m * q)


@torch.no_grad()
def paired_gram(left: Side, right: Side) -> Tensor | None:
    """Inner products of the per-sample gradients of two batches, weighted by R^{-1} of the second.

    Both batches are pulled back side by side, and what arrives at a call is paired and dropped.

    Args:
        left: The first batch.
        right: The second, of the same network; the same object for a symmetric matrix, of which
            half is made.

    Returns:
        Tensor (r, N, q, M), or None where samples are not apart, R is not numbers, or a call's
        gradients are too large.
    """
    for problem in (left.problem, right.problem):
        check_current(problem)
    damping = closed_form_damping(left, right)
    if damping is None:
        return None
    same = left is right
    total = right.problem.system.proto.new_zeros(
        left.count, left.samples, right.count, right.samples
    )
    for js in left.parts():
        for ks in right.parts():
            # The half n >= m of a symmetric matrix needs every pair of columns.
            if not _add_part(total[js, :, ks], left, right, js, ks, damping, half=same):
                return None
    if same:
        mirror(total)
    return total


def closed_form_damping(left: Side, right: Side) -> tuple[float, ...] | None:
    """The second's R, where it is positive numbers and the samples of both batches are apart."""
    damping = right.problem.system.control_cost.block_values
    if damping is None or min(damping) <= 0 or not samples_are_apart(left.problem):
        return None
    same = left.problem is right.problem
    return damping if same or samples_are_apart(right.problem) else None


@torch.no_grad()
def output_blocks(problem: LQRProblem) -> Tensor | None:
    """K's diagonal blocks, the kernel of every sample with itself; (N, D, D) or None."""
    check_current(problem)
    side = Side.of_outputs(problem)
    damping = closed_form_damping(side, side)
    if damping is None:
        return None
    width, samples = side.count, side.samples
    blocks = problem.system.proto.new_zeros(width, width, samples)
    for js in side.parts():
        for ks in side.parts():
            for bounds, cotangents in _pairs(side, side, js, ks):
                if width == 1:
                    terms = _terms(bounds[0], cotangents[0], damping, samples, None)
                    if terms is None:
                        return None
                    for term in terms:
                        blocks[0, 0] += term.squares()[0]
                elif not _add_blocks(blocks[js, ks], bounds, cotangents, damping, samples):
                    return None
    return blocks.permute(2, 0, 1)


@torch.no_grad()
def output_squares(problem: LQRProblem) -> Tensor | None:
    """K's diagonal, (N D,), or None as `paired_gram`."""
    check_current(problem)
    side = Side.of_outputs(problem)
    damping = closed_form_damping(side, side)
    if damping is None:
        return None
    squares = problem.system.proto.new_zeros(side.count, side.samples)
    for js in side.parts():
        for bound, (cotangents,) in pull_back(problem, side.columns(js.start, js.stop)):
            assert cotangents is not None
            terms = _terms(bound, cotangents, damping, side.samples, None)
            if terms is None:
                return None
            for term in terms:
                squares[js] += term.squares()
    return squares.mT.flatten()


def check_same_network(problem1: LQRProblem, problem2: LQRProblem) -> None:
    """Raises a ValueError unless both were made from one network."""
    for problem in (problem1, problem2):
        if problem.origin is None:
            raise ValueError(
                "a kernel between two batches needs problems made from a network by from_network."
            )
    assert problem1.origin is not None and problem2.origin is not None
    one, two = (p.origin.layers[0].program.model for p in (problem1, problem2) if p.origin)
    if one is not two or problem1.names != problem2.names:
        raise ValueError(
            "the two problems are of different models: make both from the layers of one "
            "split(model)."
        )


def _add_part(
    total: Tensor,
    left: Side,
    right: Side,
    js: slice,
    ks: slice,
    damping: tuple[float, ...],
    *,
    half: bool,
) -> bool:
    """Adds the block of columns js and ks; False where a call's gradients are too large."""
    # A term is its own mirror image only where both columns are the same ones.
    itself = left is right and js == ks
    for (one, two), (a, b) in _pairs(left, right, js, ks):
        first = _terms(one, a, damping, left.samples, None)
        second = first if itself else _terms(two, b, damping, right.samples, None)
        if first is None or second is None:
            return False
        for term, other in zip(first, second, strict=True):
            term.add(total, other, half=half and itself)
    return True


def _add_blocks(
    blocks: Tensor,
    bounds: tuple[BoundNode, BoundNode],
    cotangents: tuple[Tensor, Tensor],
    damping: tuple[float, ...],
    samples: int,
) -> bool:
    """Adds the products of a sample with itself to (|js|, |ks|, N)."""
    a, b = cotangents
    for start in range(0, samples, BLOCK_SAMPLES):
        chosen = torch.arange(start, min(start + BLOCK_SAMPLES, samples), device=a.device)
        first = _terms(bounds[0], a[:, chosen], damping, samples, chosen)
        second = _terms(bounds[1], b[:, chosen], damping, samples, chosen)
        if first is None or second is None:
            return False
        square = blocks.new_zeros(len(a), len(chosen), len(b), len(chosen))
        for term, other in zip(first, second, strict=True):
            term.add(square, other, half=False)
        blocks[:, :, chosen] += square.diagonal(dim1=1, dim2=3)
    return True


def _pairs(
    left: Side, right: Side, js: slice, ks: slice
) -> Iterator[tuple[tuple[BoundNode, BoundNode], tuple[Tensor, Tensor]]]:
    """The same call of both batches and what arrives at it, last call first."""
    place1, place2 = (
        {id(bound): place for place, bound in enumerate(calls(side.problem))}
        for side in (left, right)
    )
    first = pull_back(left.problem, left.columns(js.start, js.stop))
    if left is right and js == ks:
        for bound, (a,) in first:
            assert a is not None
            yield (bound, bound), (a, a)
        return
    second = pull_back(right.problem, right.columns(ks.start, ks.stop))
    for (one, (a,)), (two, (b,)) in zip(first, second, strict=True):
        assert a is not None and b is not None and place1[id(one)] == place2[id(two)]
        yield (one, two), (a, b)


def _terms(
    bound: BoundNode,
    cotangents: Tensor,
    damping: tuple[float, ...],
    samples: int,
    chosen: Tensor | None,
) -> list | None:  # type: ignore[type-arg]
    return bound.node.gram_terms(Deltas(cotangents, samples, chosen), scales_of(bound, damping))
