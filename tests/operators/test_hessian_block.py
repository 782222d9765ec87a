"""Blocks of H and curvatures of activations against the dense matrices."""

from __future__ import annotations

import pytest
import torch
from linear_operator.operators import DenseLinearOperator
from memory import LiveBytes
from networks import ZOO
from torch import Tensor, nn

import llqr_mf as lq

# The blocks sum in another order than the whole: a few roundings of float64.
TOLERANCE = 1e-12


def zoo_problem(name: str, metric: str = "gauss_newton") -> lq.LQRProblem:
    model, inputs, targets, loss = ZOO[name]()
    return lq.LQRProblem.from_network(
        lq.split(model), inputs, targets, loss=loss, metric=metric, damping=0.1
    )


def close(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * scale.abs().max())


@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_block_is_that_of_the_dense_hessian(name: str, metric: str) -> None:
    problem = zoo_problem(name, metric)
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(problem.size, 3, dtype=problem.dtype, generator=generator)
    names = problem.names
    some = sorted({names[0], names[len(names) // 2], names[-1]}, key=names.index)
    for columns in (*some, some):
        inside = problem.layout.places(problem.layout.select(columns))
        padded = torch.zeros_like(V)
        padded[inside] = V[inside]
        whole = problem.hessian @ padded
        for rows in (*some, some):
            block = problem.block(rows, columns)
            outside = problem.layout.places(problem.layout.select(rows))
            assert block.shape == (len(outside), len(inside))
            assert close(block @ V[inside], whole[outside], whole)
            assert close(block.mT @ V[outside], problem.block(columns, rows) @ V[outside], whole)


def test_without_damping_it_is_the_curvature_alone() -> None:
    problem = zoo_problem("mlp")
    name = problem.names[0]
    damped, bare = problem.block(name), problem.block(name, damped=False)
    eye = torch.eye(damped.shape[0], dtype=problem.dtype)
    assert close(damped.to_dense() - bare.to_dense(), 0.1 * eye, damped.to_dense())


def test_an_operator_of_damping_stays_with_its_layer() -> None:
    model, inputs, targets, loss = ZOO["mlp"]()
    layers = lq.split(model)
    first = lq.LQRProblem.from_network(layers, inputs, targets, loss=loss)
    sizes = [B.shape[1] for B in first.B]
    generator = torch.Generator().manual_seed(0)
    roots = [torch.randn(m, m, dtype=first.dtype, generator=generator) for m in sizes]
    problem = first.with_damping([root @ root.mT for root in roots])
    t = next(t for t, m in enumerate(sizes) if m)
    names = [problem.names[i] for i in problem.system.owned[t]]
    dense = problem.hessian.to_dense()
    assert agrees(problem, dense, names, names)
    # A part of what the operator is on, and two parts of it.
    assert agrees(problem, dense, names[:1], names[:1])
    assert agrees(problem, dense, names[:1], names[1:])
    assert agrees(problem, dense, names[:1], [problem.names[-1]])


def test_one_operator_of_damping_on_everything() -> None:
    problem = zoo_problem("mlp")
    root = torch.randn(problem.size, problem.size, dtype=problem.dtype)
    problem = problem.with_damping(DenseLinearOperator(root @ root.mT))
    dense, names = problem.hessian.to_dense(), list(problem.names)
    for rows, columns in ((names[:1], names[1:]), (names[:2], names[1:3]), (names, names[-1:])):
        assert agrees(problem, dense, rows, columns)
    assert agrees(problem, dense, names, names)


def agrees(problem: lq.LQRProblem, dense: Tensor, rows: list[str], columns: list[str]) -> bool:
    block = problem.block(rows, columns)
    a, b = (problem.layout.places(problem.layout.select(names)) for names in (rows, columns))
    part = dense[a][:, b]
    return close(block.to_dense(), part, dense) and close(block.mT.to_dense(), part.mT, dense)


def test_patterns() -> None:
    layout = zoo_problem("mlp").layout
    weights = layout.select("*.weight")
    assert [layout.names[i] for i in weights] == [n for n in layout.names if "weight" in n]
    module = layout.names[0].rsplit(".", 1)[0]
    inside = [i for i, n in enumerate(layout.names) if n.startswith(f"{module}.")]
    assert list(layout.select(module)) == inside
    assert layout.select([layout.names[-1], layout.names[0]]) == (0, len(layout.names) - 1)
    with pytest.raises(ValueError, match="nothing_here"):
        layout.select("nothing_here")


@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
@pytest.mark.parametrize("name", ["mlp", "resnet_train", "encoder_masked"])
def test_the_curvature_of_activations_follows_its_recursion(name: str, metric: str) -> None:
    problem = zoo_problem(name, metric)
    C = problem.Q[-1].to_dense()
    for t in range(problem.horizon - 1, -1, -1):
        A = problem.A[t].to_dense()
        C = problem.Q[t].to_dense() + A.mT @ C @ A
        if len(C):
            assert close(problem.state_curvature(t).to_dense(), C, C)


def test_the_value_is_below_the_curvature_of_activations() -> None:
    problem = zoo_problem("mlp")
    for t in range(1, problem.horizon):
        gap = problem.state_curvature(t).to_dense() - problem.value(t).to_dense()
        assert float(torch.linalg.eigvalsh(gap)[0]) > -1e-10 * float(gap.abs().max())


def test_a_small_block_of_a_wide_net_makes_nothing_of_its_size() -> None:
    model = nn.Sequential(nn.Linear(16, 2048), nn.Tanh(), nn.Linear(2048, 2048), nn.Linear(2048, 4))
    x, y = torch.randn(8, 16), torch.randint(0, 4, (8,))
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy")
    block = problem.block("0")
    v = torch.randn(block.shape[1], 1)
    with torch.no_grad(), LiveBytes() as memory:
        block @ v
    # 35 k of 4.2 M parameters, and the tangents of eight samples.
    assert memory.peak < 0.1 * 4 * problem.size
