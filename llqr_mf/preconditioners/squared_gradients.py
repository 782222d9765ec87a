"""The diagonal of the curvature in a basis: squares of per-sample gradients, summed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..output_sweep import (
    Read,
    mixed_values,
    output_columns,
    parameter_reads,
    pull_back,
    required_factor,
    seeded,
)
from ..problem import LQRProblem
from ..rules.conv import ConvNode
from ..rules.linear import LinearNode
from ..rules.norms import NormNode
from .blueprint import Blueprint
from .ekronecker import EKronecker
from .kronecker import times_sides
from .matrix_reads import ELEMENTS, MatrixRead, matrix_reads
from .probes import curvature_probes
from .sites import Site, sites

Bases = Mapping[str, Sequence[Tensor | None]]


@torch.no_grad()
def squared_gradients(
    problem: LQRProblem,
    structure: EKronecker | None = None,
    *,
    samples: int | None = None,
    probes: int = 64,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """diag(V'J'Q_T J V): the curvature, without damping, seen along every basis vector.

    With g_{n,j} the gradient of column j of sample n's factor of Q_T it is the sum over n and j of
    (V'g_{n,j})^2, the second moments of EKFAC (George et al. 2018). Exact for the weights and
    biases of Linear, Conv1d, Conv2d (of one group), Embedding and norm calls. A parameter that is
    read otherwise, or more than once, or from which samples interact on the way to the output
    (train-mode BatchNorm), gets the mean of (V'v)^2 over random-sign probes v (`curvature_probes`):
    unbiased, with a relative standard error of about (2 / probes)^(1/2) an entry.

    Args:
        problem: From a network, whose only cost beside R is at the output, with a known factor.
        structure: Whose bases V; None takes unit vectors.
        samples: None for all columns of the factor. k for k draws of random signs over the columns
            of every sample, an unbiased estimate in k backward passes: for large outputs.
        probes: How many, for the parameters above that have no closed form.
        generator: Of all signs, on the problem's device; None takes one of seed 0.

    Returns:
        By site name in the shape of its sides; without a structure, by parameter name in its shape.

    Raises:
        ValueError: The problem has no factor, or a number of draws is less than 1.
    """
    required_factor(problem, "squared gradients")
    blueprint = Blueprint.of(problem)
    if structure is None:
        chosen = sites(blueprint, biases="diagonal", kernels="matrix")
        bases: Bases = {site.name: [None] * len(site.sides) for site in chosen}
    else:
        chosen = structure.sites
        bases = {site.name: structure.bases(site) for site in chosen}
    source = seeded(problem, generator)
    made = site_squares(problem, chosen, bases, samples=samples, probes=probes, generator=source)
    if structure is not None:
        return made
    return {site.name: made[site.name].reshape(site.shape) for site in chosen}


def site_squares(
    problem: LQRProblem,
    chosen: Sequence[Site],
    bases: Bases,
    *,
    samples: int | None,
    probes: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """`squared_gradients` of some sites, in the shape of their sides."""
    factor = required_factor(problem, "squared gradients")
    proto = Blueprint.of(problem).proto
    mixed, reads = mixed_values(problem), parameter_reads(problem)
    made = {site.name: proto.new_zeros(site.sides) for site in chosen}
    by_call: dict[int, list[_VectorRead | _WeightRead]] = {}
    left: list[Site] = []
    for site in chosen:
        collector = _collector(site, reads, mixed, bases[site.name], made[site.name])
        if collector is not None:
            by_call.setdefault(id(collector.read.bound), []).append(collector)
        elif any(reads[name] for name in site.parameters):
            left.append(site)
    if by_call:
        for columns in output_columns(problem, factor, samples, generator):
            for bound, (cotangent,) in pull_back(problem, columns, by_call):
                assert cotangent is not None
                for each in by_call[id(bound)]:
                    each.add(cotangent)
    if left:
        for parts in probe_parts(problem, probes, generator):
            for site in left:
                turned = _turned(site.gather(parts), bases[site.name])
                made[site.name] += turned.square().sum(0) / probes
    return made


def _collector(
    site: Site,
    reads: dict[str, list[Read]],
    mixed: frozenset[int],
    bases: Sequence[Tensor | None],
    total: Tensor,
) -> _VectorRead | _WeightRead | None:
    """What sums the squares of a site exactly, or None."""
    own = reads[site.name]
    if any(len(reads[name]) != 1 for name in site.parameters):
        return None
    if not mixed.isdisjoint(own[0].bound.outputs):
        return None
    weights = matrix_reads(site, reads)
    if weights:
        return _WeightRead(weights[0], bases, total)
    node = own[0].bound.node
    of_norm = isinstance(node, NormNode) and own[0].role != "x"
    of_bias = isinstance(node, LinearNode | ConvNode) and own[0].role == "bias"
    if site.bias is None and (of_norm or of_bias):
        return _VectorRead(own[0], bases, total)
    return None


class _VectorRead:
    """A bias, or the weight of a norm: squares of sums over positions."""

    def __init__(self, read: Read, bases: Sequence[Tensor | None], total: Tensor) -> None:
        self.read, self.bases, self.total = read, bases, total

    def add(self, cotangent: Tensor) -> None:
        """Adds the columns of one pass, (c, N, *out)."""
        node = self.read.bound.node
        if isinstance(node, NormNode):
            rows = node.sample_gradients(cotangent, self.read.index)
        else:
            axis = 2 if isinstance(node, ConvNode) else cotangent.ndim - 1
            kept = cotangent.movedim(axis, -1)
            rows = kept.reshape(*kept.shape[:2], -1, kept.shape[-1]).sum(2)
        rows = rows.to(self.total).reshape(*rows.shape[:2], *self.total.shape)
        self.total += _turned(rows, self.bases).square().sum((0, 1))


class _WeightRead:
    """A weight: squares of rotated per-sample gradients sum_s delta_s a_s'."""

    def __init__(self, weight: MatrixRead, bases: Sequence[Tensor | None], total: Tensor) -> None:
        self.weight, self.read, self.site = weight, weight.read, weight.site
        self.bases, self.total = bases, total

    def add(self, cotangent: Tensor) -> None:
        """Adds the columns of one pass, (c, N, *out)."""
        weight = self.weight
        d = weight.deltas(cotangent, self.total.dtype)
        if weight.tokens is None:
            d = _turned(d, self.bases[:1])
            sides = self.site.sides[1:] if len(self.site.sides) > 1 else (weight.width,)
            for part in weight.parts(weight.positions * weight.width):
                a = weight.inputs(part, d.dtype)
                a = _turned(a.reshape(*a.shape[:2], *sides), self.bases[1:]).flatten(2)
                self.total += outer_squares(d[:, part], a).reshape(self.total.shape)
            return
        basis, *rest = self.bases
        d = _turned(d, rest)
        total = self.total.view(self.site.shape)
        if basis is None:
            _add_token_squares(d, weight.tokens, total)
        else:
            for part in weight.parts(weight.positions * len(basis)):
                total += outer_squares(d[:, part], basis[weight.tokens[part]]).mT


def outer_squares(d: Tensor, a: Tensor) -> Tensor:
    """Sum over c and n of (sum_s d_s a_s')^2, entry by entry.

    With one position that is the product of the squares; else per-sample gradients are formed,
    `ELEMENTS` at a time.

    Args:
        d: Shape (c, n, S, out).
        a: Shape (n, S, in).

    Returns:
        Tensor (out, in).
    """
    if a.shape[1] == 1:
        return d.square().sum(0)[:, 0].mT @ a[:, 0].square()
    positions, size = a.shape[1], d.shape[3] * a.shape[2]
    total = d.new_zeros(d.shape[3], a.shape[2])
    columns = max(1, min(len(d), ELEMENTS // size))
    rows = max(1, ELEMENTS // (columns * size))
    for some in d.split(columns):
        for dn, an in zip(some.split(rows, dim=1), a.split(rows), strict=True):
            # (n, S, c out)' (n, S, in), one GEMM for every sample.
            flat = dn.permute(1, 2, 0, 3).reshape(len(an), positions, -1)
            gradients = torch.bmm(flat.mT, an).square_()
            total += gradients.sum(0).reshape(-1, *total.shape).sum(0)
    return total


def _add_token_squares(d: Tensor, tokens: Tensor, total: Tensor) -> None:
    """Of unit vectors as inputs: d (c, n, S, out) is summed over each sample's equal tokens."""
    c, n, positions, out = d.shape
    owner = torch.arange(n, device=tokens.device).unsqueeze(1) * len(total)
    pairs, place = torch.unique((owner + tokens).reshape(-1), return_inverse=True)
    sums = d.new_zeros(c, len(pairs), out)
    sums.index_add_(1, place, d.reshape(c, n * positions, out))
    total.index_add_(0, pairs % len(total), sums.square().sum(0))


def _turned(x: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """V'x on the last axes of x, as many as there are bases; None is the identity."""
    if all(basis is None for basis in bases):
        return x
    lead = x.shape[: x.ndim - len(bases)]
    rows = x.reshape(-1, *x.shape[len(lead) :])
    turns = [None if basis is None else basis.mT for basis in bases]
    return times_sides(rows, turns).reshape(x.shape)


def probe_parts(
    problem: LQRProblem, count: int, generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """Random-sign probes by parameter name, (k, *shape) each, at most `ELEMENTS` at a time."""
    if count < 1:
        raise ValueError(f"probes is {count}: give at least 1.")
    proto = Blueprint.of(problem).proto
    step = max(1, ELEMENTS // problem.size)
    for start in range(0, count, step):
        rows = curvature_probes(problem, min(step, count - start), generator).to(proto)
        yield problem.layout.split_rows(rows)
