"""The estimator of Girard and Hutchinson, and the exact sum over unit vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..solvers.dots import row_dots
from .estimate import Estimate, mean_estimate
from .probed import Probed

BLOCK_ELEMENTS = 2**24
"""Numbers in a block of vectors where the caller sets no `columns`."""


class GivenVectors(Probed):
    """The same operator, count and journal, with other vectors in place of the random ones.

    Args:
        probed: What is probed.
        vectors: Gives the vectors of a range of numbers; shape (k, n).
    """

    def __init__(self, probed: Probed, vectors: Callable[[range], Tensor]) -> None:
        self.__dict__.update(probed.__dict__)
        self.vectors = vectors

    def draw(self, indices: range) -> Tensor:
        """The given rows (k, n) by number."""
        return self.vectors(indices)


def default_columns(columns: int | None, size: int) -> int:
    """`columns`, or as many vectors of that size as a block holds, where it is None."""
    return max(1, BLOCK_ELEMENTS // size) if columns is None else columns


def hutchinson(probed: Probed, products: int) -> Estimate:
    """The trace as the mean of z'Az, E zz' = I (Girard 1989; Hutchinson 1990).

    Its variance is 2 (|A|_F^2 - sum a_ii^2) / products for signs, 2 |A|_F^2 / products for
    normals, and 2 n / (n + 2) (|A|_F^2 - tr(A)^2 / n) / products on the sphere. The samples are
    independent, so that the standard error is their deviation over sqrt(products). Memory is that
    of a block of vectors and its product.
    """

    def forms(z: Tensor) -> tuple[Tensor]:
        return (row_dots(z, probed.times(z)),)

    (samples,) = probed.map(products, forms)
    return mean_estimate(
        samples.cpu(), products=probed.products, seed=probed.seed, method="hutchinson"
    )


def over_unit_vectors(probed: Probed, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A function of e_i and A e_i for all i; rows (k, n), (k, n) to (k,), all of it to (n,).

    It costs n products.
    """

    def unit(indices: range) -> Tensor:
        rows = torch.zeros(
            len(indices), probed.size, dtype=probed.proto.dtype, device=probed.proto.device
        )
        rows[torch.arange(len(indices)), torch.arange(indices.start, indices.stop)] = 1
        return rows

    def both(e: Tensor) -> tuple[Tensor]:
        return (function(e, probed.times(e)),)

    (values,) = GivenVectors(probed, unit).map(probed.size, both, name="unit vectors")
    return values


def exact(probed: Probed, value: Tensor) -> Estimate:
    """What unit vectors gave: no error but rounding."""
    return Estimate(
        value,
        torch.zeros_like(value),
        probed.size,
        probed.products,
        probed.seed,
        method="exact",
    )
