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


def test_a_block_is_that_of_the_whole_batch() -> None:
    layers = lq.split(model())
    x, y = data()
    whole = lq.LQRProblem.from_network(layers, x, y, loss="cross_entropy", damping=0.3)
    chunks = lq.StreamedProblem.chunks(x, y, 4)
    streamed = lq.StreamedProblem(layers, chunks, loss="cross_entropy", damping=0.3)
    for damped in (True, False):
        mine = streamed.block("*.weight", damped=damped)
        theirs = whole.block("*.weight", damped=damped)
        v = torch.randn(mine.shape[1], 2, dtype=torch.float64)
        torch.testing.assert_close(mine @ v, theirs @ v, **CLOSE)
        torch.testing.assert_close(mine.mT @ v, theirs @ v, **CLOSE)


def test_a_data_loader_must_keep_its_order() -> None:
    layers = lq.split(model())
    pairs = torch.utils.data.TensorDataset(*data())
    loader = torch.utils.data.DataLoader(pairs, batch_size=4)
    streamed = lq.StreamedProblem(layers, loader, loss="cross_entropy", damping=0.3)
    whole = lq.LQRProblem.from_network(layers, *data(), loss="cross_entropy", damping=0.3)
    v = torch.randn(whole.size, dtype=torch.float64)
    torch.testing.assert_close(streamed.hessian @ v, whole.hessian @ v, **CLOSE)
    shuffled = torch.utils.data.DataLoader(pairs, batch_size=4, shuffle=True)
    with pytest.raises(ValueError, match="shuffle=False"):
        lq.StreamedProblem(layers, shuffled, loss="cross_entropy")


@pytest.mark.parametrize("change", ["other", "fewer", "more"])
def test_batches_that_change_between_passes_are_noticed(change: str) -> None:
    x, y = data()
    later = {
        "other": lq.StreamedProblem.chunks(x.flip(0), y.flip(0), 5),
        "fewer": lq.StreamedProblem.chunks(x[:5], y[:5], 5),
        "more": lq.StreamedProblem.chunks(torch.cat([x, x]), torch.cat([y, y]), 5),
    }
    passes = iter([lq.StreamedProblem.chunks(x, y, 5), later[change]])
    streamed = lq.StreamedProblem(lq.split(model()), lambda: next(passes), loss="cross_entropy")
    with pytest.raises(RuntimeError, match="first pass"):
        streamed.hessian @ torch.randn(streamed.size, dtype=torch.float64)
