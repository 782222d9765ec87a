"""A mean over batches, one in memory at a time, is the problem of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from memory import LiveBytes
from torch import Tensor, nn

import llqr_mf as lq
from llqr_mf.streamed import PIECE, Mark

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


# ---- weights that change


def step(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1


def swap(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data = parameter.data + 0.1


def narrow(net: nn.Module) -> None:
    net.float()


def one_frozen(net: nn.Module) -> None:
    with torch.no_grad():
        net[0].bias += 0.1


def write_data(net: nn.Module) -> None:
    net[0].weight.data.add_(0.1)


@pytest.mark.parametrize("change", [step, swap, narrow, one_frozen, write_data])
def test_weights_that_change_are_noticed(change: Callable[[nn.Module], None]) -> None:
    net = model()
    net[0].bias.requires_grad_(False)
    chunks = lq.StreamedProblem.chunks(*data(), 5)
    streamed = lq.StreamedProblem(lq.split(net), chunks, loss="cross_entropy")
    v = torch.ones(streamed.size, dtype=torch.float64)
    first = streamed.hessian @ v
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    change(net)
    products = (
        lambda: streamed.hessian @ v,
        lambda: streamed.objective(v),
        lambda: lq.solve(streamed, "cg"),
        lambda: streamed.block("*").mT @ v,
    )
    for product in products:
        with pytest.raises(RuntimeError, match=r"0\.\w+ was written to.*make a new problem"):
            product()
    for name, parameter in net.named_parameters():
        parameter.data = before[name]
    torch.testing.assert_close(streamed.hessian @ v, first, rtol=0, atol=0)


def test_statistics_that_are_read_are_noticed_and_others_not() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    chunks = lq.StreamedProblem.chunks(*data(), 5)
    for training in (True, False):
        net.train(training)
        streamed = lq.StreamedProblem(lq.split(net), chunks, loss="cross_entropy")
        v = torch.ones(streamed.size, dtype=torch.float64)
        first = streamed.hessian @ v
        net[1].running_var.mul_(2)
        if training:
            torch.testing.assert_close(streamed.hessian @ v, first, rtol=0, atol=0)
        else:
            with pytest.raises(RuntimeError, match=r"1\.running_var was written to"):
                streamed.hessian @ v


# ---- batches that change


@pytest.mark.parametrize("change", ["labels", "flips", "samples", "dtype", "shape", "masked"])
def test_changes_that_keep_the_sum_are_noticed(change: str) -> None:
    x, y = data()
    mask = torch.zeros(10, 4, dtype=torch.float64)
    mask[:, 0] = -torch.inf
    later = {
        "labels": (x, mask, y.roll(1)),
        "flips": (torch.cat([x[:3].flip(1), x[3:]]), mask, y),
        "samples": (x.flip(0), mask, y),
        "dtype": (x, mask, y.int()),
        "shape": (x, mask, y[:, None]),
        "masked": (x, mask.roll(1, 1), y),
    }[change]

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.fc(a * b.exp())

    passes = iter([(x, mask, y), (x, mask, y), later])

    def batches() -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        a, b, targets = next(passes)
        yield (a, b), targets

    layers = lq.split(Masked().double())
    streamed = lq.StreamedProblem(layers, batches, loss="cross_entropy")
    v = torch.randn(streamed.size, dtype=torch.float64)
    streamed.hessian @ v
    with pytest.raises(RuntimeError, match="batch 0 is not that of the first pass"):
        streamed.hessian @ v


def test_a_mark_is_of_the_order_and_makes_no_copy() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 3, 64, 64, generator=generator)
    with LiveBytes() as memory:
        mark = Mark.of(x)
    # Weights, and two pieces in float64.
    assert memory.peak <= 3.5 * 8 * PIECE < 4 * x.numel()
    assert mark.agrees(Mark.of(x.clone(memory_format=torch.channels_last)))
    for dims in ((0,), (1,), (3,)):
        assert not mark.agrees(Mark.of(x.flip(dims)))
    # Two samples, and two numbers, exchanged; whole pieces too.
    for a, b in ((x[0], x[60]), (x[5, 0, 0, :1], x[99, 2, 9, 9:10])):
        other = x.clone()
        i, j = (part.storage_offset() for part in (a, b))
        n = a.numel()
        other.view(-1)[i : i + n], other.view(-1)[j : j + n] = b.reshape(-1), a.reshape(-1)
        assert not mark.agrees(Mark.of(other))
    pieces = torch.randn(4, PIECE, generator=generator)
    assert not Mark.of(pieces).agrees(Mark.of(pieces.roll(1, 0)))
    for odd in (x.to(torch.complex64), x > 0, x[:0], x[0, 0, 0, 0], x * torch.inf):
        assert Mark.of(odd).agrees(Mark.of(odd.clone()))


# ---- random numbers


class Augmented(torch.utils.data.Dataset):
    """Samples with noise, of torch's global generator."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = data()
        return x[i] + 0.1 * torch.randn(4, dtype=torch.float64), y[i]


def test_the_callers_random_state_is_left_alone() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=4)
    layers = lq.split(model())
    before = torch.get_rng_state()
    streamed = lq.StreamedProblem(layers, loader, loss="cross_entropy")
    assert torch.equal(torch.get_rng_state(), before)
    streamed.hessian @ torch.ones(streamed.size, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("made", ["loader", "function"])
def test_augmentations_of_the_global_generator_are_the_same_in_every_pass(made: str) -> None:
    def load() -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(Augmented(), batch_size=4)

    torch.manual_seed(3)
    state = torch.get_rng_state()
    batches = list(load())
    torch.set_rng_state(state)
    layers = lq.split(nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double())
    torch.manual_seed(3)
    source = load() if made == "loader" else load
    streamed = lq.StreamedProblem(layers, source, loss="cross_entropy")
    torch.manual_seed(3)
    given = lq.StreamedProblem(layers, batches, loss="cross_entropy")
    torch.testing.assert_close(streamed.gradient, given.gradient, rtol=0, atol=0)
    v = torch.ones(streamed.size, dtype=torch.float64)
    for seed in range(2):
        torch.manual_seed(seed)
        torch.testing.assert_close(streamed.hessian @ v, given.hessian @ v, rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dropout_masks_on_a_gpu_are_the_same_in_every_product() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double().cuda()
    x, y = (part.cuda() for part in data())
    chunks = lq.StreamedProblem.chunks(x, y, 4)
    streamed = lq.StreamedProblem(lq.split(net), chunks, loss="cross_entropy")
    v = torch.ones(streamed.size, dtype=torch.float64, device="cuda")
    first = streamed.hessian @ v
    torch.rand(7, device="cuda")
    before = torch.cuda.get_rng_state()
    torch.testing.assert_close(streamed.hessian @ v, first, rtol=1e-12, atol=1e-14)
    assert torch.equal(torch.cuda.get_rng_state(), before)
