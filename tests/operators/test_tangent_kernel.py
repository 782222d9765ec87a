"""K = J R^{-1} J' against the dense Jacobian, on every net of the zoo and every kind of R."""

from __future__ import annotations

import pytest
import torch
from linear_operator.operators import DiagLinearOperator
from networks import ZOO
from oracle import dense_jacobian
from torch import nn

import llqr_mf as lq

# Products of float64 numbers of size one, sums of a few thousand of them.
CLOSE = 1e-10


def problem_of(name: str, damping: object) -> lq.LQRProblem:
    model, inputs, targets, loss = ZOO[name]()
    return lq.LQRProblem.from_network(lq.split(model), inputs, targets, loss=loss, damping=damping)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ZOO)
def test_kernel_of_every_network(name: str) -> None:
    model, inputs, _, _ = ZOO[name]()
    kernel = problem_of(name, 0.5).tangent_kernel
    J = dense_jacobian(model, inputs)
    assert relative(kernel.to_dense(), 2 * J @ J.mT) < CLOSE


def wide_linear(bias: bool, positions: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(9, 8, bias=bias), nn.Tanh(), nn.Linear(8, 7, bias=bias), nn.Tanh()
    )
    model.append(nn.Linear(7, 3, bias=bias))
    shape = (2, positions, 9) if positions > 1 else (2, 9)
    x = torch.randn(shape, dtype=torch.float64)
    return model.double(), x, torch.randn(*shape[:-1], 3, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("positions", [1, 2, 20])
@pytest.mark.parametrize("kind", ["layers", "operator", "operators"])
def test_kernel_with_any_r(bias: bool, positions: int, kind: str) -> None:
    model, x, y = wide_linear(bias, positions)
    layers = lq.split(model)
    sizes = [sum(p.numel() for p in m.parameters()) for m in model]
    whole = torch.rand(sum(sizes), dtype=torch.float64) + 0.5
    damping: object = [0.1 * (t + 1) for t in range(len(sizes))]
    parts = [torch.full((n,), 0.1 * (t + 1), dtype=torch.float64) for t, n in enumerate(sizes)]
    spread = torch.cat(parts)
    if kind == "operator":
        damping, spread = DiagLinearOperator(whole), whole
    if kind == "operators":
        damping, spread = [DiagLinearOperator(part) for part in whole.split(sizes)], whole
    problem = lq.LQRProblem.from_network(layers, x, y, loss="mse", damping=damping)
    J = dense_jacobian(model, x)
    assert relative(problem.tangent_kernel.to_dense(), (J / spread) @ J.mT) < CLOSE


def test_kernel_of_given_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    A = [torch.randn(4, 4, generator=generator).double() for _ in range(3)]
    B = [torch.randn(4, 2, generator=generator).double() for _ in range(3)]
    problem = lq.LQRProblem(A=A, B=B, Q=[None] * 3 + [torch.eye(4).double()], R=[0.5, 1.0, 2.0])
    J = problem.output_jacobian.to_dense()
    weights = torch.tensor([0.5, 0.5, 1, 1, 2, 2]).double()
    assert relative(problem.tangent_kernel.to_dense(), (J / weights) @ J.mT) < CLOSE


def test_wide_layers_form_no_weights() -> None:
    from memory import LiveBytes

    model = nn.Sequential(nn.Linear(2048, 2048), nn.Tanh(), nn.Linear(2048, 10))
    problem = lq.LQRProblem.from_network(
        lq.split(model), torch.randn(8, 2048), torch.randint(0, 10, (8,)), loss="cross_entropy"
    )
    p = torch.randn(1, 80)
    with torch.no_grad(), LiveBytes() as memory:
        problem.tangent_kernel._rows(p)
    # The head's 20 k weights and tangents of 8 samples; the first weight has 4 M.
    assert memory.peak < 4 * 200_000
