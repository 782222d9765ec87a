"""A write anywhere in a tensor is noticed, and one that was taken back is forgiven."""

import pytest
import torch
from small_models import mlp, normal
from torch import nn

import llqr_mf as lq
from llqr_mf.network.snapshot import WIDTH, Snapshot

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.complex64]
SHAPES = [(), (7, 3), (WIDTH,), (WIDTH + 2,), (101, 203), (3, 5, 7, 64), (3, 4096)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_entry_and_any_exchange_of_rows(dtype, shape):
    x = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for tensor in (x, x.mT if x.ndim > 1 else x, x[1:] if x.ndim and len(x) > 1 else x):
        made, old = Snapshot([("w", tensor)]), tensor.clone()
        assert made.changed(look="all") is None
        for place in {0, tensor.numel() // 2, tensor.numel() - 1}:
            index = torch.unravel_index(torch.tensor(place), tensor.shape)
            tensor[index] += 1
            assert made.changed() == "w"
            tensor.copy_(old)
            assert made.changed() is None
        if tensor.ndim > 1:
            for turned in (tensor.roll(1, 0), tensor.flip(-1)):
                tensor.copy_(turned.clone())
                assert made.changed() == "w"
                tensor.copy_(old)


@pytest.mark.parametrize("size", [7, 3 * WIDTH])
def test_nan_is_as_it_was_where_its_bits_are(size):
    x = torch.full((size,), float("nan"))
    made = Snapshot([("w", x)])
    x.add_(0)
    assert made.changed() is None
    x[5] = 0
    assert made.changed() == "w"


@pytest.mark.parametrize("write", [lambda w: w[:, 3].zero_(), lambda w: w[77].add_(1)])
def test_a_pruned_column_or_a_moved_row_of_a_wide_layer_is_refused(write):
    model = mlp(4, 100, 120, 3)
    x, y = normal(6, 4), torch.arange(6) % 3
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy")
    with torch.no_grad():
        write(model[2].weight)
    with pytest.raises(RuntimeError, match=r"2\.weight was written to after"):
        problem.hessian @ problem.gradient


class Scaled(nn.Module):
    """Reads a buffer, a frozen weight and the statistics of a norm."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.unread, self.slope = nn.Linear(2, 2), nn.PReLU()
        self.register_buffer("scale", torch.tensor(2.0))
        self.head.weight.requires_grad_(False)
        self.slope.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(self.slope(self.norm(self.linear(x)) * self.scale)))


@pytest.mark.parametrize("name", ["scale", "norm.running_var", "head.weight", "slope.weight"])
def test_what_is_read_and_not_trained_is_watched_too(name):
    model = Scaled().double().eval()
    model.unread.requires_grad_(False)
    x, y = normal(6, 4), torch.arange(6) % 3
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy")
    v = torch.ones_like(problem.gradient)
    before = problem.hessian @ v
    with torch.no_grad():
        model.unread.weight += 1  # no call reads it
        assert torch.equal(problem.hessian @ v, before)
        tensor = model.state_dict()[name]
        old = tensor.clone()
        tensor.mul_(1.5)
        with pytest.raises(RuntimeError, match=f"{name} was written to after"):
            problem.hessian @ v
        tensor.copy_(old)
    assert torch.equal(problem.hessian @ v, before)


def test_a_batch_from_inference_mode():
    """Torch does not count writes to it."""
    model, y = mlp(4, 5, 3), torch.arange(6) % 3
    with torch.inference_mode():
        x = normal(6, 4)
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy")
    assert lq.solve(problem, "cg").status.ok
    with torch.inference_mode():
        x[2, 1] += 1
    with pytest.raises(RuntimeError, match="inputs"):
        problem.hessian @ problem.gradient


@pytest.mark.parametrize("method", ["auto", "cg", "dual"])
def test_a_solve_sees_writes_that_torch_does_not_count(method):
    """Old optimizers step through `.data`, and vector_to_parameters replaces it."""
    model = mlp(4, 60, 50, 3)
    x, y = normal(6, 4), torch.arange(6) % 3
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy")
    lq.solve(problem, method)
    model[2].weight.data[3, 7] += 1
    with pytest.raises(RuntimeError, match=r"2\.weight was written to after"):
        lq.solve(problem, method)
    model[2].weight.data[3, 7] -= 1
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(flat * 1.5, model.parameters())
    with pytest.raises(RuntimeError, match="was written to after"):
        lq.solve(problem, method)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_of_a_fused_optimizer_is_seen_by_products_and_gradients(kind):
    """Torch does not count what it writes."""
    reads = (
        lambda problem: problem.gradient,
        lambda problem: problem.hessian @ torch.ones(problem.size).double(),
    )
    for read in reads:
        model = mlp(4, 60, 50, 3)
        x, y = normal(6, 4), torch.arange(6) % 3
        problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy")
        nn.functional.cross_entropy(model(x), y).backward()
        kind(model.parameters(), lr=0.1, fused=True).step()
        with pytest.raises(RuntimeError, match="was written to after"):
            read(problem)


def test_a_batch_with_gaps_in_memory_is_not_held_twice():
    x = torch.zeros(50, 20_000)[:, :10_000]
    (view, _) = Snapshot([("x", x)])._glimpses[0]
    assert view.untyped_storage().nbytes() < 2048
