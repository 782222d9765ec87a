"""What keeps the layers of a model follows the model, or says that it has changed."""

import functools
import itertools

import pytest
import torch
from oracle import dense_jacobian
from small_models import normal, seeded
from torch import nn
from torch.nn import functional as F

import llqr_mf as lq
from llqr_mf.gaussian_process import Laplace, NetworkMean, NeuralTangentKernel
from llqr_mf.probe.sharpness import Sharpness

X, Y = normal(16, 4), torch.arange(16) % 3
EXACT = lq.optimizer.Recipe(samples=None, ema=0.0)
ALONE = lq.optimizer.Subspace(averaging=0.0, check_every=1000)  # no other passes of the model
TEMPERATURE = {"value": 1.0}
CALLS = itertools.count(1)


class Config:
    scale = 1.0


class Net(nn.Module):
    """Its code reads attributes of every kind."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
        self.active, self.temperature, self.config = 0, 1.0, Config()
        self.mask, self.activation = torch.ones(6, dtype=torch.float64), torch.tanh

    def forward(self, x):
        h = self.activation(self.body(x)) * self.mask
        h = self.heads[self.active](h) * self.config.scale
        return h / (self.temperature * TEMPERATURE["value"])


def anneal(model):
    model.temperature = 0.25


def switch_head(model):
    model.active = 1


def configure(model):
    model.config.scale = 3.0


def replace_tensor(model):
    model.mask = torch.arange(6).double()


def replace_function(model):
    model.activation = torch.sin


def replace_module(model):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model.heads[0] = nn.Linear(6, 3).double()


def replace_forward(model):
    model.forward = functools.partial(lambda x, model: model.heads[0](model.body(x)), model=model)


def set_global(model):
    TEMPERATURE["value"] = 0.5


def hook(model):
    model.body.register_forward_hook(lambda module, args, output: output * 2)


CHANGES = [
    *(anneal, switch_head, configure, replace_tensor, replace_function),
    *(replace_forward, set_global, hook),
]


@pytest.fixture(autouse=True)
def _one_temperature():
    TEMPERATURE["value"] = 1.0
    yield
    TEMPERATURE["value"] = 1.0


def net():
    return seeded(Net)


def wrap(model, **options):
    return lq.LLQR(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        loss="cross_entropy",
        structure="diagonal",
        recipe=EXACT,
        **options,
    )


@pytest.mark.parametrize("change", CHANGES)
def test_a_refresh_learns_the_model_that_there_is(change):
    model = net()
    optimizer = wrap(model)
    optimizer.refresh(X, Y)
    change(model)
    assert optimizer.refresh(X, Y)
    anew = wrap(model)
    anew.refresh(X, Y)
    assert torch.equal(optimizer.structure.to_dense(), anew.structure.to_dense())


@pytest.mark.parametrize("when", [0, 1, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_a_subspace_step_is_of_the_model_that_there_is_at_every_step(change, when):
    """Its loss is the model's, also where a pass over a share of the samples has to show it."""
    model = net()
    optimizer = wrap(model, step="subspace")
    for step in range(4):
        if step == when:
            change(model)
        wanted = F.cross_entropy(model(X), Y).item()
        # The same sums in another order.
        assert float(optimizer.step(X, Y)) == pytest.approx(wanted, rel=1e-13)


def test_replaced_modules_have_other_parameters():
    model = net()
    optimizer = wrap(model, step="subspace")
    optimizer.step(X, Y)
    replace_module(model)
    wanted = F.cross_entropy(model(X), Y).item()
    assert float(optimizer.step(X, Y)) == pytest.approx(wanted, rel=1e-13)


class Sized(nn.Module):
    """Takes inputs of the width that is set, which the layers of another do not."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"4": nn.Linear(4, 3), "7": nn.Linear(7, 3)})
        self.width = 4

    def forward(self, x):
        return self.inner[str(self.width)](x)


def test_layers_that_fail_where_the_model_does_not_are_stale():
    model, x = seeded(Sized), normal(16, 7)
    layers = lq.split(model)
    optimizers = [wrap(model), wrap(model, step="subspace")]
    for optimizer in optimizers:
        optimizer.refresh(X, Y)
    with pytest.raises(ValueError, match=r"failed on this batch: .*$"):
        lq.LQRProblem.from_network(layers, x, Y, loss="cross_entropy")
    model.width = 7
    assert optimizers[0].refresh(x, Y)
    wanted = F.cross_entropy(model(x), Y).item()
    assert float(optimizers[1].step(x, Y)) == pytest.approx(wanted, rel=1e-13)
    with pytest.raises(ValueError, match=r"The model itself takes it: .*call split\(\) again"):
        lq.LQRProblem.from_network(layers, x, Y, loss="cross_entropy")


def test_passes_over_a_share_of_the_samples_take_turns():
    """A change that some samples alone show is seen within eight steps."""

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.rows = nn.Linear(4, 3), set()

        def forward(self, x):
            if isinstance(x, torch.Tensor):
                self.rows |= set(x[:, 0].tolist())
            return self.linear(x)

    model = seeded(Seen)
    optimizer = wrap(model, step="subspace", subspace=ALONE)
    optimizer.step(X, Y)
    model.rows = set()
    for step in range(8):
        assert len(model.rows) == 2 * step
        optimizer.step(X, Y)
    assert model.rows == set(X[:, 0].tolist())


def test_dropout_rates_and_stochastic_depth():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.drop, self.b = nn.Linear(4, 6), nn.Dropout(0.0), nn.Linear(6, 3)
            self.norm, self.rate = nn.BatchNorm1d(6), 0.0

        def forward(self, x):
            h = self.norm(self.drop(self.a(x)))
            if self.rate and self.training:
                h = h * (torch.rand(len(x), 1, dtype=x.dtype) > self.rate)
            return self.b(h)

    model = seeded(Deep)
    optimizer = wrap(model, step="subspace")
    for step in range(5):
        if step == 2:
            model.drop.p = 0.9
        if step == 3:
            model.rate = 0.5
        torch.manual_seed(step)
        twin = seeded(Deep)
        twin.load_state_dict(model.state_dict())
        twin.drop.p, twin.rate = model.drop.p, model.rate
        wanted = F.cross_entropy(twin(X), Y).item()
        random = torch.get_rng_state()
        torch.manual_seed(step)
        assert float(optimizer.step(X, Y)) == pytest.approx(wanted, rel=1e-12)
        assert torch.equal(torch.get_rng_state(), random), step
        # The running statistics have moved once, as in training.
        assert torch.equal(model.norm.running_var, twin.norm.running_var), step
        assert int(model.norm.num_batches_tracked) == step + 1


def test_a_step_that_comes_to_nothing_moves_no_statistics():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    model = model.double()
    optimizer = wrap(model, step="subspace")
    optimizer.step(X, Y)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():
        model[3].bias[0] = float("nan")
    assert optimizer.step(X, Y) is None and optimizer.counts.skipped == 1
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(model.state_dict()[name], state[name])
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("change", CHANGES)
def test_a_tangent_kernel_and_a_mean_follow(change):
    model = net()
    kernel, mean = NeuralTangentKernel(model), NetworkMean(model)
    for _ in range(2):  # the second matrix is one that was kept
        J = dense_jacobian(model, X)
        assert torch.allclose(kernel(X).to_dense(), J @ J.mT, rtol=1e-10, atol=1e-12)
    change(model)
    if change is not hook:
        J = dense_jacobian(model, X)
    else:
        J = torch.autograd.functional.jacobian(lambda *w: run(model, w), tuple(model.parameters()))
        J = torch.cat([part.reshape(48, -1) for part in J], 1)
    assert torch.allclose(kernel(X).to_dense(), J @ J.mT, rtol=1e-10, atol=1e-12)
    assert torch.allclose(mean(X), model(X).detach())


def run(model, weights):
    named = dict(zip(dict(model.named_parameters()), weights, strict=True))
    return torch.func.functional_call(model, named, (X,))


@pytest.mark.parametrize("change", CHANGES)
def test_a_stream_and_a_posterior_say_that_the_model_has_changed(change):
    model = net()
    layers = lq.split(model)
    stream = lq.StreamedProblem(
        layers, list(zip(X.split(4), Y.split(4), strict=True)), loss="cross_entropy"
    )
    posterior = Laplace(lq.LQRProblem.from_network(layers, X, Y, loss="cross_entropy"))
    stream.hessian @ stream.gradient
    posterior.predict(X)
    change(model)
    with pytest.raises(RuntimeError, match="no longer that of the first pass"):
        stream.hessian @ stream.gradient
    with pytest.raises(RuntimeError, match="no longer that of the posterior"):
        posterior.predict(X)
    with pytest.raises(ValueError, match=r"call split\(\) again"):
        lq.StreamedProblem(layers, [(X, Y)], loss="cross_entropy")
    with pytest.raises(ValueError, match=r"call split\(\) again"):
        lq.LQRProblem.from_network(layers, X, Y, loss="cross_entropy")


def test_sharpness_is_of_the_model_that_there_is():
    model = net()
    watch = Sharpness(model, X, Y, loss="cross_entropy", rtol=1e-8)
    watch.measure(0)
    anneal(model)
    anew = Sharpness(model, X, Y, loss="cross_entropy", rtol=1e-8).measure(1)
    # Twice the eigenvalues' own tolerance.
    assert watch.measure(1).values[0] == pytest.approx(anew.values[0], rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_change_shows_in_outputs_of_any_size_and_dtype(scale, dtype):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.factor = nn.Linear(4, 3), 1.0

        def forward(self, x):
            return self.linear(x) * self.factor

    if dtype == torch.float16 and scale == 1e6:
        pytest.skip("float16 overflows there")
    model = Small().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    x, y = X.to(dtype), normal(16, 3).to(dtype)
    layers = lq.split(model)
    lq.LQRProblem.from_network(layers, x, y, loss="mse")
    model.factor = 1.3
    with pytest.raises(ValueError, match="the layers compute something else"):
        lq.LQRProblem.from_network(layers, x, y, loss="mse")


def test_a_model_that_is_never_the_same_says_so_and_nothing_has_moved():
    """Random numbers that are not torch's."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            assert x.dim() == 2
            return self.linear(x) * next(CALLS)

    model = Noisy().double()
    optimizer = wrap(model, step="subspace")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="the model is not deterministic"):
        optimizer.step(X, Y)
    with pytest.raises(ValueError, match="the model is not deterministic"):
        optimizer.refresh(X, Y)
    assert all(map(torch.equal, before, model.parameters()))
    assert optimizer.counts == lq.optimizer.Counts()


def test_a_refresh_costs_one_pass_of_the_model_and_a_step_a_share_of_one():
    class Counted(Net):
        samples = 0

        def forward(self, x):
            if isinstance(x, torch.Tensor):
                Counted.samples += len(x)
            return super().forward(x)

    model = seeded(Counted)
    optimizer = wrap(model)
    optimizer.refresh(X, Y)
    assert Counted.samples == len(X)
    optimizer.refresh(None, batches=[(X, Y), (X, Y)])
    assert Counted.samples == 2 * len(X)

    optimizer = wrap(model, step="subspace", subspace=ALONE, refresh_every=1000)
    optimizer.step(X, Y)
    optimizer.step(X, Y)
    Counted.samples = 0
    optimizer.step(X, Y)
    assert 0 < Counted.samples <= len(X) // 8
