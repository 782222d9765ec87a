"""Models that decide by random numbers which way they take."""

import torch
from oracle import dense_jacobian
from small_models import normal
from torch import nn

import llqr_mf as lq

X, Y = normal(6, 4), torch.arange(6) % 3


class Depth(nn.Module):
    """Stochastic depth, as most write it: a number is drawn and a layer left out."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            if not self.training or torch.rand(()).item() < 0.5:
                x = x + layer(x).tanh()
        return x


def test_layers_that_are_left_out_at_random():
    """Those that the model's own next forward pass leaves out; and tracing draws nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Depth(), nn.Linear(4, 3)).double()
    random = torch.get_rng_state()
    layers = lq.split(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert len(layers) == 3 and "1" in layers[0].program.whole
    for seed in range(4):
        torch.manual_seed(seed)
        problem = lq.LQRProblem.from_network(layers, X, Y, loss="cross_entropy")
        J = dense_jacobian(model, X)
        assert torch.allclose(problem.output_jacobian.to_dense(), J, rtol=1e-10, atol=1e-12)
        assert torch.allclose(problem.origin.outputs, model(X))
    # In evaluation mode every layer is seen.
    assert not lq.split(model.eval())[0].program.whole


def test_training_with_them():
    torch.manual_seed(0)
    model = nn.Sequential(Depth(), nn.Linear(4, 3)).double()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = lq.LLQR(model, base, loss="cross_entropy", structure="diagonal", step="subspace")
    for _ in range(4):
        torch.manual_seed(3)
        wanted = nn.functional.cross_entropy(model(X), Y).item()
        torch.manual_seed(3)
        loss = float(optimizer.step(X, Y))
        assert abs(loss - wanted) < 1e-12
    assert optimizer.counts.skipped == 0
