"""A model that takes another way where its outputs stay the same: noticed, and no false alarm."""

from functools import partial

import pytest
import torch
from oracle import dense_jacobian
from small_models import normal, seeded
from torch import nn

import llqr_mf as lq
from llqr_mf.errors import StaleLayersError
from llqr_mf.gaussian_process import NeuralTangentKernel
from llqr_mf.network import tracing
from llqr_mf.probe.sharpness import Sharpness

X, Y = normal(9, 4), torch.arange(9) % 3


class Settings:
    stop = False


class Net(nn.Module):
    """Its body may be left out of the gradient in many ways."""

    stop_everywhere = False

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.stop, self.frozen, self.settings = False, False, Settings()
        self.options = {"phase": "all"}
        self.calls, self.losses, self.note = 0, [], "fresh"

    def forward(self, x):
        self.calls += 1
        self.losses.append(float(self.calls))
        with torch.set_grad_enabled(not self.frozen):
            h = self.body(x).tanh()
        if (
            self.stop
            or self.settings.stop
            or self.stop_everywhere
            or self.options["phase"] == "head"
        ):
            h = h.detach()
        return self.head(h)


class Hidden(nn.Module):
    """One call: what it branches on is not in the graph."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        return self.net(x) if x.sum() < 1e9 else x


def stop(model):
    model.stop = True


def freeze(model):
    model.frozen = True


def configure(model):
    model.settings.stop = True


def choose_phase(model):
    model.options["phase"] = "head"


def normalise(model):
    nn.utils.parametrizations.weight_norm(model.body)


def double_gradients(model):
    model.head.register_full_backward_hook(lambda module, into, out: (*(2 * g for g in into),))


CHANGES = [stop, freeze, configure, choose_phase, normalise, double_gradients]


def built(cls=Net):
    return seeded(cls).double()


def kernel(model):
    # As autograd has it: a hook on a module belongs to its backward pass.
    J = dense_jacobian(model, X)
    return J @ J.mT


@pytest.mark.parametrize("change", CHANGES)
def test_layers_say_so_and_a_kept_split_follows(change):
    model = built()
    layers, ntk = lq.split(model), NeuralTangentKernel(model)
    lq.LQRProblem.from_network(layers, X, Y, loss="cross_entropy")
    ntk(X).to_dense()
    change(model)
    with pytest.raises(StaleLayersError, match="split"):
        lq.LQRProblem.from_network(layers, X, Y, loss="cross_entropy")
    torch.testing.assert_close(ntk(X).to_dense(), kernel(model))


@pytest.mark.parametrize("path", ["stop", "frozen"])
def test_inside_a_module_that_is_one_call(path):
    model = built(Hidden)
    layers = lq.split(model)
    assert layers[0].program.whole
    ntk = NeuralTangentKernel(model)
    ntk(X).to_dense()
    for value in (True, False):
        setattr(model.net, path, value)
        # It runs as it is, and what is called can't be stale.
        problem = lq.LQRProblem.from_network(layers, X, Y, loss="cross_entropy")
        torch.testing.assert_close(problem.output_jacobian.to_dense(), dense_jacobian(model, X))
        torch.testing.assert_close(ntk(X).to_dense(), kernel(model))


def test_an_attribute_of_the_class():
    model = built(type("Other", (Net,), {"stop_everywhere": False}))
    watch = Sharpness(model, X, Y, loss="cross_entropy", metric="gauss_newton", rtol=1e-8)
    before = watch.measure(0).sharpness
    type(model).stop_everywhere = True
    after = watch.measure(1).sharpness
    fresh = lq.LQRProblem.from_network(lq.split(model), X, Y, loss="cross_entropy", damping=0.0)
    top = float(torch.linalg.eigvalsh(fresh.hessian.to_dense())[-1])
    assert before > 1.001 * top
    # Its residual bounds the error, and rtol is of the value.
    assert abs(after - top) <= 1e-8 * top


@pytest.mark.parametrize("cls", [Net, Hidden])
def test_counters_and_records_are_no_change_and_cost_one_trace(cls):
    model = built(cls)
    net = model if cls is Net else model.net
    layers = lq.split(model)
    traces, trace = [], tracing.trace

    def counted(*args):
        traces.append(args)
        return trace(*args)

    again = partial(counted, model, lambda twin, x: twin(x), 1)
    object.__setattr__(layers[0].program, "again", again)
    for _ in range(5):
        model(X)
        lq.LQRProblem.from_network(layers, X, Y, loss="cross_entropy")
    if cls is Net:
        net.note = "trained"
        lq.LQRProblem.from_network(layers, X, Y, loss="cross_entropy")
    # One for the counters, one for the note.
    assert len(traces) == (2 if cls is Net else 0)


def tie(model):
    model.heads[1].weight = model.heads[0].weight


def freeze_weight(model):
    model.heads[0].weight.requires_grad_(False)


def change_places(model):
    model.heads[0].weight.requires_grad_(False)
    model.heads[1].weight.requires_grad_(True)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x):
        return self.heads[0](x) + self.heads[1](x).tanh()


@pytest.mark.parametrize("change", [tie, freeze_weight, change_places])
def test_a_stream_is_of_the_parameters_of_its_first_pass(change):
    model = built(Heads)
    model.heads[1].weight.requires_grad_(change is not change_places)
    if change is tie:
        with torch.no_grad():
            model.heads[1].weight.copy_(model.heads[0].weight)
    batches = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    problem = lq.StreamedProblem(lq.split(model), batches, loss="cross_entropy")
    v = normal(problem.size, seed=3)
    before = problem.hessian @ v
    change(model)
    with pytest.raises(RuntimeError, match=r"heads\.[01]\.weight.*make the problem again"):
        problem.hessian @ v
    if change is freeze_weight:
        model.heads[0].weight.requires_grad_(True)
        torch.testing.assert_close(problem.hessian @ v, before)
