"""The product as a CUDA graph: what can be seen without a GPU, and the numbers with one."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from llqr_mf.operators import GraphedOperator, graphed
from torch import nn

import llqr_mf as lq

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def small(device: str = "cpu") -> tuple[nn.Module, lq.LQRProblem]:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(12, 4))
    )
    model = model.double().to(device)
    x, y = torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.randint(0, 4, (5,))
    problem = lq.LQRProblem.from_network(
        *(lq.split(model), x.to(device), y.to(device)), loss="cross_entropy", damping=1e-2
    )
    return model, problem


def attention(device: str) -> lq.LQRProblem:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True, norm_first=True)
    model = nn.Sequential(
        nn.Embedding(11, 8),
        nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
        nn.Linear(8, 11),
    )
    x, y = torch.randint(0, 11, (3, 5)).to(device), torch.randint(0, 11, (3, 5)).to(device)
    return lq.LQRProblem.from_network(
        lq.split(model.double().to(device)), x, y, loss="cross_entropy", damping=1e-2
    )


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that runs the function again at each replay."""

    def again(function: Callable[[], object], device: torch.device) -> Callable[[], None]:
        function()

        def replay() -> None:
            with torch.no_grad():
                function()

        return replay

    monkeypatch.setattr(sys.modules[GraphedOperator.__module__], "capture", again)


def test_a_cpu_problem_is_told_what_to_use() -> None:
    _, problem = small()
    with pytest.raises(ValueError, match=r"on cpu.*compiled\(problem\.hessian\)"):
        graphed(problem.hessian)
    with pytest.raises(ValueError, match="columns is 0"):
        graphed(problem.hessian, columns=0)
    with pytest.raises(TypeError, match=r"takes problem\.hessian"):
        graphed(problem.B[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", [1, 3])
def test_blocks_are_filled_up_and_cut(without_gpu: None, columns: int) -> None:
    _, problem = small()
    fast = GraphedOperator(problem.system.proto, base=problem.hessian, columns=columns)
    wanted = problem.hessian.to_dense()
    torch.testing.assert_close(fast.to_dense(), wanted)
    v = torch.randn(5, problem.size, dtype=torch.float64)
    first, second = fast.multiply_rows(v[:2]), fast.multiply_rows(v[2:4])
    torch.testing.assert_close(torch.cat([first, second]), v[:4] @ wanted)
    out = torch.empty(problem.size, 5, dtype=torch.float64).mT
    assert fast._rows_into(v, out) is out
    torch.testing.assert_close(out, v @ wanted)


def test_products_under_autograd_and_inference(without_gpu: None) -> None:
    _, problem = small()
    with torch.inference_mode():
        fast = GraphedOperator(problem.system.proto, base=problem.hessian)
    v = torch.randn(problem.size, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((fast @ v) @ v, v)
    torch.testing.assert_close(gradient, 2 * (problem.hessian @ v.detach()))
    with torch.inference_mode():
        inside = fast @ v.detach()
    torch.testing.assert_close(inside, gradient / 2)


def test_weights_written_to_are_noticed_before_a_replay(without_gpu: None) -> None:
    model, problem = small()
    fast = GraphedOperator(problem.system.proto, base=problem.hessian)
    v = torch.ones(problem.size, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="was written to"):
        fast @ v


@pytest.mark.parametrize("columns", [pytest.param(c, marks=gpu) for c in (1, 4)])
@pytest.mark.parametrize("make", [lambda: small("cuda")[1], lambda: attention("cuda")])
def test_replays_equal_plain_products(make: Callable[[], lq.LQRProblem], columns: int) -> None:
    problem = make()
    fast = graphed(problem.hessian, columns=columns)
    for k in (1, 4, 6):
        v = torch.randn(k, problem.size, dtype=torch.float64, device="cuda")
        torch.testing.assert_close(
            fast.multiply_rows(v), problem.hessian.multiply_rows(v), rtol=1e-9, atol=1e-12
        )
    found = lq.solvers.cg(fast, -problem.gradient, rtol=1e-10)
    wanted = lq.solve(problem, "cg", rtol=1e-10).step
    torch.testing.assert_close(found.x, wanted, rtol=1e-7, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_written_to_on_the_device_are_noticed() -> None:
    model, problem = small("cuda")
    fast = graphed(problem.hessian)
    v = torch.ones(problem.size, dtype=torch.float64, device="cuda")
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="was written to"):
        fast @ v
