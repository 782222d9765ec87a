"""The model's decrease is that of the whole step, in the model without momentum."""

import pytest
import torch
from linear_operator.operators import DiagLinearOperator
from small_models import F64, mlp, normal

import llqr_mf as lq


def problems():
    """Some whose residual is measured at the output, and some where it cannot be."""
    model = mlp(4, 5, 3)
    layers = lq.split(model)
    x, y = normal(6, 4, seed=1), torch.arange(6) % 3
    size = sum(p.numel() for p in model.parameters())
    diagonal = DiagLinearOperator(0.1 + normal(size, seed=3).square())

    def make(**options):
        return lq.LQRProblem.from_network(layers, x, y, loss="cross_entropy", **options)

    draw = [normal(3, 3, seed=i) for i in range(6)]
    given = lq.LQRProblem(
        A=draw[:3],
        B=draw[3:],
        Q=[None, torch.eye(3, dtype=F64), None, torch.eye(3, dtype=F64)],
        R=[0.3] * 3,
        x0=torch.ones(3, dtype=F64),
    )
    return {
        "numbers": make(damping=0.1),
        "operator": make(damping=diagonal),
        "newton": make(damping=3.0, metric="newton"),
        "given": given,
    }


METHODS = {
    "numbers": ["cg", "minres", "dual", "low_rank", "riccati"],
    "operator": ["cg", "minres", "riccati"],
    "newton": ["cg", "minres", "riccati"],
    "given": ["cg", "minres", "riccati"],
}


@pytest.mark.parametrize("name, method", [(n, m) for n, ms in METHODS.items() for m in ms])
def test_the_decrease_with_momentum(name, method):
    problem = problems()[name]
    H, g = problem.hessian.to_dense(), problem.gradient
    previous = normal(problem.size, seed=7)
    solution = lq.solve(problem, method, rtol=1e-12, previous=previous, momentum=0.7)
    R = torch.block_diag(*[op.to_dense() for op in problem.R])
    if name == "given":
        step = torch.linalg.solve(H, 0.7 * R @ previous - g)
        torch.testing.assert_close(solution.step, step, rtol=1e-8, atol=1e-10)
    u = solution.step
    torch.testing.assert_close(
        solution.model_decrease, -(g @ u + u @ H @ u / 2), rtol=1e-9, atol=1e-12
    )
