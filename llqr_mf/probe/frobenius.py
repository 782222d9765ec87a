"""The Frobenius norm of an operator known by its products."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..solvers.dots import row_dots
from .draws import Kind
from .estimate import Estimate, mean_estimate
from .hutchinson import default_columns, exact, over_unit_vectors
from .probed import Probeable, Probed, symmetric_operator
from .trace import check_products


@torch.no_grad()
def frobenius_norm(
    A: Probeable,
    *,
    products: int = 100,
    probes: Kind = "rademacher",
    seed: int = 0,
    columns: int | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate:
    """|A|_F, the root of the mean of |Az|^2, E zz' = I, with its standard error.

    value**2 is unbiased for |A|_F^2, with standard error 2 value standard_error (the delta method).
    value itself is low by standard_error^2 / (2 value) to second order; that is the `bias_bound`.
    The variance of |Az|^2 is 2 (|A^2|_F^2 - sum (A^2)_ii^2) for signs. Memory is that of a block
    of vectors and its product.

    Args:
        A: A symmetric operator or matrix, or a problem, whose Hessian (with R) is meant.
        products: Most vectors to multiply. From n on, unit vectors are taken instead: the norm is
            exact, with a standard error of zero.
        probes: "rademacher", "gaussian" or "spherical".
        seed: Of the vectors.
        columns: Vectors multiplied at once. None: as many as hold 2^24 numbers.
        progress: Whether to show a progress bar.
        checkpoint: A folder to keep finished products in and to go on from, or None.

    Returns:
        value and standard_error are scalars, float64.

    Raises:
        TypeError: A is none of these.
        ValueError: An option is unknown, products are too few for a standard error, or A is not
            square or symmetric.
    """
    size = symmetric_operator(A).shape[-1]
    check_products(products, 2, size, "frobenius_norm")
    probed = Probed(
        A,
        seed=seed,
        probes=probes,
        columns=default_columns(columns, size),
        progress=progress,
        checkpoint=checkpoint,
        header={"estimator": "frobenius_norm", "products": products},
    )
    if products >= size:
        squares = over_unit_vectors(probed, lambda _, Ae: row_dots(Ae, Ae))
        return exact(probed, squares.sum().sqrt())

    def square(z: Tensor) -> tuple[Tensor]:
        image = probed.times(z)
        return (row_dots(image, image),)

    (samples,) = probed.map(products, square)
    mean = mean_estimate(samples.cpu(), products=products, seed=seed, method="hutchinson")
    value = mean.value.sqrt()
    error = torch.where(value > 0, mean.standard_error / (2 * value), mean.standard_error)
    return Estimate(
        value,
        error,
        mean.samples,
        probed.products,
        seed,
        mean.method,
        bias_bound=torch.where(value > 0, error**2 / (2 * value), 0.0),
    )
