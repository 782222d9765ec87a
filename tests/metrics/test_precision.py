"""Every metric in every dtype, by the ways that take its factor and those that take products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import dense_jacobian
from small_models import F64, mlp, normal
from torch import Tensor

import llqr_mf as lq
from llqr_mf.metrics import Divergence, Fisher, StateCosts
from llqr_mf.preconditioners.subsampled import SubsampledDual

N, WIDTH = 6, 3
X, LABELS, REAL = normal(N, 4, seed=1), torch.arange(N) % WIDTH, normal(N, WIDTH, seed=2)
DAMPING = 0.1
METRICS: dict[str, Any] = {
    **{name: name for name in lq.metrics.metric_names() if name != "newton"},
    "fisher_mc of two": Fisher("monte_carlo", samples=2),
    "divergence": Divergence(lambda a, b: (a - b).square().sum(1).mean()),
}
LOSSES: dict[str, tuple[Any, Tensor]] = {
    "cross_entropy": ("cross_entropy", LABELS),
    "mse": ("mse", REAL),
    "bce_with_logits": ("bce_with_logits", REAL.sigmoid()),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem_of(metric: Any, loss: str, dtype: torch.dtype) -> lq.LQRProblem:
    spec, y = LOSSES[loss]
    return lq.LQRProblem.from_network(
        lq.split(mlp(4, 5, WIDTH, dtype=dtype)),
        X.to(dtype),
        y.to(dtype) if y.is_floating_point() else y,
        loss=spec,
        metric=metric,
        damping=DAMPING,
    )


def dense(problem: lq.LQRProblem) -> tuple[Tensor, Tensor]:
    """H and the exact step in float64, of the problem's own curvature at the output."""
    model = mlp(4, 5, WIDTH).to(problem.dtype).double()
    model.load_state_dict(problem.origin.layers[0].program.model.state_dict())
    J = dense_jacobian(model, X.to(problem.dtype).double())
    Q = problem.Q[-1].times_rows(torch.eye(N * WIDTH, dtype=F64))
    H = J.mT @ Q @ J + DAMPING * torch.eye(J.shape[1], dtype=F64)
    return H, -torch.linalg.solve(H, problem.gradient.double())


def distance(made: Tensor, wanted: Tensor) -> float:
    return float((made.double() - wanted).norm() / wanted.norm())


# Rounding of two layers there and back, times the condition number, which is below 30.
PRODUCTS, STEPS = 10, 60


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("metric", METRICS)
def test_products_and_steps(metric: str, loss: str, dtype: torch.dtype) -> None:
    problem = problem_of(METRICS[metric], loss, dtype)
    H, step = dense(problem)
    eps = torch.finfo(dtype).eps
    assert distance(problem.hessian.to_dense(), H) < PRODUCTS * eps
    for method in ("auto", "dual"):
        solution = lq.solve(problem, method)
        assert solution.step.dtype == dtype
        assert distance(solution.step, step) < STEPS * eps
    eye = torch.eye(problem.size, dtype=dtype)
    inverse = torch.linalg.inv(H)
    assert distance(SubsampledDual(problem).times_rows(eye), inverse) < STEPS * eps


def fitted(problem: lq.LQRProblem) -> Tensor:
    M = lq.Diagonal(problem)
    lq.fit(M, problem)
    return M.to_dense()


USES: dict[str, Callable[[Any], Tensor]] = {
    "fit": fitted,
    "grams": lambda p: lq.probe.cross_layer(p, decrease=False).norms,
    "trace": lambda p: lq.probe.trace(p, products=8, method="hutchinson").value,
    "log-determinant": lambda p: lq.probe.logdet(p, vectors=4).value,
    "sum": lambda p: lq.probe.spectral_sum(p, torch.exp, vectors=4, steps=8).value,
    "eigenvalues": lambda p: lq.probe.eigenvalues(p, 2, rtol=0.05).values,
    "share": lambda p: lq.probe.effective_dimension(p, vectors=4, steps=20).value,
    "form": lambda p: lq.probe.inverse_quadratic(p, p.gradient, rtol=0.05).value,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("metric", ["gauss_newton", "empirical_fisher", "fisher"])
def test_estimates_and_fits(metric: str, use: str, dtype: torch.dtype) -> None:
    """Beside the same in float64: the draws are the same signs."""
    loss = "cross_entropy"
    made = USES[use](problem_of(metric, loss, dtype))
    wide = problem_of(metric, loss, F64)
    with torch.no_grad():
        model = wide.origin.layers[0].program.model
        for p in model.parameters():
            p.copy_(p.to(dtype))
    x = X.to(dtype).double()
    wide = lq.LQRProblem.from_network(
        wide.origin.layers, x, LABELS, loss=loss, metric=metric, damping=DAMPING
    )
    # As of steps; an estimate that stops at a tolerance may stop elsewhere, within it. The rank is
    # below 20, so that as many Lanczos steps leave no truncation.
    assert distance(made, USES[use](wide).double()) < max(STEPS * torch.finfo(dtype).eps, 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ["gauss_newton", "empirical_fisher", "costs"])
def test_streams(metric: str, dtype: torch.dtype) -> None:
    given = StateCosts({"0": 0.3}) if metric == "costs" else metric
    whole = problem_of(given, "cross_entropy", dtype)
    streamed = lq.StreamedProblem(
        whole.origin.layers,
        lq.StreamedProblem.chunks(X.to(dtype), LABELS, 4),
        loss="cross_entropy",
        metric=given,
        damping=DAMPING,
    )
    eps = torch.finfo(dtype).eps
    assert streamed.gradient.dtype == dtype
    assert distance(streamed.gradient, whole.gradient.double()) < PRODUCTS * eps
    made = streamed.hessian.to_dense()
    assert distance(made, whole.hessian.to_dense().double()) < PRODUCTS * eps


def test_a_streamed_gradient_is_summed_in_float32() -> None:
    """The counts of many positions would overflow float16."""
    layers = lq.split(mlp(4, 5, WIDTH, dtype=torch.float16))
    x = X.half().repeat(20_000, 1)
    batches = [(x, LABELS.repeat(20_000))] * 2
    streamed = lq.StreamedProblem(layers, batches, loss="cross_entropy")
    wide = lq.LQRProblem.from_network(layers, X.half(), LABELS, loss="cross_entropy").gradient
    assert distance(streamed.gradient, wide.double()) < 100 * torch.finfo(torch.float16).eps
