"""What happens after `split`, and what autograd sees and a tracer does not."""

import pytest
import torch
from networks import ZOO, as_tuple
from oracle import (
    dense_hessian_columns,
    dense_jacobian,
)
from split_cases import F64, FIRST, SECOND, normal, size
from systems import system_of
from torch import nn

import llqr_mf as lq
from llqr_mf.network import linearize


def test_later_parameters_and_new_buffers_are_read():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("shift", torch.zeros(2))

        def forward(self, x):
            return (self.linear(x) + self.shift).square()

    model, x = Model().double(), normal(4, 3)
    layers = lq.split(model)
    model.shift = torch.ones(2, dtype=F64)
    with torch.no_grad():
        model.linear.weight.mul_(2)
    torch.testing.assert_close(linearize(layers, (x,)).outputs, model(x).detach())
    model.linear.weight = nn.Parameter(normal(2, 3))
    torch.testing.assert_close(linearize(layers, (x,)).outputs, model(x).detach())


def test_a_switch_between_train_and_eval_is_noticed():
    model, inputs, targets, loss = ZOO["resnet_eval"]()
    layers = lq.split(model)
    model[1].train()
    with pytest.raises(ValueError, match=r"'1' was switched between train\(\) and eval\(\)"):
        lq.LQRProblem.from_network(layers, inputs, targets, loss=loss)


def test_a_model_that_cannot_be_copied():
    """Locks and generators cannot be copied; the copy shares them, and its attributes are new."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.generator, self.calls, self.seen = (i for i in range(3)), 0, []

        def forward(self, x):
            self.calls += 1
            self.seen.append(x)
            return self.linear(x)

    model, x = Model().double(), normal(4, 3)
    system, _ = system_of(model, x)
    assert model.calls == 0
    assert model.seen == []
    u = normal(1, 8)
    expected = u[:, :6].reshape(2, 3)
    torch.testing.assert_close(
        system.output_product(u).reshape(4, 2), x @ expected.mT + u[:, 6:], **FIRST
    )


def test_no_random_number_of_the_forward_is_drawn_twice():
    """Dropout in closed form, in a whole module and in attention: one mask for all products."""
    for name in ("dropout", "encoder_post_norm", "random_features"):
        model, inputs, _, _ = ZOO[name]()
        torch.manual_seed(5)
        expected = model(*as_tuple(inputs)).detach()
        torch.manual_seed(5)
        system, linearization = system_of(model, inputs)
        torch.testing.assert_close(linearization.outputs, expected, **FIRST)
        u = normal(1, size(model))
        torch.testing.assert_close(system.output_product(u), system.output_product(u))


class _NoSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].exp()


class _Second(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].exp()


class _Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


def test_custom_functions():
    linear, x = nn.Linear(3, 2).double(), normal(4, 3)
    model = nn.Sequential(linear, _Custom(_Second))
    system, _ = system_of(model, x, costate=torch.ones(4, 2, dtype=F64))
    u = normal(3, 8)
    expected = dense_hessian_columns(model, x, torch.sum, u.mT)
    torch.testing.assert_close(system.condensed_product(u).mT, expected, **SECOND)
    with pytest.raises(NotImplementedError, match=r"'1' has no second backward pass.*replace"):
        system_of(nn.Sequential(linear, _Custom(_NoSecond)), x)
    assert "apply" in vars(torch.autograd.Function)


class _Reverse(torch.autograd.Function):
    """Gradient reversal: its backward is not that of its forward."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -2 * grad


class _Tricks(nn.Module):
    """What leaves no call behind: no_grad, detach, a custom backward."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x):
        with torch.no_grad():
            teacher = torch.tanh(self.a(x))
        h = self.a(x) + _Reverse.apply(self.b(x)) * teacher
        return self.c(h) + torch.relu(h.detach()) * h.data.sum()


def test_what_autograd_sees_and_fx_does_not():
    model, x = _Tricks().double(), normal(4, 3)
    system, _ = system_of(model, x)
    assert system.horizon > 3
    dense = dense_jacobian(model, x)
    u = normal(2, size(model))
    torch.testing.assert_close(system.output_product(u), u @ dense.mT, **FIRST)
    with torch.no_grad():  # the caller's own mode is not the model's
        system, _ = system_of(model, x)
    torch.testing.assert_close(system.output_product(u), u @ dense.mT, **FIRST)


def test_gradient_hooks_and_autocast_keep_a_module_whole():
    class Hook(nn.Module):
        def forward(self, x):
            y = x.square()
            y.register_hook(lambda g: 3 * g)
            return y

    class Cast(nn.Module):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x * x.mT.matmul(x).sum()

    linear, x = nn.Linear(3, 2).double(), normal(4, 3)
    for module in (Hook(), Cast()):
        model = nn.Sequential(linear, module)
        layers = lq.split(model)
        assert list(layers[0].program.whole) == ["1"]
        system, _ = system_of(model, x, layers=layers)
        u = normal(2, 8)
        torch.testing.assert_close(
            system.output_product(u), u @ dense_jacobian(model, x).mT, **FIRST
        )


def test_unusable_outputs():
    class Tuple(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x), x

    class Box:
        def __init__(self, value):
            self.value = value

    class Opaque(nn.Module):
        def forward(self, x):
            return Box(x * 2 if x.sum() > -1e9 else x)

    class Open(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.opaque = nn.Linear(3, 2), Opaque()

        def forward(self, x):
            return self.opaque(self.linear(x)).value

    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match="output is a tuple, not one tensor"):
        linearize(lq.split(Tuple()), (x,))
    with pytest.raises(ValueError, match=r"module 'opaque' returns a Box: let it return tensors"):
        linearize(lq.split(Open()), (x,))
    with pytest.raises(ValueError, match="returns its input"):
        lq.split(nn.Identity())


def test_a_complex_state_is_refused():
    model, x, _, _ = ZOO["fourier"]()
    system_of(model, x, layers=lq.split(model, cuts=["first"]))
    items = [model.first, torch.fft.rfft, torch.fft.irfft]
    with pytest.raises(ValueError, match="state between layers 1 and 2 is complex"):
        system_of(items, x)
