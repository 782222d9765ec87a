"""Every method with the metrics it knows, in float32 and bfloat16, against dense float64."""

import pytest
import torch
from small_models import F64, mlp, normal

import llqr_mf as lq

POSITIVE = ["cg", "minres", "dual", "low_rank", "riccati", "auto"]
CASES = [
    *[("gauss_newton", "cross_entropy", method) for method in POSITIVE],
    *[("fisher", "cross_entropy", method) for method in POSITIVE],
    *[("gauss_newton", "mse", method) for method in POSITIVE],
    *[("newton", "cross_entropy", method) for method in ("cg", "minres", "riccati", "auto")],
    *[("kl", "cross_entropy", method) for method in ("cg", "minres", "auto")],
]


def problem_of(dtype, metric, loss, weights):
    """Of the same numbers in another dtype; a damping that makes Newton's H definite."""
    model = mlp(5, 8, 3, dtype=weights).to(dtype)
    inputs = normal(10, 5, seed=1).to(weights).to(dtype)
    targets = torch.arange(10) % 3
    if loss == "mse":
        targets = normal(10, 3, seed=2).to(weights).to(dtype)
    damping = 2.0 if metric == "newton" else 0.25  # exact in every dtype
    return lq.LQRProblem.from_network(
        lq.split(model), inputs, targets, loss=loss, metric=metric, damping=damping
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric, loss, method", CASES)
def test_against_dense_float64(metric, loss, method, dtype):
    """|H u + g| / |g| in float64, for the H and g of the same weights.

    Beside the tolerance there are the roundings of the layers' values and slopes, a few of each
    kind, relative to |H| |u| and to |g|: 10 eps (1 + |H| |u| / |g|).
    """
    wide = problem_of(F64, metric, loss, weights=dtype)
    H, g = wide.hessian.to_dense(), wide.gradient
    solution = lq.solve(problem_of(dtype, metric, loss, weights=dtype), method)
    u = solution.step
    assert u.dtype == dtype and solution.status.ok, solution.status
    left = float((H @ u.double() + g).norm() / g.norm())
    size = float(torch.linalg.matrix_norm(H, 2) * u.double().norm() / g.norm())
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert left <= rtol + 10 * torch.finfo(dtype).eps * (1 + size)
    decrease = float(-(g @ u.double()) - u.double() @ H @ u.double() / 2)
    assert float(solution.model_decrease) == pytest.approx(
        decrease, rel=20 * torch.finfo(dtype).eps
    )
