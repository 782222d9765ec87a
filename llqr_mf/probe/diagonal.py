"""The diagonal of an operator known by its products."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from tqdm import tqdm

from ..solvers.dots import pieces, row_dots
from .draws import Kind
from .estimate import Estimate
from .hutchinson import default_columns, exact, over_unit_vectors
from .probed import Probeable, Probed, symmetric_operator
from .trace import check_products
from .xdiag import xdiag

LEAST = {"xdiag": 4, "hutchinson": 2}


@torch.no_grad()
def diagonal(
    A: Probeable,
    *,
    products: int = 100,
    method: str = "xdiag",
    probes: Kind = "rademacher",
    seed: int = 0,
    columns: int | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate:
    """An unbiased estimate of diag(A), every entry with its standard error.

    "xdiag" is better where the spectrum decays and holds 1.5 vectors per product; "hutchinson"
    holds three, whatever `products`. An entry's error with "hutchinson" is the norm of its row
    without the diagonal, over sqrt(products).

    Args:
        A: A symmetric operator or matrix, or a problem, whose Hessian (with R) is meant.
        products: Most vectors to multiply. From n on, the diagonal is read off n unit vectors
            instead: it is exact, with standard errors of zero.
        method: "xdiag" or "hutchinson".
        probes: "rademacher", "gaussian" or "spherical".
        seed: Of the vectors.
        columns: Vectors multiplied at once. None: as many as hold 2^24 numbers.
        progress: Whether to show a progress bar.
        checkpoint: A folder to keep finished products in and to go on from, or None.

    Returns:
        value and standard_error have shape (n,), float64.

    Raises:
        TypeError: A is none of these.
        ValueError: An option is unknown, products are too few for a standard error, or A is not
            square or symmetric.
    """
    if method not in LEAST:
        raise ValueError(f"method={method!r}: choose {', '.join(map(repr, LEAST))}.")
    size = symmetric_operator(A).shape[-1]
    check_products(products, LEAST[method], size, f"{method=}")
    probed = Probed(
        A,
        seed=seed,
        probes=probes,
        columns=default_columns(columns, size),
        progress=progress,
        checkpoint=checkpoint,
        header={"estimator": "diagonal", "method": method, "products": products},
    )
    if products >= size:
        return exact(probed, over_unit_vectors(probed, row_dots))
    return (xdiag if method == "xdiag" else _hutchinson)(probed, products)


def _hutchinson(probed: Probed, products: int) -> Estimate:
    """Sum of z o Az over the sum of z o z, entry by entry (Bekas, Kokiopoulou and Saad 2007, (2)).

    The ratio is the least-squares slope d of the entries y of Az on those x of z, through zero:
    y = a_ii x + noise of equal variance. That gives its standard error,
    sqrt(sum (y - d x)^2 / (m - 1) / sum x^2), which for signs is the samples' deviation over
    sqrt(m), and for normals has exactly Student's t.
    """
    name = "probes"
    kept = probed.journal.get(name)
    sums = torch.zeros(3, probed.size, dtype=torch.float64, device=probed.proto.device)
    done = 0
    if kept is not None:
        sums, done = kept[0].to(sums.device), int(kept[1])
        probed.times.vectors += done
    with tqdm(total=products, initial=done, desc=name, disable=not probed.progress) as bar:
        while done < products:
            chunk = range(done, min(done + (probed.columns or products), products))
            z = probed.draw(chunk)
            _add(sums, z, probed.times(z))
            done = chunk.stop
            probed.journal.put(name, (sums, torch.tensor(done)))
            bar.update(len(chunk))
    slope, square, rest = sums
    error = (rest / (products - 1) / square).sqrt_()
    return Estimate(slope, error, products, probed.products, probed.seed, method="hutchinson")


def _add(sums: Tensor, z: Tensor, product: Tensor) -> None:
    """Adds vectors to the slope, the sum of x^2 and the residual sum of squares; in place."""
    tiny = torch.finfo(torch.float64).tiny
    for rows, images, (slope, square, rest) in pieces(z, product, sums):
        for x, y in zip(rows.double(), images.double(), strict=True):
            miss = y - slope * x
            more = square + x * x
            share = more.clamp(min=tiny).reciprocal_()
            rest += miss * miss * square * share
            slope += x * miss * share
            square.copy_(more)
