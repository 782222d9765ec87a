"""The dual's Gram matrix in closed form: one backward pass per output, and products of samples.

Rows and columns have the index j N + n, for column j of sample n's factor of Q_T.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .network.linearize import BoundNode
from .operators.output_curvature import OutputCurvature
from .output_sweep import PASS, factor_columns, pull_back, samples_are_apart, terminal_factor
from .problem import LQRProblem
from .rules.base import Scales
from .rules.gram import Deltas, Term, mirror


@torch.no_grad()
def closed_form_gram(problem: LQRProblem) -> Tensor | None:
    """G = L'J R^{-1} J'L of a network, or None where it has no closed form.

    Column j of every sample's factor is pulled back for all samples at once, which is right when
    samples do not interact. Each parametrised call then gives the inner products of its per-sample
    gradients; a Linear layer's cost N r (N r + width) and never see its weight.

    Args:
        problem: From a network, with a terminal cost that has a factor, and numbers as damping.

    Returns:
        Tensor (r N, r N). None if samples interact (train-mode BatchNorm), a parameter is read
        twice, damping is an operator, or a call's gradients are too large.
    """
    found = _closed_form(problem)
    if found is None:
        return None
    factor, damping = found
    made = _grams(problem, factor, [dict(enumerate(1 / value for value in damping))])
    return None if made is None else made[0]


@torch.no_grad()
def grams_of_groups(problem: LQRProblem, groups: Sequence[Collection[int]]) -> list[Tensor] | None:
    """G_t = L'J_t J_t'L of every group t of parameters, R left out: they add up to G at R = I.

    One backward pass for all of them.

    Args:
        problem: From a network, with a terminal cost that has a factor.
        groups: Ids of parameters.

    Returns:
        Tensors (r N, r N), or None as `closed_form_gram`.
    """
    factor = terminal_factor(problem)
    if problem.origin is None or factor is None or not samples_are_apart(problem):
        return None
    return _grams(problem, factor, [dict.fromkeys(group, 1.0) for group in groups])


def _grams(
    problem: LQRProblem, factor: OutputCurvature, groups: Sequence[Mapping[int, float]]
) -> list[Tensor] | None:
    """Gram matrices of groups of parameters, each with a factor, or None."""
    deltas = torch.cat(list(_columns(problem, factor)))
    rank, samples = deltas.shape[:2]
    dtype = _gram_dtype(problem, deltas)
    totals = [deltas.new_zeros(rank, samples, rank, samples, dtype=dtype) for _ in groups]
    for bound, (cotangents,) in pull_back(problem, deltas):
        assert cotangents is not None
        for total, group in zip(totals, groups, strict=True):
            scales = [group.get(i) for i in bound.inputs]
            if any(scales) and not bound.node.add_gram(total, cotangents, scales):
                return None
    for total in totals:
        mirror(total)
    return [total.reshape(rank * samples, rank * samples) for total in totals]


@torch.no_grad()
def cross_gram(problem: LQRProblem, chosen: Tensor) -> Tensor | None:
    """Columns G[:, chosen], for a `Nystrom` preconditioner: G itself is never made.

    The chosen columns are pulled back first, and what arrives at every call that reads a parameter
    is kept: m times the width of its output. All columns then pass by, a few at a time.

    Args:
        problem: As of `closed_form_gram`.
        chosen: Indices j N + n, shape (m,); any order.

    Returns:
        Tensor (r N, m), or None as `closed_form_gram`.

    Raises:
        ValueError: `chosen` is no vector of whole numbers from 0 to r N - 1.
    """
    found = _closed_form(problem)
    if found is None:
        return None
    factor, damping = found
    assert factor.rank is not None
    rank, samples = factor.rank, factor.samples
    whole = chosen.ndim == 1 and not (chosen.is_floating_point() or chosen.is_complex())
    if not whole or bool(((chosen < 0) | (chosen >= rank * samples)).any()):
        raise ValueError(
            f"chosen has shape {tuple(chosen.shape)} and dtype {chosen.dtype}: give a vector of "
            f"whole numbers j N + n from 0 to {rank * samples - 1}."
        )
    chosen = chosen.to(problem.device, torch.int64)
    none = factor.factor_columns(0, 0)
    dtype = _gram_dtype(problem, none)
    total = none.new_zeros(rank, samples, 1, len(chosen), dtype=dtype)
    if not len(chosen):
        return total.reshape(rank * samples, 0)
    kept = _chosen_terms(problem, factor, damping, chosen)
    if kept is None:
        return None
    start = 0
    for columns in _columns(problem, factor):
        rows = slice(start, start + len(columns))
        start = rows.stop
        for bound, (cotangents,) in pull_back(problem, columns):
            assert cotangents is not None
            deltas = Deltas(cotangents, samples)
            terms = bound.node.gram_terms(deltas, scales_of(bound, damping))
            if terms is None:
                return None
            for term, other in zip(terms, kept[id(bound)], strict=True):
                term.add(total[rows], other, half=False)
    return total.reshape(rank * samples, len(chosen))


@torch.no_grad()
def gram_diagonal(problem: LQRProblem) -> Tensor | None:
    """diag(G), shape (r N,), or None as `closed_form_gram`."""
    found = _closed_form(problem)
    if found is None:
        return None
    factor, damping = found
    made: list[Tensor] = []
    for columns in _columns(problem, factor):
        squares = columns.new_zeros(columns.shape[:2], dtype=_gram_dtype(problem, columns))
        for bound, (cotangents,) in pull_back(problem, columns):
            assert cotangents is not None
            deltas = Deltas(cotangents, factor.samples)
            terms = bound.node.gram_terms(deltas, scales_of(bound, damping))
            if terms is None:
                return None
            for term in terms:
                squares += term.squares()
        made.append(squares)
    return torch.cat(made).flatten()


def _closed_form(problem: LQRProblem) -> tuple[OutputCurvature, tuple[float, ...]] | None:
    """The factor and the damping of every parameter, where G has a closed form."""
    damping = problem.system.control_cost.block_values
    factor = terminal_factor(problem)
    if problem.origin is None or damping is None or factor is None:
        return None
    if min(damping) <= 0 or not samples_are_apart(problem):
        return None
    return factor, tuple(damping)


def _gram_dtype(problem: LQRProblem, columns: Tensor) -> torch.dtype:
    """The wider of the weights' and the outputs': a model may change it on its way."""
    return torch.promote_types(problem.dtype, columns.dtype)


def _columns(problem: LQRProblem, factor: OutputCurvature) -> Iterator[Tensor]:
    """Columns of the factor, a few at a time: (c, *output)."""
    assert problem.origin is not None
    for columns in factor_columns(factor, problem._columns or PASS):
        yield columns.reshape(len(columns), *problem.origin.outputs.shape)


def scales_of(bound: BoundNode, damping: tuple[float, ...]) -> Scales:
    """What R^{-1} is for each input of a call that is a parameter; None for others."""
    return [1 / damping[i] if i < len(damping) else None for i in bound.inputs]


def _chosen_terms(
    problem: LQRProblem, factor: OutputCurvature, damping: tuple[float, ...], chosen: Tensor
) -> dict[int, list[Term]] | None:
    """Gradients of chosen pairs of a column and a sample, by the `id` of the call.

    Pairs of different samples share a row of cotangents: there are as many rows as pairs of one
    sample at most.
    """
    assert problem.origin is not None and factor.rank is not None
    samples, shape = factor.samples, problem.origin.outputs.shape
    owners, columns = chosen % samples, chosen // samples
    order = owners.argsort(stable=True)
    counts = owners.bincount(minlength=samples)
    row = torch.empty_like(owners)
    row[order] = torch.arange(len(owners), device=owners.device)
    row -= (counts.cumsum(0) - counts)[owners]
    kept: dict[int, Tensor] = {}
    nodes: dict[int, BoundNode] = {}
    per_pass = problem._columns or PASS
    for start in range(0, int(counts.max()), per_pass):
        here = ((row >= start) & (row < start + per_pass)).nonzero()[:, 0]
        size = 1 + int(row[here].max()) - start
        z = factor.factor_columns(0, 0).new_zeros(size, factor.rank, samples)
        z[row[here] - start, columns[here], owners[here]] = 1
        packed = factor.factor(z).reshape(size, *shape)
        for bound, (cotangents,) in pull_back(problem, packed):
            assert cotangents is not None
            if id(bound) not in kept:
                nodes[id(bound)] = bound
                kept[id(bound)] = cotangents.new_zeros(len(chosen), *cotangents.shape[2:])
            kept[id(bound)][here] = cotangents[row[here] - start, owners[here]]
    made: dict[int, list[Term]] = {}
    for key, bound in nodes.items():
        deltas = Deltas(kept[key].unsqueeze(0), samples, owners)
        terms = bound.node.gram_terms(deltas, scales_of(bound, damping))
        if terms is None:
            return None
        made[key] = terms
    return made
