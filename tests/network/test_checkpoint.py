"""Checkpoints: the same products from what enters each layer."""

from __future__ import annotations

import pytest
import torch
from memory import LiveBytes
from networks import ZOO
from small_models import normal, relative
from torch import nn

import llqr_mf as lq


def pair(name: str, **options):
    model, inputs, targets, loss = ZOO[name]()
    layers = lq.split(model)
    options = {"loss": loss, "damping": 0.1} | options
    return [
        lq.LQRProblem.from_network(layers, inputs, targets, checkpoint=flag, **options)
        for flag in (False, True)
    ]


@pytest.mark.parametrize("name", ZOO)
def test_products_are_the_same(name):
    """Dropout's masks too: a layer starts from the random state that it had."""
    torch.manual_seed(5)
    plain, lean = pair(name)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    v = normal(plain.size, 2, seed=1)
    assert torch.equal(plain.hessian @ v, lean.hessian @ v)
    assert torch.equal(plain.gradient, lean.gradient)
    p = normal(plain.system.output_size, seed=2)
    assert relative(lean.tangent_kernel @ p, plain.tangent_kernel @ p) < 1e-14
    assert torch.equal(torch.get_rng_state(), state)


def test_solutions_are_the_same_and_closed_forms_say_no():
    plain, lean = pair("mlp")
    one, two = lq.solve(plain, "cg", rtol=1e-10), lq.solve(lean, rtol=1e-10)
    assert torch.equal(one.step, two.step)
    assert "made again" in two.status.message
    for refused in (
        lambda: lq.solve(lean, "dual"),
        lambda: lq.preconditioners.baselines.kfac(lean),
        lambda: lq.solve(lean, "cg", products="bf16"),
    ):
        with pytest.raises(ValueError, match="checkpoint=True"):
            refused()
    with pytest.raises(ValueError, match="checkpoint=True goes with"):
        pair("mlp", metric="newton")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.gelu(self.outside(torch.tanh(self.inside(x))))


def test_memory_is_that_of_one_layer():
    depth, width, batch = 12, 32, 4096
    model = nn.Sequential(*[Block(width) for _ in range(depth)], nn.Linear(width, 4))
    x, y = torch.randn(batch, width), torch.randint(0, 4, (batch,))
    layers = lq.split(model, cuts=[str(t) for t in range(depth)])
    peaks = []
    for checkpoint in (False, True):
        with LiveBytes() as memory:
            problem = lq.LQRProblem.from_network(
                layers, x, y, loss="cross_entropy", check=False, checkpoint=checkpoint
            )
            problem.hessian @ problem.gradient
        peaks.append(memory.peak / (4 * batch * width))
    # An input per layer, and the activations, slopes and tangents of the layer at hand.
    assert peaks[1] < depth + 12 < 4 * depth < peaks[0]


def test_weights_that_change_are_noticed():
    model, inputs, targets, loss = ZOO["mlp"]()
    problem = lq.LQRProblem.from_network(
        lq.split(model), inputs, targets, loss=loss, checkpoint=True
    )
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(RuntimeError):
        problem.hessian @ normal(problem.size)
