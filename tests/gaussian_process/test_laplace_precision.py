"""float32 is near the dense posterior, half precision is refused with the remedy."""

from __future__ import annotations

import pytest
import torch
from oracle import dense_jacobian
from small_models import F64, mlp, normal
from torch import Tensor
from torch.nn import functional as F

import llqr_mf as lq
from llqr_mf.gaussian_process import Laplace, choose_prior

X, NEW = normal(8, 4, seed=1), normal(3, 4, seed=2)
REAL = normal(8, 3, seed=3)
TARGETS = {
    "cross_entropy": torch.arange(8) % 3,
    "mse": REAL,
    "bce_with_logits": (REAL > 0).to(F64),
}
DELTA, NOISE = 0.5, 0.2


def problem_of(loss: str, dtype: torch.dtype) -> lq.LQRProblem:
    y = TARGETS[loss]
    return lq.LQRProblem.from_network(
        lq.split(mlp(4, 6, 3, dtype=dtype)),
        X.to(dtype),
        y.to(dtype) if y.is_floating_point() else y,
        loss=loss,
    )


def expected(loss: str) -> Tensor:
    model, y = mlp(4, 6, 3, dtype=torch.float32).double(), TARGETS[loss]
    x, new = X.float().double(), NEW.float().double()
    J, K = dense_jacobian(model, x), dense_jacobian(model, new)

    def negative(flat: Tensor) -> Tensor:
        f = flat.reshape(8, 3)
        if loss == "mse":
            return (f - y.float().double()).square().sum() / (2 * NOISE)
        of = F.cross_entropy if loss == "cross_entropy" else F.binary_cross_entropy_with_logits
        return of(f, y, reduction="sum")

    H = torch.func.hessian(negative)(model(x).detach().flatten())
    precision = J.mT @ H @ J + DELTA * torch.eye(J.shape[1], dtype=F64)
    return K @ torch.linalg.solve(precision, K.mT)


@pytest.mark.parametrize("method", ["dual", "cg"])
@pytest.mark.parametrize("loss", TARGETS)
def test_float32(loss: str, method: str) -> None:
    noise = NOISE if loss == "mse" else None
    problem = problem_of(loss, torch.float32)
    laplace = Laplace(problem, prior_precision=DELTA, noise=noise, method=method, rtol=1e-5)
    made, dense = laplace.predict(NEW.float()), expected(loss)
    # The prior's kernel over the posterior's is below 30, and CG stops at 1e-5.
    bound = 3e-4 * float(dense.abs().max())
    torch.testing.assert_close(made.covariance_matrix.double(), dense, rtol=0, atol=bound)
    variance = made.variance.double().flatten()
    torch.testing.assert_close(variance, dense.diagonal(), rtol=0, atol=bound)
    assert laplace.sample(2).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", TARGETS)
def test_half_precision_is_refused(loss: str, dtype: torch.dtype) -> None:
    problem = problem_of(loss, dtype)
    noise = NOISE if loss == "mse" else None
    for method in ("auto", "dual", "cg"):
        with pytest.raises(ValueError, match=rf"problem is {dtype}.*model\.float\(\)"):
            Laplace(problem, prior_precision=DELTA, noise=noise, method=method)
    with pytest.raises(ValueError, match=r"model\.float\(\)"):
        choose_prior(problem)
