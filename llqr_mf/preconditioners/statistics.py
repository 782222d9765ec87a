"""Second moments of layer inputs and output gradients: the factors of K-FAC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..output_sweep import output_columns, parameter_reads, pull_back, required_factor
from ..problem import LQRProblem
from .blueprint import Blueprint
from .ekronecker import EKronecker
from .kronecker import Kronecker
from .matrix_reads import MatrixRead, matrix_reads
from .moments import normalised, trace
from .sites import Site, side_moments, sites

Sharing = Literal["expand", "reduce"]


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """The curvature of one weight as a Kronecker product, row-major: about S_0 (x) S_1 (x) ...

    Args:
        site: The weight, with its bias as one more input where that is joined.
        sides: One factor per side of the site, symmetric positive semidefinite (n, n), or its
            diagonal (n,) where the site takes no matrix.
        output_side: Which side is the layer's output: 0, or 1 for an embedding.
    """

    site: Site
    sides: tuple[Tensor, ...]
    output_side: int

    @property
    def outputs(self) -> Tensor:
        """G, of the gradients at the layer's output."""
        return self.sides[self.output_side]

    @property
    def inputs(self) -> Tensor:
        """A, of the layer's inputs (of a convolution kept as a tensor, of its channels)."""
        return self.sides[1 - self.output_side]


@torch.no_grad()
def layer_factors(
    problem: LQRProblem,
    structure: Kronecker | EKronecker | None = None,
    *,
    sharing: Sharing = "expand",
    samples: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, LayerFactors]:
    """Kronecker factors of J'Q_T J for every weight that is a matrix on its inputs.

    These are the weights of Linear, Conv1d, Conv2d (of one group) and Embedding calls. With a the
    inputs of a position, N samples, S positions per sample and delta the gradient at the layer's
    output of a column of Q_T's factor (which carries the 1/N of the mean), the block of a
    weight (out, in), row-major, is about G (x) A with

        expand    A = 1/N sum_{n,s} a a',  G = 1/S sum_{j,n,s} delta delta'
        reduce    A = 1/N sum_n m m', m = 1/S sum_s a,  G = sum_{j,n} d d', d = sum_s delta

    (Martens and Grosse 2015; Grosse and Martens 2016; Eschenhagen et al. 2023). For S = 1 the two
    are the same. An embedding's inputs are unit vectors, so its A is diagonal, the tokens'
    frequencies, by "expand" either way. A convolution kept as a tensor (out, in, kernel) has the
    two partial traces of A, divided by the trace once.

    A weight that is read several times is the sum of its reads' blocks, as positions are in
    "expand": their products between reads are left out. The factors given are those with the
    partial traces of that sum.

    Where samples interact (train-mode BatchNorm), every column is pulled back for all samples at
    once all the same, as every K-FAC does. Then G holds products between samples that the
    curvature does not have, and random signs (`samples`) make their mean vanish: prefer them.

    Args:
        problem: From a network, whose only cost beside R is at the output, with a known factor.
        structure: Whose sites; None takes matrices on every side that is no vocabulary, biases
            joined.
        sharing: "expand" or "reduce", where a weight is applied at several positions.
        samples: None for all columns of the factor: the exact Fisher or Gauss-Newton factors. k for
            k draws of random signs over the columns of every sample, an unbiased estimate of G
            in k backward passes: for large outputs.
        generator: Of the signs, on the problem's device; None takes one of seed 0.

    Returns:
        By weight name; weights that are read otherwise, and vectors, are left out.

    Raises:
        ValueError: The problem has no factor, an option is none of those named, or with "reduce" a
            layer's first axis is not the batch.
    """
    factor = required_factor(problem, "layer factors")
    if sharing not in ("expand", "reduce"):
        raise ValueError(f"sharing is {sharing!r}: choose 'expand' or 'reduce'.")
    blueprint = Blueprint.of(problem)
    if structure is None:
        largest = sum(blueprint.layout.sizes) + 1
        chosen = sites(blueprint, biases="joined", kernels="matrix", max_side=largest)
    else:
        chosen = structure.sites
    reads = parameter_reads(problem)
    moments: dict[str, list[_Moments]] = {}
    for site in chosen:
        found = matrix_reads(site, reads) if len(site.sides) > 1 else []
        if found:
            moments[site.name] = [
                _Moments(read, factor.samples, sharing, blueprint.proto) for read in found
            ]
    by_call = {id(each.read.read.bound): each for made in moments.values() for each in made}
    for columns in output_columns(problem, factor, samples, generator):
        for bound, (cotangent,) in pull_back(problem, columns, by_call):
            assert cotangent is not None
            by_call[id(bound)].add(cotangent)
    return {name: _merged(made) for name, made in moments.items()}


class _Moments:
    """The factors of one read: A at once, G as columns come in."""

    def __init__(self, read: MatrixRead, samples: int, sharing: Sharing, proto: Tensor) -> None:
        self.read, self.site, self.samples, self.dtype = read, read.site, samples, proto.dtype
        self.reduced = sharing == "reduce" and read.tokens is None and read.positions > 1
        if self.reduced and read.rows != samples:
            raise ValueError(
                f"the first axis of {read.read.bound.name}, which reads '{self.site.name}', has "
                f"{read.rows} rows for {samples} samples: use sharing='expand'."
            )
        self.output_side = 0 if read.tokens is None else 1
        n, full = self.site.sides[self.output_side], self.site.full[self.output_side]
        self.outputs = proto.new_zeros((n, n) if full else (n,))
        self.inputs = self._tokens() if self.output_side else self._inputs()

    def _tokens(self) -> list[Tensor]:
        frequencies = self.read.token_counts().to(self.outputs) / self.samples
        return [frequencies.diag() if self.site.full[0] else frequencies]

    def _inputs(self) -> list[Tensor]:
        sizes, full = self.site.sides[1:], self.site.full[1:]
        pairs = zip(sizes, full, strict=True)
        made = [self.outputs.new_zeros((n, n) if matrix else (n,)) for n, matrix in pairs]
        for part in self.read.parts(self.read.positions * self.read.width):
            a = self.read.inputs(part, self.dtype)
            a = a.mean(1) if self.reduced else a.flatten(0, 1)
            for side, total in enumerate(made):
                flat = a.reshape(-1, *sizes)
                total += side_moments(flat, flat, side, full=total.ndim == 2) / self.samples
        return normalised(made)

    def add(self, cotangent: Tensor) -> None:
        """Adds the columns of one pass, (c, *out)."""
        deltas = self.read.deltas(cotangent, self.dtype)
        d = deltas.sum(2) if self.reduced else deltas
        d = d.reshape(-1, d.shape[-1])
        total = side_moments(d, d, 0, full=self.outputs.ndim == 2)
        share = 1.0 if self.reduced else self.samples / (self.read.rows * self.read.positions)
        self.outputs += share * total

    @property
    def sides(self) -> list[Tensor]:
        """In the order of the site's."""
        return [*self.inputs, self.outputs] if self.output_side else [self.outputs, *self.inputs]


def _merged(made: Sequence[_Moments]) -> LayerFactors:
    """The factors of a sum of Kronecker products: those with its partial traces."""
    site, output_side = made[0].site, min(each.output_side for each in made)
    if len(made) == 1:
        return LayerFactors(site, tuple(made[0].sides), output_side)
    totals: list[Tensor] = []
    for side in range(len(site.sides)):
        shares = []
        for each in made:
            rest = [trace(f) for i, f in enumerate(each.sides) if i != side]
            shares.append(each.sides[side] * math.prod(rest))
        totals.append(torch.stack(shares).sum(0))
    return LayerFactors(site, tuple(normalised(totals)), output_side)
