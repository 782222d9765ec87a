"""What is said about a batch or a model that cannot be used, before anything is computed."""

import pytest
import torch
from networks import ZOO, normal
from torch import nn

import llqr_mf as lq

X, Y = torch.randn(4, 3), torch.randn(4, 2)


def problem(model, inputs=X, targets=Y, **options):
    layers = model if isinstance(model, list) else lq.split(model)
    return lq.LQRProblem.from_network(layers, inputs, targets, loss="mse", **options)


def test_layers_must_be_all_of_one_split():
    layers = lq.split(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)))
    for wrong in (layers[1:], layers[:2], layers[::-1]):
        with pytest.raises(ValueError, match="the whole list that one split"):
            problem(wrong)
    with pytest.raises(ValueError, match="layers is empty"):
        problem([])
    with pytest.raises(ValueError, match="layers holds a Linear"):
        problem([nn.Linear(3, 2)])


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.Linear(3, 2).requires_grad_(False), X, "no parameter with requires_grad=True"),
        (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2).double()), X, "parameter '1.weight' is"),
        (nn.Linear(3, 2), X.double(), r"inputs\[0\] is torch.float64 and the parameters"),
        (nn.Linear(3, 2), X[:0], r"inputs\[0\] is empty"),
        (nn.Linear(3, 2), X / 0, r"inputs\[0\] has entries that are NaN or infinite"),
        (nn.Linear(3, 2), (1,), "inputs holds no tensor"),
        (nn.Linear(3, 2), (X, X), "inputs holds 2 tensors and split.. saw a model that takes 1"),
        (nn.Linear(3, 2), X.to("meta"), r"inputs\[0\] is on meta"),
    ],
)
def test_batches_that_are_refused(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        problem(model, inputs)


def test_an_additive_mask_may_be_minus_infinity():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x, mask):
            return (self.linear(x) + mask).softmax(-1)

    mask = torch.tensor([0.0, 0.0, float("-inf")])
    gradient = problem(Model(), (X, mask), torch.rand(4, 3)).gradient
    assert bool(gradient.isfinite().all())
    with pytest.raises(ValueError, match=r"inputs\[1\] has entries"):
        problem(Model(), (X, -mask), torch.rand(4, 3))


def test_parameters_that_are_not_finite():
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.bias[0] = float("nan")
    with pytest.raises(ValueError, match="outputs are NaN or infinite: parameter 'bias' is not"):
        problem(model)


def test_models_that_change_from_call_to_call():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(3, 2), 0

        def forward(self, x):
            self.calls += 1
            return self.linear(x) * self.calls if x.sum() > -1e9 else x

    model = Counter()
    model.calls = 3
    layers = lq.split(model)
    for _ in range(2):
        # That of the model's own next call, which has not been made.
        outputs = problem(layers).origin.outputs
        assert torch.equal(outputs, model.linear(X).detach() * 4)
    assert model.calls == 3


def test_models_that_differ_from_themselves():
    calls = iter(range(1, 100))

    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x) * next(calls) if x.sum() > -1e9 else x

    with pytest.raises(ValueError, match="the model is not deterministic"):
        problem(Outside())


def test_layers_that_compute_something_else():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.scale = nn.Linear(3, 2), 1.0

        def forward(self, x):
            return self.linear(x) * self.scale

    model = Frozen()
    layers = lq.split(model)
    model.scale = 2.0
    with pytest.raises(ValueError, match="the layers compute something else than the model does"):
        problem(layers)
    problem(layers, check=False)
    problem(lq.split(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stand_in", [-1e4, -1e9, "least", float("-inf")])
def test_masked_outputs_hide_no_change(stand_in, dtype):
    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x, banned):
            fill = torch.finfo(dtype).min if stand_in == "least" else stand_in
            return (self.linear(x) * factor["value"]).masked_fill(banned, fill)

    factor = {"value": 1.0}
    model = Policy().to(dtype)
    layers = lq.split(model)
    banned = torch.arange(20).reshape(5, 4) % 3 > 0
    given = layers, (normal(5, 3).to(dtype), banned), banned.int().argmin(1)
    lq.LQRProblem.from_network(*given, loss="cross_entropy")
    factor["value"] = 1.3
    with pytest.raises(ValueError, match="the layers compute something else"):
        lq.LQRProblem.from_network(*given, loss="cross_entropy")


def test_every_network_passes_its_check():
    for name, case in ZOO.items():
        model, inputs, targets, loss = case()
        layers = lq.split(model)
        made = lq.LQRProblem.from_network(layers, inputs, targets, loss=loss, check=True)
        assert made.horizon == len(layers), name
