"""The trace of an operator known by its products."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..solvers.dots import row_dots
from .draws import Kind
from .estimate import Estimate
from .hutchinson import default_columns, exact, hutchinson, over_unit_vectors
from .hutchpp import hutchpp
from .probed import Probeable, Probed, symmetric_operator
from .xnystrace import xnystrace
from .xtrace import xtrace


class _Method(NamedTuple):
    """An estimator, the distribution it is best with, and the fewest products it can tell from."""

    estimate: Callable[[Probed, int], Estimate]
    probes: Kind
    least: int


METHODS = {
    "hutchinson": _Method(hutchinson, "rademacher", 2),
    "hutch++": _Method(hutchpp, "rademacher", 4),
    "xtrace": _Method(xtrace, "spherical", 4),
    "xnystrace": _Method(xnystrace, "spherical", 2),
}


@torch.no_grad()
def trace(
    A: Probeable,
    *,
    products: int = 100,
    method: str = "xtrace",
    probes: Kind | None = None,
    seed: int = 0,
    columns: int | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate:
    """An unbiased estimate of tr(A) from products with random vectors, with its standard error.

    "xtrace" is right for most operators. "xnystrace" is better on positive semi-definite ones.
    "hutch++" is between these and "hutchinson", which is as good where the spectrum is flat and
    holds no vectors besides a block: take it where memory is short.

    Intervals of 95 % held the trace in 90 to 97 % of 200 runs of 20 and 36 products, for every
    method on six spectra and three Gauss-Newton Hessians; 90 % where few eigenvalues dominate and
    the samples are far from normal.

    The standard error is of sampling alone. Rounding in the operator's products comes on top, and
    is what is left where the spectrum decays fast: about the dtype's epsilon times |A|_F, times
    sqrt(n products) for "xnystrace".

    Args:
        A: A symmetric operator or matrix, or a problem, whose Hessian (with R) is meant.
        products: Most vectors to multiply. From n on, the trace is summed over n unit vectors
            instead, whatever the method: it is exact, with a standard error of zero.
        method: "hutchinson", "hutch++", "xtrace" or "xnystrace".
        probes: "rademacher", "gaussian" or "spherical". None: the best for the method, which is
            "spherical" for the two X's and "rademacher" for the others.
        seed: Of the vectors. The same seed gives the same vectors, whatever `columns`.
        columns: Vectors multiplied at once. None: as many as hold 2^24 numbers.
        progress: Whether to show a progress bar.
        checkpoint: A folder to keep finished products in and to go on from, or None.

    Returns:
        value and standard_error are scalars, float64.

    Raises:
        TypeError: A is none of these.
        ValueError: An option is unknown, products are too few for a standard error, A is not
            square or symmetric, or A is indefinite and the method is "xnystrace".
    """
    if method not in METHODS:
        choices = ", ".join(map(repr, METHODS))
        raise ValueError(f"method={method!r}: choose {choices}.")
    size = symmetric_operator(A).shape[-1]
    chosen = METHODS[method]
    check_products(products, chosen.least, size, f"{method=}")
    probed = Probed(
        A,
        seed=seed,
        probes=chosen.probes if probes is None else probes,
        columns=default_columns(columns, size),
        progress=progress,
        checkpoint=checkpoint,
        header={"estimator": "trace", "method": method, "products": products},
    )
    if products >= size:
        return exact(probed, over_unit_vectors(probed, row_dots).sum())
    return chosen.estimate(probed, products)


def check_products(products: int, least: int, size: int, what: str) -> None:
    """Raises a ValueError where a method has no standard error."""
    if products < min(least, size):
        raise ValueError(
            f"products={products} is too few for {what} to give a standard error: "
            f"give at least {min(least, size)}."
        )
