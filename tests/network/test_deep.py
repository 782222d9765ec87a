"""Models of thousands of calls."""

import torch
from small_models import normal
from torch import nn

import llqr_mf as lq


class Deep(nn.Module):
    """One weight through many residual calls, each a view and an overwriting call."""

    def __init__(self, calls):
        super().__init__()
        self.linear, self.calls = nn.Linear(3, 3), calls

    def forward(self, x):
        x = self.linear(x)
        for _ in range(self.calls):
            y = x.unsqueeze(0).squeeze(0).mul(1e-3)
            y += x
            x = torch.sin(y)
        return x


def test_four_thousand_calls_are_no_deeper_than_four():
    model = Deep(1000).double()
    layers = lq.split(model)
    x, y = normal(2, 3), normal(2, 3, seed=1)
    problem = lq.LQRProblem.from_network(layers, x, y, loss="mse", damping=1.0)
    model(x).sub(y).square().mean().backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    # A thousand sines round in another order.
    assert torch.allclose(problem.gradient, gradient, rtol=1e-10, atol=1e-14)
    assert lq.solve(problem, "cg").status.ok


def test_a_chain_of_views_longer_than_the_stack():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            h = first = self.linear(x)
            for _ in range(1500):
                h = h.view(-1, 3)
            first.mul_(2.0)
            return h + first

    # The overwritten value shares memory with every view: seen, and the module stays whole.
    (layer,) = lq.split(Views())
    assert layer.calls == ("",)
