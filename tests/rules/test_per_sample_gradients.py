"""Gram matrices of calls without a rule: gradients of the samples one at a time, and few passes."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from oracle import dense_jacobian
from small_models import normal, seeded
from torch import nn

import llqr_mf as lq
from llqr_mf.gram import closed_form_gram, cross_gram, gram_diagonal, grams_of_groups
from llqr_mf.output_sweep import calls, required_factor
from llqr_mf.rules import GenericNode

N, CLASSES = 6, 3


class Opaque(nn.Module):
    """A module that is not looked into, since it asks for the size of what it is given."""

    def __init__(self, width=4, inner=None):
        super().__init__()
        self.first, self.inner = nn.Linear(3, width), inner
        self.last = nn.Linear(width, CLASSES)

    def forward(self, x):
        if x.ndim != 2:
            raise ValueError("rows, please")
        h = torch.tanh(self.first(self.seen(x)))
        return self.last(h if self.inner is None else self.inner(h))

    def seen(self, x):
        return x


class Normed(Opaque):
    def __init__(self):
        super().__init__(inner=nn.LayerNorm(4))


class Attentive(Opaque):
    """Every sample is a sequence of its own."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)

    def seen(self, x):
        x = torch.stack([x, x.square(), x.cos()], 1)
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


class Recurrent(Opaque):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 3, batch_first=True)

    def seen(self, x):
        return self.lstm(x.unsqueeze(-1))[0][:, -1]


class Nested(Opaque):
    """Derivatives of a part by the inputs, as physics-informed networks have them."""

    def seen(self, x):
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            total = torch.tanh(self.first(y)).square().sum()
            return torch.autograd.grad(total, y, create_graph=True)[0]


class Branches(Opaque):
    """Looks at values, which vmap does not allow."""

    def seen(self, x):
        return x if bool(x.detach().abs().max() < 1e3) else 2 * x


class Together(Opaque):
    """Statistics of the whole batch, of the input alone: the samples' gradients are apart."""

    def seen(self, x):
        return (x - x.mean(0)) / x.std(0)


class Neighbor(Opaque):
    def seen(self, x):
        return x + x.roll(2, 0)


class Never1(Opaque):
    """Does something else where there is one sample."""

    def seen(self, x):
        return x if len(x) > 1 else 3 * x


class AsManyRows(Opaque):
    """A frozen weight, and a trained one, with a row for each sample by chance."""

    def __init__(self):
        super().__init__(N)
        self.frozen = nn.Parameter(normal(N, 3, seed=5), requires_grad=False)

    def seen(self, x):
        return F.linear(x, self.frozen)[:, :3] + x


class Dropped(Opaque):
    def __init__(self):
        super().__init__(inner=nn.Dropout(0.5))


MODELS = {
    model.__name__: model
    for model in (Opaque, Normed, Attentive, Recurrent, Nested, Branches, Together, Neighbor)
} | {model.__name__: model for model in (Never1, AsManyRows, Dropped)}
WAYS = {
    "Nested": "_in_turn",
    "Recurrent": "_in_turn",
    "Branches": "_in_turn",
    **dict.fromkeys(("Together", "Neighbor", "Never1")),
    # The same random numbers, a sample at a time.
    "Dropped": "_in_turn",
}


def problem_of(name, dtype=torch.float64, **options):
    model = seeded(MODELS[name], dtype=dtype).train()
    x, y = normal(N, 3, seed=1, dtype=dtype), torch.arange(N) % CLASSES
    options = {"loss": "cross_entropy", "damping": 0.3, "check": False, **options}
    return model, lq.LQRProblem.from_network(lq.split(model), x, y, **options)


def generic_node(problem):
    (node,) = [b.node for b in calls(problem) if isinstance(b.node, GenericNode)]
    return node


def dense_rows(model, problem, groups=None):
    """Rows of L'J, index j N + n, of some parameters."""
    factor = required_factor(problem, "these tests")
    size = factor.rank * N
    eye = torch.eye(size, dtype=factor.dtype).reshape(size, factor.rank, N)
    jacobian = dense_jacobian(model, normal(N, 3, seed=1, dtype=factor.dtype))
    parts = jacobian.split(list(problem.system.sizes), dim=1)
    kept = [parts[i] for i in (range(len(parts)) if groups is None else groups)]
    return factor.factor(eye).reshape(size, -1) @ torch.cat(kept, 1)


@pytest.fixture(params=["whole", "blocks"])
def blocks(request, monkeypatch):
    """All gradients at once, or those of a sample or two, made again for every other block."""
    if request.param == "blocks":
        monkeypatch.setattr("llqr_mf.rules.base.GRAM_ELEMENTS", 500)
        monkeypatch.setattr("llqr_mf.rules.gram.CHUNK_ELEMENTS", 100)
        monkeypatch.setattr("llqr_mf.rules.per_sample.ROWS", 4)


@pytest.mark.parametrize("name", MODELS)
def test_against_dense_jacobians(name, blocks):
    """Sums of a few dozen products, to 1e-12."""
    model, problem = problem_of(name)
    rows = dense_rows(model, problem)
    expected = rows @ rows.mT / 0.3
    close = {"rtol": 1e-10, "atol": 1e-13}
    torch.testing.assert_close(closed_form_gram(problem), expected, **close)
    torch.testing.assert_close(gram_diagonal(problem), expected.diagonal(), **close)
    chosen = torch.tensor([7, 0, 12, 13, 1])
    torch.testing.assert_close(cross_gram(problem, chosen), expected[:, chosen], **close)
    groups = [[0], [1, 2], []]
    for group, found in zip(groups, grams_of_groups(problem, groups), strict=True):
        rows = dense_rows(model, problem, group) if group else torch.zeros(N * CLASSES, 1).double()
        torch.testing.assert_close(found, rows @ rows.mT, **close)


@pytest.mark.parametrize("name", MODELS)
def test_the_way_that_is_right_is_taken(name):
    _, problem = problem_of(name)
    closed_form_gram(problem)
    if name != "Dropped":  # out of order, samples would draw each other's random numbers
        cross_gram(problem, torch.tensor([7, 0, 12, 13, 1]))
    ways = generic_node(problem)._by_sample.ways
    assert (ways[0][0].__name__ if ways else None) == WAYS.get(name, "_at_once")


@pytest.mark.parametrize("name", ["Opaque", "Attentive", "Nested"])
def test_passes_through_the_whole_batch_are_few(name):
    """One, for the check; by pulls of the whole batch there would be N r for each parameter."""
    _, problem = problem_of(name)
    node = generic_node(problem)
    with mock.patch.object(node, "pull_all", wraps=node.pull_all) as pulls:
        assert closed_form_gram(problem) is not None
    assert sum(len(call.args[0][0]) for call in pulls.call_args_list) == 1


def test_where_the_call_cannot_be_cut_all_parameters_take_one_pass():
    _, problem = problem_of("Together")
    node = generic_node(problem)
    closed_form_gram(problem)  # finds out that it cannot
    with mock.patch.object(node, "pull_all", wraps=node.pull_all) as pulls:
        closed_form_gram(problem)
    assert sum(len(call.args[0][0]) for call in pulls.call_args_list) == N * CLASSES


def test_samples_in_turn_take_the_root_of_their_number_of_calls():
    samples = 25
    model = seeded(Nested)
    x, y = normal(samples, 3, seed=1), normal(samples, CLASSES, seed=2)[:, :1]
    model.last = nn.Linear(4, 1).double()
    problem = lq.LQRProblem.from_network(
        lq.split(model), x, y, loss="mse", damping=1.0, check=False
    )
    node = generic_node(problem)
    closed_form_gram(problem)
    each = node._by_sample
    with mock.patch.object(each, "pull_columns", wraps=each.pull_columns) as pulls:
        closed_form_gram(problem)
    assert pulls.call_count == math.isqrt(samples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Opaque", "Normed", "Nested", "Together"])
def test_narrow_dtypes(name, dtype):
    """Each entry rounds with the sizes of its two rows; a handful of roundings each."""
    model, problem = problem_of(name, dtype)
    rows = dense_rows(model.double(), problem_of(name)[1])
    found = closed_form_gram(problem)
    norms = rows.norm(dim=1)
    miss = (found.double() - rows @ rows.mT / 0.3).abs() / (norms.outer(norms) / 0.3)
    assert found.dtype == dtype
    assert float(miss.max()) <= 30 * torch.finfo(dtype).eps


class Keeps(Opaque):
    """Counts its calls, and keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.calls, self.shown = [0], None

    def seen(self, x):
        self.calls[0] += 1
        self.shown = x
        return x


def test_nothing_is_left_behind():
    model = seeded(Keeps)
    layers = lq.split(model)
    x, y = normal(N, 3, seed=1), torch.arange(N) % CLASSES
    problem = lq.LQRProblem.from_network(layers, x, y, loss="cross_entropy", damping=0.3)
    state = torch.get_rng_state()
    modules = [m for m in layers[0].program.modules.values() if isinstance(m, Keeps)]
    calls_before = [m.calls[0] for m in modules]
    closed_form_gram(problem)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == [0] and model.shown is None
    assert [m.calls[0] for m in modules] == calls_before
    assert all(m.shown is None or type(m.shown.detach().numpy()) for m in modules)


def test_random_numbers_are_left_alone():
    _, problem = problem_of("Dropped")
    state = torch.get_rng_state()
    closed_form_gram(problem)
    assert torch.equal(torch.get_rng_state(), state)
