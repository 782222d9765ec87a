"""Nothing of the weights' size is made beyond a few flat vectors."""

from __future__ import annotations

import pytest
import torch
from memory import LiveBytes
from torch import nn

import llqr_mf as lq

WIDTH = 8192
"""One hidden layer of 67 M weights."""


def wide_model() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.utils.skip_init(nn.Linear, WIDTH, WIDTH),
        nn.Tanh(),
        nn.utils.skip_init(nn.Linear, WIDTH, 10),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-(WIDTH**-0.5), WIDTH**-0.5, generator=generator)
    return model


def wide_problem(model: nn.Module) -> lq.LQRProblem:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, WIDTH, generator=generator)
    y = torch.randint(0, 10, (8,), generator=generator)
    return lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy", damping=1e-2)


# Vectors of P numbers alive at once, besides the parameters: gradient and right-hand side; then
# CG's x, r, p, A p and the product being made, or the dual's start, spread and residual.
FLAT_VECTORS = 8


@pytest.mark.parametrize("method", ["dual", "cg"])
def test_a_layer_of_67_million_weights(method: str) -> None:
    model = wide_model()
    with LiveBytes() as memory:
        problem = wide_problem(model)
        before = memory.peak
        # float32 products leave about 1e-6; the point here is the memory.
        solution = lq.solve(problem, method, rtol=1e-3)
    flat = 4 * problem.size
    assert solution.status.ok
    assert before < 0.1 * flat, "the problem itself holds activations, not weights"
    assert memory.largest <= flat, "no temporary is larger than one flat vector"
    assert memory.peak <= FLAT_VECTORS * flat
    print(f"{method}: peak {memory.peak / flat:.2f} flat vectors")


def test_a_product_makes_one_flat_vector() -> None:
    problem = wide_problem(wide_model())
    v = torch.randn(1, problem.size, generator=torch.Generator().manual_seed(1))
    out = torch.empty_like(v)
    with torch.no_grad(), LiveBytes() as memory:
        problem.hessian.multiply_rows(v, out)
    # Tangents and cotangents of 8 samples: a thousandth of the weights.
    assert memory.peak <= 0.01 * out.nbytes
