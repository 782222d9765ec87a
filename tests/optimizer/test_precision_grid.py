"""float32 and bfloat16 weights: every structure, metric and mode is finite and near float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from optimizer.cases import backward, batch, model, sgd, weights

import llqr_mf as lq
from llqr_mf.optimizer import Recipe

DAMPING = 0.1
STRUCTURES = ["ekronecker", "kronecker", "diagonal", "scalar", "low_rank"]
DRAWN = "fisher_mc"
METRICS = ["fisher", "gauss_newton", "empirical_fisher", "squared_error", "reverse_kl", DRAWN]
DTYPES = [torch.float32, torch.bfloat16]
# Every structure and every metric, and the pairs that fall to a dtype by turns.
GRID = [
    (dtype, structure, metric)
    for i, (structure, metric) in enumerate(product(STRUCTURES, METRICS))
    for j, dtype in enumerate(DTYPES)
    if (i + j) % 2 == 0 or structure == "ekronecker"
]


def made(dtype, wide, structure, metric, mode="base"):
    """A model with weights of one dtype, held in another that is as wide or wider."""
    net = model(dtype).to(wide)
    options = {"rank": 3} if structure == "low_rank" else {}
    recipe = Recipe(
        learn="cg" if structure == "low_rank" else "closed_form", damping=DAMPING, samples=None
    )
    base = sgd(net.parameters(), lr=0.05 if mode == "base" else 1.0)
    return net, lq.LLQR(
        *(net, base),
        loss="cross_entropy",
        metric=metric,
        structure=structure,
        recipe=recipe,
        refresh_every=2,
        step=mode,
        **options,
    )


def dense(optimizer):
    M = optimizer.structure
    return M.times_rows(torch.eye(M.shape[0], dtype=M.dtype)).double()


@pytest.mark.parametrize(("dtype", "structure", "metric"), GRID)
def test_m_is_near_that_of_float64(dtype, structure, metric):
    """Of the same numbers, to some ten roundings.

    An error of a share s in H is one of s |H| / damping in M, and |H| is about one here.
    """
    x, y = batch(dtype=dtype)
    (_, narrow), (_, wide) = (made(dtype, d, structure, metric) for d in (dtype, torch.float64))
    assert narrow.refresh(x, y) and wide.refresh(x.double(), y)
    assert narrow.structure.dtype == torch.float32
    found, wanted = dense(narrow), dense(wide)
    assert bool(found.isfinite().all()) and bool((found.diagonal() > 0).all())
    if metric == DRAWN or (structure == "low_rank" and dtype == torch.bfloat16):
        return  # other draws, and a fit that other gradients lead elsewhere
    share = float((found - wanted).norm() / wanted.norm())
    assert share < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("mode", ["base", "subspace"])
@pytest.mark.parametrize(("dtype", "structure", "metric"), GRID)
def test_training_stays_finite(dtype, structure, metric, mode):
    net, optimizer = made(dtype, dtype, structure, metric, mode)
    x, y = batch(dtype=dtype)
    before = float(backward(net, x, y).detach())
    for i in range(4):
        if mode == "subspace":
            optimizer.step(x, y)
            continue
        if optimizer.refresh_due:
            assert optimizer.refresh(*batch(seed=i, dtype=dtype)), optimizer.counts
        backward(net, x, y)
        optimizer.step()
    counts = optimizer.counts
    assert (counts.skipped, counts.refused) == (0, 0), counts
    assert counts.refreshes == 2
    assert weights(net).dtype == dtype and bool(weights(net).isfinite().all())
    # One draw a sample is a rough measure of how far to go.
    assert metric == DRAWN or float(backward(net, x, y).detach()) < before
