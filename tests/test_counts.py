"""A guard of speed that needs no clock: flops, GEMMs, forward passes and bytes, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory import LiveBytes
from nets import mlp, resnet18, transformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import llqr_mf as lq
from llqr_mf.choose import DUAL_PRODUCTS
from llqr_mf.gram import closed_form_gram

WIDTH, DEPTH, BATCH = 512, 3, 8


def flops_of(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class Calls(TorchDispatchMode):
    """How often operations of some names are called."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.count = names, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.names
        return func(*args, **(kwargs or {}))


GEMMS = ("mm", "addmm", "bmm", "baddbmm")


def linear_case() -> tuple[nn.Module, lq.LQRProblem]:
    torch.manual_seed(0)
    model, x, y = mlp(WIDTH, DEPTH, BATCH)
    problem = lq.LQRProblem.from_network(
        lq.split(model), x, y, loss="cross_entropy", damping=1e-2, check=False
    )
    return model, problem


def one_pass(problem: lq.LQRProblem) -> tuple[float, float]:
    """Flops of all weights' GEMMs, and of the first layer's, which has no state before it."""
    sizes = [s for s in problem.system.blocks if len(s) == 2]
    return 2.0 * BATCH * sum(a * b for a, b in sizes), 2.0 * BATCH * sizes[0][0] * sizes[0][1]


def into_buffer(problem: lq.LQRProblem, k: int = 1) -> Callable[[], Any]:
    v = torch.randn(k, problem.size)
    out = torch.empty_like(v)
    return lambda: problem.hessian.multiply_rows(v, out)


@pytest.mark.parametrize("k", [1, 3])
def test_a_product_is_four_gemms_per_layer(k: int) -> None:
    _, problem = linear_case()
    every, first = one_pass(problem)
    product = into_buffer(problem, k)
    with torch.no_grad():
        assert flops_of(product) == k * (4 * every - 2 * first)
        with Calls(*GEMMS) as calls:
            into_buffer(problem)()
    assert calls.count == 4 * (DEPTH + 1) - 2


def test_a_kernel_product_is_two_gemms_per_layer() -> None:
    _, problem = linear_case()
    every, first = one_pass(problem)
    p = torch.randn(1, problem.system.output_size)
    with torch.no_grad():
        problem.tangent_kernel._rows(p)  # X X' is made once
        # Mixing the samples takes BATCH / WIDTH of a GEMM; the head forms its 640 weights.
        assert flops_of(lambda: problem.tangent_kernel._rows(p)) < 2.1 * (every - first)


@pytest.mark.parametrize("width, samples", [(64, 20), (256, 40)])
def test_products_that_auto_reckons_a_dual_with(width: int, samples: int) -> None:
    """Beside its Gram matrix two or three, and two more where a correction is needed."""
    model, inputs, targets = mlp(width, 2, samples, classes=3)
    problem = lq.LQRProblem.from_network(
        lq.split(model), inputs, targets, loss="cross_entropy", damping=1e-3
    )
    b = -problem.gradient
    product = flops_of(lambda: problem.hessian @ b)
    beside = flops_of(lambda: lq.solve(problem, "dual", rtol=1e-3))
    beside -= flops_of(lambda: closed_form_gram(problem))
    assert beside / product < DUAL_PRODUCTS < beside / product + 2.5


def test_flops_of_a_dual_solve() -> None:
    """Ten columns back, two kernel products, the step; a rollout and two sweeps measure it."""
    _, problem = linear_case()
    every, first = one_pass(problem)
    inner = every - first
    gram = DEPTH * (10 * BATCH) ** 2 * WIDTH * 2
    step, residual = every + inner, (every + inner) + 2 * (every + inner)
    most = 10 * inner + gram + 2 * 2.1 * inner + step + residual
    count = flops_of(lambda: lq.solve(problem, "dual", rtol=1e-4))
    assert count < 1.05 * most
    unformed = flops_of(lambda: lq.solve(problem, "dual", rtol=1e-4, form_step=False))
    assert unformed < 1.05 * (10 * inner + gram + 3 * 2.1 * inner)


@pytest.mark.parametrize("make", [lambda: resnet18(2), lambda: transformer(32, 2, 2, 8)])
def test_products_elsewhere_are_at_most_four_thirds_of_a_gradient(make: Any) -> None:
    torch.manual_seed(0)
    model, x, y = make()
    problem = lq.LQRProblem.from_network(
        lq.split(model), x, y, loss="cross_entropy", damping=1e-2, check=False
    )
    parameters = list(model.parameters())

    def gradient() -> Any:
        return torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)

    with torch.no_grad():
        product = flops_of(into_buffer(problem))
    # Attention has three products of activations where a Linear layer has weights.
    assert product <= 1.4 * flops_of(gradient)


def test_a_problem_is_two_forward_passes_and_a_solve_none() -> None:
    torch.manual_seed(0)
    model, x, y = mlp(WIDTH, DEPTH, BATCH)
    layers = lq.split(model)
    F = sum(2 * BATCH * p.numel() for p in model.parameters() if p.ndim == 2)

    def make(check: bool) -> lq.LQRProblem:
        return lq.LQRProblem.from_network(layers, x, y, loss="cross_entropy", check=check)

    assert flops_of(lambda: make(False)) == F
    assert flops_of(lambda: make(True)) == 2 * F
    problem, seen = make(False), []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    for method in ("dual", "cg"):
        lq.solve(problem, method, rtol=1e-2)
    handle.remove()
    assert not seen


def test_bytes_of_a_product() -> None:
    """All that one product allocates, freed or not: tangents and cotangents of the activations."""
    _, problem = linear_case()
    product = into_buffer(problem)
    with torch.no_grad(), LiveBytes() as memory:
        product()
    activation = 4 * BATCH * WIDTH
    # A tangent and a cotangent at the output of every call; a tanh makes its slope besides.
    assert memory.total <= 2.5 * (2 * DEPTH + 1) * activation
