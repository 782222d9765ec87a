"""What a user can get wrong: each is a ValueError that names it, before anything has changed."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from linear_operator.operators import DiagLinearOperator
from small_models import F64, ConvNet, assert_unchanged, images, mlp, network, normal, seeded
from small_models import state_of as state
from torch import nn

import llqr_mf as lq
from llqr_mf.metrics import Newton, StateCosts

LABELS = torch.tensor([0, 2, 1, 1])


def refused(model, message, *, inputs=None, targets=LABELS, layers=None, error=ValueError, **given):
    """`from_network` raises, and the model, its buffers, .grad and the random state are as before.

    The model is a ConvNet in train mode unless told otherwise: its BatchNorm would move.
    """
    given = {"loss": "cross_entropy"} | given
    layers = lq.split(model) if layers is None else layers
    before = state(model)
    with pytest.raises(error, match=message):
        lq.LQRProblem.from_network(layers, images() if inputs is None else inputs, targets, **given)
    assert_unchanged(model, before)


@pytest.fixture
def model():
    model = seeded(ConvNet).train()
    model.head.bias.grad = torch.ones(3, dtype=F64)
    return model


def test_a_good_call_changes_nothing_either(model):
    before = state(model)
    for metric in ("gauss_newton", "newton"):
        problem = lq.LQRProblem.from_network(
            *(lq.split(model), images(), LABELS), loss="cross_entropy", metric=metric, damping=30.0
        )
        lq.solve(problem, "cg")
        problem.value(1) @ torch.ones(problem.A[1].shape[1], dtype=F64)
    assert_unchanged(model, before)


# ---- the batch


def filled(value):
    x = images()
    x[1, 0, 2, 2] = value
    return x


@pytest.mark.parametrize(
    "inputs, message",
    [
        (filled(math.nan), r"inputs\[0\] has entries that are NaN or infinite"),
        (filled(math.inf), r"inputs\[0\] has entries that are NaN or infinite"),
        (images()[:0], r"inputs\[0\] is empty, of shape \(0, 1, 4, 4\): give samples"),
        (torch.tensor(1.0), r"inputs\[0\] is empty, of shape \(\)"),
        (images(dtype=torch.float32), r"inputs\[0\] is torch.float32 .*convert it with \.to"),
        (images().to("meta"), r"inputs\[0\] is on meta .*move it with \.to\('cpu'\)"),
        ((), r"inputs holds 0 tensors .* a model that takes 1: pass a tuple"),
        ((images(), images()), r"inputs holds 2 tensors .* a model that takes 1"),
        ([images()], "inputs holds no tensor: pass one tensor, or a tuple of them"),
        ("images", "inputs holds no tensor"),
    ],
)
def test_inputs(model, inputs, message):
    refused(model, message, inputs=inputs)


@pytest.mark.parametrize(
    "targets, message",
    [
        (torch.tensor([0, 2, 1, 3]), r"targets.*3"),
        (torch.tensor([0, 2, 1, -1]), r"targets.*-1"),
        (LABELS[:3], "targets"),
        (LABELS[:0], r"targets is empty, of shape \(0,\)"),
        (LABELS.unsqueeze(1), "targets"),
        (LABELS.to("meta"), r"targets is on meta .*move it with"),
        ([0, 2, 1, 1], r"targets is a list: pass a tensor"),
        (None, r"targets is a NoneType: pass a tensor"),
        (torch.full((4, 3), math.nan, dtype=F64), "targets has entries that are NaN"),
    ],
)
def test_targets(model, targets, message):
    refused(model, message, targets=targets)


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits", lambda y, t: (y - t).square().mean()])
def test_float_targets(model, loss):
    targets = normal(4, 3).sigmoid()
    targets[2, 1] = math.nan
    refused(model, "targets", targets=targets, loss=loss)
    if isinstance(loss, str):
        refused(model, "targets .*float", targets=torch.zeros(4, 3, dtype=torch.long), loss=loss)
        refused(model, "targets have shape", targets=normal(4, 2), loss=loss)


@pytest.mark.parametrize(
    "name, inputs",
    [
        ("0", normal(4, 5)),  # a Linear layer of width 4
        ("conv1", normal(4, 2, 4, 4)),  # one channel too many
        ("head", normal(4, 1, 6, 6)),  # fits until it is flattened
    ],
)
def test_a_shape_that_does_not_fit_names_the_module(name, inputs):
    model = mlp(4, 5, 3) if name == "0" else seeded(ConvNet).train()
    refused(model, rf"'{name}'", inputs=inputs)


# ---- the model


def test_a_parameter_that_is_not_finite(model):
    with torch.no_grad():
        model.norm2.weight[1] = math.nan
    refused(model, r"outputs are NaN or infinite: parameter 'norm2\.weight' is not finite")


@pytest.mark.parametrize("check", [True, False])
def test_a_forward_pass_that_overflows(check):
    model = mlp(4, 5, 3, activation=nn.Softplus)
    with torch.no_grad():
        model[2].weight.fill_(1e308)
    refused(model, "the forward pass overflows", inputs=normal(4, 4), check=check)


def test_logits_may_be_minus_infinity_where_a_class_is_masked():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("mask", torch.tensor([False, False, True]))

        def forward(self, x):
            return self.linear(x).masked_fill(self.mask, -math.inf)

    model, inputs, targets = seeded(Masked), normal(4, 4), torch.tensor([0, 1, 1, 0])
    problem = lq.LQRProblem.from_network(
        lq.split(model), inputs, targets, loss="cross_entropy", damping=0.1
    )
    assert bool(torch.isfinite(lq.solve(problem, "cg").step).all())


def test_nothing_to_train(model):
    model.requires_grad_(False)
    refused(model, r"no parameter with requires_grad=True")
    bare = nn.Sequential(nn.Tanh(), nn.Flatten())
    refused(bare, r"no parameter with requires_grad=True")


def test_outputs_that_depend_on_no_parameter():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)

        def forward(self, x):
            return x * 2

    refused(seeded(Detached), "depends on no trainable parameter", inputs=torch.ones(4, 3).long())


class Returns(nn.Module):
    """A linear layer whose result is wrapped."""

    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x):
        return self.wrap(self.linear(x))


@pytest.mark.parametrize(
    "wrap, kind",
    [
        (lambda y: (y, y), "a tuple, not one tensor"),
        (lambda y: {"logits": y}, r"a \w*dict, not one tensor"),
        (lambda y: None, "a NoneType, not one tensor"),
    ],
    ids=["tuple", "dict", "None"],
)
def test_outputs_that_are_no_tensor(wrap, kind):
    refused(seeded(lambda: Returns(wrap)), f"the model's output is {kind}", inputs=normal(4, 4))


def test_outputs_that_are_a_single_number():
    refused(seeded(lambda: Returns(torch.sum)), "outputs are a single number", inputs=normal(4, 4))


def test_parameters_of_two_dtypes_or_devices(model):
    model.head.to(torch.float32)
    refused(model, r"parameter 'head\.weight' is torch.float32 on cpu and 'conv1\.weight' is torch")
    model = seeded(ConvNet)
    layers = lq.split(model)
    model.head.to("meta")
    refused(
        *(model, r"parameter 'head\.weight' is torch.float64 on meta .*move the model"),
        layers=layers,
    )
    with pytest.raises(ValueError, match=r"'head\.weight' is on the meta device"):
        lq.split(model)


def test_a_model_that_draws_numbers_from_numpy():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x) * float(np.random.rand())

    refused(seeded(Noisy), "the model is not deterministic: two runs", inputs=normal(4, 4))


def test_a_model_that_counts_its_calls():
    calls = itertools.count(1)

    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x) / next(calls)

    refused(seeded(Counter), "not deterministic", inputs=normal(4, 4))


def test_a_counter_in_the_module_is_left_alone():
    """The layers are those of the model's own next call; they run on a copy."""

    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(4, 3), [0]

        def forward(self, x):
            self.calls[0] += 1
            return self.linear(x) / self.calls[0]

    model = seeded(Counter)
    problem = lq.LQRProblem.from_network(
        lq.split(model), normal(4, 4), LABELS, loss="cross_entropy"
    )
    assert model.calls == [0]
    torch.testing.assert_close(problem.origin.outputs, model(normal(4, 4)), rtol=1e-12, atol=0)


def test_a_model_that_is_not_what_was_traced():
    class Flagged(nn.Module):
        """Its code branches on something that split() could see only once."""

        def __init__(self):
            super().__init__()
            self.linear, self.twice = nn.Linear(4, 3), False

        def forward(self, x):
            return self.linear(x) * (2 if self.twice else 1)

    model = seeded(Flagged)
    layers = lq.split(model)
    model.twice = True
    refused(
        model, "layers compute something else than the model", inputs=normal(4, 4), layers=layers
    )


def test_random_numbers_from_torch_are_the_same_twice():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))).train()
    before = state(model)
    problem = lq.LQRProblem.from_network(
        lq.split(model), normal(4, 4), LABELS, loss="cross_entropy"
    )
    assert_unchanged(model, before)
    outputs = model(normal(4, 4))  # draws the masks that the problem saw
    torch.testing.assert_close(problem.origin.outputs, outputs, rtol=1e-12, atol=0)


# ---- the layers


def test_a_mode_that_has_changed_since(model):
    layers = lq.split(model)
    model.eval()
    refused(model, r"'the model' was switched between train\(\) and eval\(\)", layers=layers)
    model.train()
    model.norm1.eval()
    refused(model, r"'norm1' was switched .*call split\(\) again", layers=layers)


def test_layers_that_are_not_one_split(model):
    layers, others = lq.split(model), lq.split(model)
    whole = "layers must be the whole list that one split"
    for wrong in (
        layers[:-1],
        layers[1:],
        layers[::-1],
        [*layers[:2], *others[2:]],
        [*layers, layers[-1]],
        layers[:2] + layers[3:],
    ):
        refused(model, whole, layers=wrong)
    refused(model, "layers is empty", layers=[])
    refused(model, "layers holds a Conv2d: pass what split", layers=[model.conv1])


# ---- damping, loss, metric


def ones(n, dtype=F64):
    return DiagLinearOperator(torch.ones(n, dtype=dtype))


@pytest.mark.parametrize(
    "damping, message",
    [
        (-1e-3, r"damping is -0\.001: give a finite number >= 0"),
        (math.nan, "damping is nan"),
        (math.inf, "damping is inf"),
        (torch.tensor(-1.0), "damping is -1"),
        ([1.0, -1.0, 1.0], r"damping of layer 1 is -1\.0|one number or operator for each"),
        ([1.0], r"one number or operator for each of the 7 layers"),
        ([1.0] * 8, r"for each of the 7 layers"),
        ([1.0, 1.0, 1.0, -2.0, 1.0, 1.0, 1.0], r"damping of layer 3 is -2\.0"),
        ([1.0, ones(9), 1.0, 1.0, 1.0, 1.0, 1.0], r"damping of layer 1 has shape \(9, 9\), not"),
        ({"conv1": 1.0, "nothing": 1.0}, r"'nothing' is no layer: the layers with parameters are"),
        ({"conv1": 1.0}, r"layer 'norm1' is missing: the layers with parameters are \['conv1'"),
        (ones(95), r"damping has shape \(95, 95\), not \(96, 96\)"),
        (ones(96, torch.float32), r"damping is torch.float32 .*convert"),
        (normal(96, 96), "damping is not symmetric"),
        (torch.full((96, 96), math.nan, dtype=F64), "damping has entries that are NaN"),
        ("large", "damping must be a number"),
        (None, "damping must be a number"),
    ],
)
def test_damping(model, damping, message):
    refused(model, message, damping=damping)
    problem = lq.LQRProblem.from_network(
        lq.split(model), images(), LABELS, loss="cross_entropy", damping=0.1
    )
    with pytest.raises(ValueError, match=message):
        problem.with_damping(damping)


def test_damping_that_is_no_operator(model):
    wrong = [1.0, 1.0, 1.0, "1", 1.0, 1.0, 1.0]
    refused(model, "damping of layer 3 is a str: give a tensor", damping=wrong, error=TypeError)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"loss": "crossentropy"}, ValueError, "loss 'crossentropy' is unknown: choose one of"),
        ({"loss": 3}, TypeError, "loss is a int: give one of"),
        ({"loss": nn.MSELoss(reduction="sum")}, ValueError, "use reduction='mean'"),
        ({"loss": lambda y, t: y}, ValueError, "must return a scalar tensor"),
        ({"loss": lambda y, t: y.detach().sum()}, ValueError, "does not depend on the outputs"),
        ({"metric": "gn"}, ValueError, "metric 'gn' is unknown: choose one of 'gauss_newton'"),
        ({"metric": 3}, TypeError, "metric is 3: give one of"),
        (
            {"loss": lambda y, t: y.square().mean(), "metric": "fisher"},
            *(ValueError, "names no output distribution"),
        ),
        ({"metric": StateCosts({"nothing": 1.0})}, ValueError, "'nothing', which is no layer of"),
        ({"metric": StateCosts({7: 1.0})}, ValueError, "cost on '7', which is no layer of"),
        (
            {"metric": StateCosts({0: torch.eye(3, dtype=F64)}, base=Newton())},
            *(ValueError, r"the cost on layer '0' has shape \(3, 3\), not \(128, 128\)"),
        ),
        (
            {"metric": StateCosts({0: torch.eye(128)})},
            *(ValueError, "the cost on layer '0' is torch.float32 .*convert"),
        ),
    ],
)
def test_losses_and_metrics(model, options, error, message):
    refused(model, message, error=error, **options)


def test_costs_that_are_no_costs():
    for costs, error in (
        ({-1: 1.0}, ValueError),
        ({1.5: 1.0}, TypeError),
        ({0: -1.0}, ValueError),
        ({0: math.nan}, ValueError),
        ({0: "1"}, TypeError),
        ({0: normal(3, 4)}, ValueError),
        ({0: normal(3, 3)}, ValueError),
    ):
        with pytest.raises(error, match=r"costs|cost 0"):
            StateCosts(costs)


# ---- steps


def test_steps_that_do_not_fit():
    model, inputs, targets = network("mlp")
    problem = lq.LQRProblem.from_network(lq.split(model), inputs, targets, loss="cross_entropy")
    for u in (normal(5), normal(5, 73), normal(73, dtype=torch.float32)):
        with pytest.raises(ValueError, match=r"cannot multiply a tensor|convert the right-hand"):
            problem.objective(u)
    for t in (-1, 6, 99):
        with pytest.raises(ValueError, match=re.escape(f"time {t} is outside of 0..5")):
            problem.value(t)
    with pytest.raises(ValueError, match=r"time 5 is outside of 0\.\.4"):
        problem.gain(5)
