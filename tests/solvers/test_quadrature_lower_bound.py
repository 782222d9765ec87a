"""A `lower` that is no bound of the spectrum is refused, wherever above its least it lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from llqr_mf.solvers.quadrature import bracket, tridiagonalize
from small_models import normal
from torch import Tensor

import llqr_mf as lq

LEAST, TOP, SIZE = 0.5, 3.0, 12


def operator(dtype: torch.dtype = torch.float64) -> Tensor:
    q = torch.linalg.qr(normal(SIZE, SIZE))[0]
    made = q @ torch.linspace(LEAST, TOP, SIZE, dtype=q.dtype).diag() @ q.mT
    return ((made + made.mT) / 2).to(dtype)


ESTIMATES: dict[str, Callable[[Tensor, Any], Any]] = {
    "logdet": lambda A, b: lq.probe.logdet(A, lower=b),
    "preconditioned": lambda A, b: lq.probe.logdet(
        A, lower=None if b is None else b / 2, preconditioner=torch.eye(len(A), dtype=A.dtype) / 2
    ),
    "lanczos": lambda A, b: lq.probe.logdet(A, method="lanczos", lower=b),
    "sum": lambda A, b: lq.probe.spectral_sum(A, torch.log, lower=b),
    "form": lambda A, b: lq.probe.inverse_quadratic(A, A.new_ones(len(A)), lower=b),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [1.01 * LEAST, 1.0, TOP, 1.01 * TOP, 1e3, 1e20])
@pytest.mark.parametrize("name", ESTIMATES)
def test_a_bound_above_the_least_eigenvalue_is_refused(
    name: str, bound: float, dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match="is no bound of the spectrum"):
        ESTIMATES[name](operator(dtype), bound)


@pytest.mark.parametrize("name", ESTIMATES)
def test_the_least_eigenvalue_and_less_are_bounds(name: str) -> None:
    free = ESTIMATES[name](operator(), None)
    for bound in (LEAST, LEAST * (1 - 1e-12), LEAST / 2):
        made = ESTIMATES[name](operator(), bound)
        # Of 12 eigenvalues the Krylov space is the whole one, and CG stops at a residual of 1e-3.
        assert float(made.value) == pytest.approx(float(free.value), rel=1e-5)


@pytest.mark.parametrize("bound", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ESTIMATES)
def test_a_bound_is_a_number(name: str, bound: float) -> None:
    with pytest.raises(ValueError, match="lower is"):
        ESTIMATES[name](operator(), bound)


@pytest.mark.parametrize("bound", [2.5, 1e9, float("nan")])
def test_one_step_tells_as_well(bound: float) -> None:
    """Of a multiple of the identity, whose rule has one node."""
    runs = tridiagonalize(lambda v: 2 * v, normal(3, 5), 4)
    with pytest.raises(ValueError, match="is no bound of the spectrum"):
        runs.form(torch.log, lower=bound)
    one = torch.tensor([[2.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="is no bound of the spectrum"):
        bracket(one, one[:, :0], torch.log, lower=bound)


def test_effective_dimension_refuses_what_is_not_semidefinite() -> None:
    for shift in (1.0, 2 * TOP):
        A = operator() - shift * torch.eye(SIZE, dtype=torch.float64)
        with pytest.raises(ValueError, match="is no bound of the spectrum"):
            lq.probe.effective_dimension(A, 0.1)
