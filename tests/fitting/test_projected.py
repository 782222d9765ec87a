"""The bounded solver by itself, beside SciPy's active sets."""

from __future__ import annotations

import pytest
import torch
from fitting.dense_fit import least_squares_above
from small_models import normal, relative

from llqr_mf.fitting.projected import Above, minimise_projected


def quadratic(n: int, seed: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    basis = torch.linalg.qr(normal(n, n, seed=seed))[0]
    values = torch.logspace(0, spread, n, dtype=torch.float64)
    return (basis * values) @ basis.mT, normal(n, seed=seed + 100)


def minimise(A, b, start, lower, **options):
    options = {"tolerance": 1e-12, "max_iterations": 5000, **options}
    scaling = 1 / A.diagonal()
    return minimise_projected(
        lambda v: A @ v, start, b - A @ start, Above(lower), scaling=scaling, **options
    )


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("seed", range(6))
def test_it_finds_the_minimiser(seed: int, spread: float) -> None:
    A, b = quadratic(25, seed, spread)
    start = normal(25, seed=seed + 7).abs()
    found = minimise(A, b, start, torch.zeros_like(b))
    wanted = least_squares_above(A, b, 0.0)
    assert bool((wanted == 0).any())
    # 1e-12 of residual over a least eigenvalue of 1.
    assert relative(found.x, wanted) < 1e-9
    assert float(found.x.min()) >= -1e-15
    value = lambda x: float(x @ A @ x / 2 - b @ x)  # noqa: E731
    assert found.change == pytest.approx(value(found.x) - value(start), rel=1e-9)
    assert found.bends_up


def test_without_bounds_it_is_conjugate_gradients() -> None:
    A, b = quadratic(25, 0, 4.0)
    free = torch.full_like(b, -torch.inf)
    found = minimise(A, b, torch.zeros_like(b), free, tolerance=1e-8)
    assert relative(found.x, torch.linalg.solve(A, b)) < 1e-6
    # Two gradient steps, and about twice n for the rounding; gradients alone take thousands.
    assert found.iterations < 100


def test_no_iteration_raises_the_objective() -> None:
    A, b = quadratic(25, 3, 4.0)
    start = torch.ones_like(b)
    changes = [
        minimise(A, b, start, torch.zeros_like(b), max_iterations=n).change for n in range(60)
    ]
    assert changes == sorted(changes, reverse=True) and changes[0] == 0


def test_a_scaling_far_too_large_is_no_harm() -> None:
    A, b = quadratic(25, 1, 4.0)
    start = torch.ones_like(b)
    found = minimise_projected(
        lambda v: A @ v,
        *(start, b - A @ start, Above(torch.zeros_like(b))),
        scaling=torch.ones_like(b),
        tolerance=0.0,
        max_iterations=1,
    )
    assert found.change < 0 and found.iterations == 1


def test_one_product_per_iteration() -> None:
    A, b = quadratic(25, 1, 4.0)
    seen = []
    start = torch.ones_like(b)

    def product(v):
        seen.append(v)
        return A @ v

    found = minimise_projected(
        product,
        *(start, b - A @ start, Above(torch.zeros_like(b))),
        scaling=torch.ones_like(b) / 100,
        tolerance=1e-10,
        max_iterations=37,
    )
    assert found.iterations == len(seen) == 37


@pytest.mark.parametrize("least", [0.0, -1.0])
def test_curvature_that_is_not_positive_stops_it(least: float) -> None:
    # b has a part along the eigenvector of that curvature: there is no minimum.
    A = torch.tensor([2.0, least, 3.0], dtype=torch.float64).diag()
    b = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    found = minimise_projected(
        lambda v: A @ v,
        *(torch.zeros_like(b), b, Above(torch.full_like(b, -torch.inf))),
        scaling=torch.ones_like(b),
        tolerance=0.0,
        max_iterations=100,
    )
    assert not found.bends_up and found.iterations < 20
    assert bool(torch.isfinite(found.x).all()) and found.change <= 0


def test_a_start_at_the_minimum_costs_nothing() -> None:
    A, b = quadratic(10, 2, 1.0)
    wanted = least_squares_above(A, b, 0.0)
    found = minimise(A, b, wanted, torch.zeros_like(b), tolerance=1e-9)
    assert found.iterations == 0 and torch.equal(found.x, wanted)
