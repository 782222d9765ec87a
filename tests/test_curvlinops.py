"""A second opinion on products, where curvlinops is installed (`make bench-env`)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import llqr_mf as lq

curvlinops = pytest.importorskip("curvlinops")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 4))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3).eval(),
        nn.Sigmoid(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


@pytest.mark.parametrize("make, shape", [(mlp, (9, 5)), (conv, (6, 2, 4, 4))])
@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
def test_products_agree(make: object, shape: tuple[int, ...], metric: str) -> None:
    torch.manual_seed(0)
    model = make().double()  # type: ignore[operator]
    x, y = torch.randn(*shape, dtype=torch.float64), torch.randint(0, 4, shape[:1])
    problem = lq.LQRProblem.from_network(
        lq.split(model), x, y, loss="cross_entropy", metric=metric, damping=0.0
    )
    kinds = {
        "gauss_newton": curvlinops.GGNLinearOperator,
        "newton": curvlinops.HessianLinearOperator,
    }
    parameters = list(model.parameters())
    peer = kinds[metric](model, nn.CrossEntropyLoss(), parameters, [(x, y)])
    v = torch.randn(problem.size, 3, dtype=torch.float64)
    # Two orders of summation of a few hundred float64 terms.
    torch.testing.assert_close(problem.hessian @ v, peer @ v, rtol=1e-10, atol=1e-12)
