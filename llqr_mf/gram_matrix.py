"""The dual's Gram matrix, or a sketch of it: which way it is come by."""

from __future__ import annotations

import torch
from torch import Tensor

from . import factors
from .gram import closed_form_gram, cross_gram, gram_diagonal
from .operators.output_curvature import OutputCurvature
from .problem import LQRProblem
from .solvers.dual import gram_by_products
from .solvers.nystrom import Nystrom, diagonal_choice

NYSTROM_COLUMNS = 1024
"""Most columns of a sketch of the Gram matrix that is too large."""

GRAM_BY_PRODUCTS = 1024
"""Largest N r whose Gram matrix is formed by products when it has no closed form."""


def gram_matrix(problem: LQRProblem, factor: OutputCurvature) -> tuple[Tensor | None, str]:
    """G = L'J R^{-1} J'L where it pays, and how it was come by."""
    size = (factor.rank or 0) * factor.samples
    gram = closed_form_gram(problem) if size <= factors.DUAL_SIZE else None
    if gram is not None:
        return gram, "Gram matrix in closed form"
    if size <= GRAM_BY_PRODUCTS:
        return gram_by_products(problem.system, factor), "Gram matrix by products"
    return None, ""


def sketch_columns(size: int) -> int:
    """Columns of a sketch of a Gram matrix of `size` rows."""
    return min(NYSTROM_COLUMNS, size // 8)


def nystrom_sketch(problem: LQRProblem, factor: OutputCurvature) -> tuple[Nystrom | None, str]:
    """A preconditioner from some columns of G, where they have a closed form."""
    how = "without a Gram matrix (N r is too large): matrix-free dual CG"
    count = sketch_columns((factor.rank or 0) * factor.samples)
    diagonal = gram_diagonal(problem) if count else None
    if diagonal is None:
        return None, how
    generator = torch.Generator(problem.device).manual_seed(0)
    chosen = diagonal_choice(diagonal, count, generator)
    columns = cross_gram(problem, chosen)
    if columns is None or not len(chosen):
        return None, how
    return Nystrom.of(columns, chosen), f"{how} with a Nystrom sketch of {len(chosen)} columns"
