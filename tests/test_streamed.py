"""A mean over batches, one in memory at a time, is the problem of the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import llqr_mf as lq

# Ten sums of float64 numbers of one size, in another order.
CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()


def data(samples: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (samples,), generator=generator)


LOSSES = {
    "plain": "cross_entropy",
    "weights": lq.losses.CrossEntropy(weight=torch.tensor([0.2, 1.0, 3.0])),
    "ignored": lq.losses.CrossEntropy(ignore_index=1),
}


@pytest.mark.parametrize("metric", ["gauss_newton", "newton", "fisher", "squared_error"])
@pytest.mark.parametrize("loss", LOSSES)
def test_chunks_are_the_whole_batch(metric: str, loss: str) -> None:
    layers = lq.split(model())
    x, y = data()
    options = {"loss": LOSSES[loss], "metric": metric, "damping": 0.3}
    whole = lq.LQRProblem.from_network(layers, x, y, **options)
    streamed = lq.StreamedProblem(layers, lq.StreamedProblem.chunks(x, y, 5), **options)
    v = torch.randn(whole.size, 3, dtype=torch.float64)
    torch.testing.assert_close(streamed.gradient, whole.gradient, **CLOSE)
    torch.testing.assert_close(streamed.hessian @ v, whole.hessian @ v, **CLOSE)
    torch.testing.assert_close(streamed.objective(v), whole.objective(v), **CLOSE)
    assert streamed.loss_value == pytest.approx(float(whole.origin.loss_value), rel=1e-12)
    if metric != "newton":
        a, b = (lq.solve(problem, "cg", rtol=1e-12) for problem in (streamed, whole))
        assert a.status.ok
        torch.testing.assert_close(a.step, b.step, rtol=1e-9, atol=1e-11)
        assert float(a.model_decrease) == pytest.approx(float(b.model_decrease), rel=1e-9)


def test_dropout_masks_are_the_same_in_every_product() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    x, y = data()
    chunks = lq.StreamedProblem.chunks(x, y, 4)
    streamed = lq.StreamedProblem(lq.split(net), chunks, loss="cross_entropy")
    v = torch.randn(streamed.size, dtype=torch.float64)
    first = streamed.hessian @ v
    torch.rand(7)
    torch.testing.assert_close(streamed.hessian @ v, first, rtol=0, atol=0)


def test_a_function_of_fresh_batches_and_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.fc(a * b)

    layers = lq.split(Two().double())
    x, y = data()
    chunks = lq.StreamedProblem.chunks((x, x.cos()), y, 3)
    streamed = lq.StreamedProblem(layers, lambda: iter(chunks), loss="cross_entropy")
    whole = lq.LQRProblem.from_network(layers, (x, x.cos()), y, loss="cross_entropy")
    v = torch.randn(whole.size, dtype=torch.float64)
    torch.testing.assert_close(streamed.hessian @ v, whole.hessian @ v, **CLOSE)


def test_what_it_cannot_do_is_said() -> None:
    layers = lq.split(model())
    with pytest.raises(ValueError, match="batches is empty"):
        lq.StreamedProblem(layers, [], loss="cross_entropy")
    streamed = lq.StreamedProblem(layers, [data()], loss="cross_entropy")
    with pytest.raises(ValueError, match="cg"):
        lq.solve(streamed, "dual")
