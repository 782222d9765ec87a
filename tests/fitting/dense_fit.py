"""The objective of a fit by dense algebra: T_v column by column, and H written out."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import lsq_linear
from small_models import mlp, normal
from torch import Tensor

import llqr_mf as lq
from llqr_mf.fitting.rows import probe_rows
from llqr_mf.preconditioners import Structure
from llqr_mf.preconditioners.chart import Chart

LAYERS = lq.split(mlp(3, 4, 3))
"""P = 31."""


def problem(seed: int, *, samples: int = 6, damping: float = 0.1, **options) -> lq.LQRProblem:
    """A batch of its own, at the same weights."""
    x = normal(samples, 3, seed=seed)
    y = torch.arange(samples) * (seed + 2) % 3
    options = {"loss": "cross_entropy", "damping": damping, **options}
    return lq.LQRProblem.from_network(LAYERS, x, y, **options)


def rows_of(problems, probes="gradients", count=None, isotropic=0.0) -> list[Tensor]:
    """Rows whose sum of objectives is the mean that `fit` minimises."""
    return probe_rows(problems, probes, count=count, isotropic=isotropic, generator=None)


def objective(M: Structure | Tensor, problems, rows) -> float:
    """J(M), with M written out."""
    dense = M if isinstance(M, Tensor) else M.to_dense()
    total = 0.0
    for each, v in zip(problems, rows, strict=True):
        x = v @ dense.mT
        total += float(((x @ each.hessian.to_dense()) * x).sum() / 2 - (v * x).sum())
    return total


def normal_equations(chart: Chart, problems, rows) -> tuple[Tensor, Tensor]:
    """Sum T_v'H T_v and sum T_v'(v - H rest(v))."""
    units = torch.eye(len(chart.get()), dtype=rows[0].dtype)
    A = torch.zeros_like(units)
    b = torch.zeros(len(units), dtype=units.dtype)
    for each, block in zip(problems, rows, strict=True):
        H = each.hessian.to_dense()
        for v in block.split(1):
            T = torch.cat([chart.times(unit, v) for unit in units]).mT
            A += T.mT @ H @ T
            b += T.mT @ (v[0] - H @ chart.rest(v)[0])
    return A, b


def least_squares_above(A: Tensor, b: Tensor, lower: float) -> Tensor:
    """The minimiser of 1/2 x'Ax - b'x over x >= lower, by SciPy's active sets."""
    L = torch.linalg.cholesky(A)
    right = torch.linalg.solve_triangular(L, b.unsqueeze(1), upper=False).squeeze(1)
    found = lsq_linear(
        L.mT.numpy(), right.numpy(), bounds=(lower, np.inf), method="bvls", tol=1e-14
    )
    assert found.success
    return torch.from_numpy(found.x)
