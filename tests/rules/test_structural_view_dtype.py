"""Bytes viewed as another dtype have no derivative: refused, and no other view is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import dense_jacobian
from small_models import F64, mlp, normal
from torch import Tensor, nn

import llqr_mf as lq

X, Y = normal(5, 4), normal(5, 3)


class Viewed(nn.Module):
    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.outer, self.view = mlp(4, 6), mlp(6, 3), view

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.view(self.inner(x)))


@pytest.mark.parametrize(
    "view", [lambda h: h.view(F64), lambda h: h.view(dtype=F64), lambda h: h.view(torch.float64)]
)
def test_a_view_of_another_dtype_is_refused(view: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"view\(dtype\) in 'the model'.*\.to\(dtype\)"):
        lq.LQRProblem.from_network(lq.split(Viewed(view)), X, Y, loss="mse")


@pytest.mark.parametrize(
    "view",
    [
        lambda h: h.view(5, 6),
        lambda h: h.view(torch.Size([5, 6])),
        lambda h: h.view(-1, 2, 3).flatten(1),
        lambda h: h.to(F64),
        lambda h: h.type_as(h),
        # Of a constant, which nothing moves.
        lambda h: h * torch.ones(6, dtype=F64).view(torch.int64).view(F64),
    ],
)
def test_other_views_are_linear(view: Callable[[Tensor], Tensor]) -> None:
    model = Viewed(view)
    problem = lq.LQRProblem.from_network(lq.split(model), X, Y, loss="mse", damping=0.0)
    J = dense_jacobian(model, X)
    H = 2 / 15 * J.mT @ J
    # Sums of 15 float64 products.
    torch.testing.assert_close(problem.hessian.to_dense(), H, rtol=1e-12, atol=1e-13)
