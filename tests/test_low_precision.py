"""Products in bf16: close to the wide ones, symmetric, on any network, and 2 bytes per weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llqr_mf.solvers.inexact import refined_cg
from memory import LiveBytes
from networks import ZOO
from torch import Tensor, nn

import llqr_mf as lq
from llqr_mf import low_precision
from llqr_mf.low_precision import (
    TensorFloat32Operator,
    low_precision_twin,
    tensor_float32,
    wide_and_narrow,
)

EPS = 2.0**-8
"""Rounding of a bfloat16 operand, relative, is at most half of this."""


def zoo_problem(name: str) -> lq.LQRProblem:
    model, inputs, targets, loss = ZOO[name]()
    return lq.LQRProblem.from_network(lq.split(model), inputs, targets, loss=loss, damping=1e-2)


def small(dtype: torch.dtype, damping: Any = 1e-2, metric: str = "gauss_newton") -> lq.LQRProblem:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(4 * 36, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 5)),
    ).to(dtype)
    x, y = torch.randn(24, 1, 6, 6).to(dtype), torch.randint(0, 5, (24,))
    options = {"loss": "cross_entropy", "damping": damping, "metric": metric}
    return lq.LQRProblem.from_network(lq.split(model), x, y, **options)


def rows(problem: lq.LQRProblem, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(k, problem.size, dtype=torch.float64, generator=generator)
    return v.to(problem.dtype)


def without_damping(problem: lq.LQRProblem) -> lq.LQRProblem:
    return problem.with_damping(0.0)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---- the twin's products


@pytest.mark.parametrize("name", list(ZOO))
def test_products_on_every_kind_of_network(name: str) -> None:
    problem = without_damping(zoo_problem(name))
    try:
        twin = low_precision_twin(problem)
    except ValueError as error:
        assert "leave `products` out" in str(error)
        return
    v = rows(problem, 2)
    exact, coarse = problem.hessian.times_rows(v), twin.hessian.times_rows(v)
    assert coarse.dtype == problem.dtype
    # A product rounds operands and results of each layer twice, and norms may raise the error.
    assert distance(coarse, exact) < 30 * EPS
    # <w, H~ v> = <v, H~ w> up to the rounding of v and w themselves.
    (a, b), scale = (v, coarse), v.norm(dim=1).prod() * exact.norm() / v.norm()
    assert abs(float(a[0] @ b[1] - a[1] @ b[0]) / float(scale)) < 30 * EPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3])
def test_how_coarse_they_are(dtype: torch.dtype, k: int) -> None:
    problem = without_damping(small(dtype))
    exact = problem.hessian.times_rows(rows(problem, k))
    coarse = low_precision_twin(problem).hessian.times_rows(rows(problem, k))
    assert coarse.dtype == dtype
    # Not wide in disguise, and no worse than the roundings of a few layers.
    assert EPS / 50 < distance(coarse, exact) < 4 * EPS


def test_costs_and_gradient_are_those_of_the_wide_problem() -> None:
    problem = small(torch.float32, damping=0.5)
    twin = low_precision_twin(problem)
    assert twin.gradient is problem.gradient and twin.layout == problem.layout
    v = rows(problem, 2)
    damped = twin.hessian.times_rows(v) - low_precision_twin(
        without_damping(problem)
    ).hessian.times_rows(v)
    torch.testing.assert_close(damped, 0.5 * v, rtol=1e-5, atol=1e-5)
    final = twin.Q[-1].to_dense()
    assert torch.equal(final, problem.Q[-1].to_dense())
    assert problem.hessian.system is problem.system, "the wide problem is left as it was"
    for wide, narrow in zip(problem.B, twin.B, strict=True):
        if wide.shape[1]:
            assert distance(narrow.to_dense(), wide.to_dense()) < 2 * EPS
            assert distance(narrow.mT.to_dense(), wide.mT.to_dense()) < 2 * EPS


def test_newton_keeps_its_curvature_wide() -> None:
    problem = small(torch.float64, metric="newton")
    twin = low_precision_twin(problem)
    v = rows(problem, 2)
    assert distance(twin.hessian.times_rows(v), problem.hessian.times_rows(v)) < 10 * EPS


@pytest.mark.parametrize("k", [1, 3])
def test_pieces_of_a_weight_equal_the_whole(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = small(torch.float32)
    twin = low_precision_twin(problem)
    whole = twin.hessian.times_rows(rows(problem, k))
    monkeypatch.setattr(low_precision, "CHUNK", 500)
    pieces = twin.hessian.times_rows(rows(problem, k))
    # Other shapes of a GEMM may round some results the other way.
    assert distance(pieces, whole) < EPS / 4


def test_a_weight_that_is_written_to_is_noticed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy")
    twin = low_precision_twin(problem)
    with torch.no_grad():
        model[2].weight += 1
    with pytest.raises(RuntimeError, match=r"2\.weight"):
        twin.hessian.times_rows(rows(problem, 1))


WIDTH = 2048


def test_two_bytes_per_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=False)]
    model = nn.Sequential(*layers)
    x = torch.randn(4, WIDTH, generator=generator)
    problem = lq.LQRProblem.from_network(lq.split(model), x, torch.zeros(4, WIDTH), loss="mse")
    v, out = rows(problem, 1), torch.empty(1, problem.size)
    assert problem.gradient is not None
    with LiveBytes() as memory:
        hessian = low_precision_twin(problem).hessian
        hessian.multiply_rows(v, out)
    held = sum(size for key, (held, size) in memory.alive.items() if not held.expired())
    # The second weight only: no product reads the first. Activations are a thousandth of it.
    second = model[2].weight.numel()
    assert 2 * second <= held <= 2.02 * second
    # Beside it, two pieces of 2^20 weights at a time.
    assert memory.peak <= 2.02 * second + 4 * 2**20
    assert distance(out, problem.hessian.times_rows(v)) < 4 * EPS


def test_a_tied_weight_is_rounded_once() -> None:
    problem = zoo_problem("same_module_twice")
    twin = low_precision_twin(problem)
    twin.hessian.times_rows(rows(problem, 1))
    nodes = [b.node for stage in twin.system.stages for b in stage.nodes]  # type: ignore[union-attr]
    narrow = [node for node in nodes if isinstance(node, low_precision._NarrowLinear)]
    addresses = {node.wide.weight.data_ptr() for node in narrow}
    made = [key for key in narrow[0].casts._made if key[0] in addresses]
    assert len(addresses) < len(narrow) and len(made) <= len(addresses)


# ---- solving


@pytest.mark.parametrize("damping", [1e-1, 1e-2])
def test_the_wide_solution_from_narrow_products(damping: float) -> None:
    problem = small(torch.float64, damping)
    wide, narrow = wide_and_narrow(problem, "bf16")
    b = torch.stack([-problem.gradient, rows(problem, 1)[0]], 1)
    result = refined_cg(wide, narrow, b, rtol=1e-9)
    assert result.status.ok
    assert damping < 0.1 or result.left_to_plain == (None, None)
    assert float(result.residual_norm.max()) <= 1e-9
    expected = torch.linalg.solve(problem.hessian.to_dense(), b)
    # |H| is about 10: the error is at most cond times the residual.
    assert distance(result.x, expected) < 100 / damping * 1e-9
    assert damping < 0.1 or result.products <= 14 < result.coarse_products


def test_where_the_narrow_products_are_too_coarse_the_step_is_still_right() -> None:
    """A condition number of 1e4, and an exact CG that ends after N (C - 1) = 96 steps."""
    problem = small(torch.float64, 1e-3)
    b = -problem.gradient
    wide, narrow = wide_and_narrow(problem, "bf16")
    result = refined_cg(wide, narrow, b, rtol=1e-9)
    assert result.status.ok and float(result.residual_norm) <= 1e-9
    expected = torch.linalg.solve(problem.hessian.to_dense(), b)
    assert distance(result.x, expected) < 1e5 * 1e-9
    assert result.products <= 1.2 * lq.solvers.cg(wide, b, rtol=1e-9).products


def test_a_float32_step_beside_narrow_products_alone() -> None:
    problem = small(torch.float32, 1e-2)
    wide, narrow = wide_and_narrow(problem, "bf16")
    alone = lq.solvers.cg(narrow, -problem.gradient, rtol=1e-6)
    true = problem.hessian @ alone.x + problem.gradient
    assert float(true.norm() / problem.gradient.norm()) > 1e-4
    result = refined_cg(wide, narrow, -problem.gradient, rtol=1e-6)
    left = problem.hessian @ result.x + problem.gradient
    assert result.status.ok and float(left.norm() / problem.gradient.norm()) <= 2e-6


# ---- what is refused, and TF32


def test_refusals() -> None:
    problem = small(torch.float32)
    with pytest.raises(ValueError, match="float16"):
        low_precision_twin(problem, torch.float16)
    with pytest.raises(ValueError, match="no wider"):
        low_precision_twin(small(torch.bfloat16))
    given = lq.LQRProblem(A=[torch.eye(2)], B=[torch.eye(2)], Q=[None, torch.eye(2)], R=[1.0])
    with pytest.raises(ValueError, match="from a network"):
        low_precision_twin(given)
    with pytest.raises(ValueError, match="'bf16' or 'tf32'"):
        wide_and_narrow(problem, "fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="products='bf16'"):
        wide_and_narrow(problem, "tf32")


def switches() -> list[Any]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        return [matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision]
    return [matmul.allow_tf32, cudnn.allow_tf32]


@pytest.mark.parametrize("enabled", [False, True])
def test_tf32_is_put_back(enabled: bool) -> None:
    before, precision = switches(), torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), tensor_float32(enabled):
        assert set(switches()) <= ({True, "tf32"} if enabled else {False, "ieee"})
        raise KeyError
    assert switches() == before and torch.get_float32_matmul_precision() == precision


def test_the_tf32_operator_multiplies_under_the_switch() -> None:
    problem = small(torch.float32)
    seen = []

    class Spy(lq.operators.CondensedHessianOperator):
        def times_rows(self, v: Tensor, **options: Any) -> Tensor:
            seen.append(switches()[0])
            return super().times_rows(v, **options)

    spy = Spy(problem.hessian._proto, system=problem.system)
    v = rows(problem, 2)
    for enabled in (True, False):
        operator = TensorFloat32Operator(spy, enabled=enabled)
        out = torch.empty_like(v)
        assert operator.shape == spy.shape and operator.dtype == torch.float32
        assert torch.equal(operator @ v.mT, problem.hessian @ v.mT)
        assert torch.equal(operator._rows_into(v, out), problem.hessian.times_rows(v))
    assert len(seen) == 2 and seen[0] in (True, "tf32") and seen[1] in (False, "ieee")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("products", ["bf16", "tf32"])
def test_on_a_gpu(products: low_precision.Products) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10))
    model, x = model.cuda(), torch.randn(64, 3, 8, 8, device="cuda")
    y = torch.randint(0, 10, (64,), device="cuda")
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy", damping=1e-2)
    wide, narrow = wide_and_narrow(problem, products)
    v = rows(problem, 1)
    assert 1e-5 < distance(narrow.times_rows(v.cuda()), wide.times_rows(v.cuda())) < 4 * EPS
    result = refined_cg(wide, narrow, -problem.gradient, rtol=1e-5)
    assert result.status.ok and result.left_to_plain == (None,)
