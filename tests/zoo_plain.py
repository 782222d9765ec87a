"""Fully connected networks, convolutions and norms."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from zoo_base import CLASSES, N, net, normal


@net(loss="cross_entropy")
def mlp():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES)), normal(N, 5)


@net()
def nested():
    inner = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Sequential(nn.GELU(), nn.Linear(4, 4)))
    return nn.Sequential(nn.Linear(3, 4), nn.Identity(), inner, nn.Sigmoid()), normal(N, 3)


@net()
def inplace_relu():
    layers = [nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.SiLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(4, 2)), normal(N, 3)


@net()
def frozen():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model, normal(N, 3)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.never = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@net()
def unused_parameter():
    return Unused(), normal(N, 3)


class Tied(nn.Module):
    """One weight at two times, once transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.bias = nn.Linear(4, 3), nn.Parameter(torch.zeros(4))
        self.middle = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(torch.tanh(self.encode(x)))
        return F.linear(torch.tanh(h), self.encode.weight.t(), self.bias)


@net()
def tied_transpose():
    return Tied(), normal(N, 4)


@net()
def same_module_twice():
    layer, act = nn.Linear(3, 3), nn.Tanh()
    return nn.Sequential(layer, act, layer, act, nn.Linear(3, 2)), normal(N, 3)


@net(loss="bce_with_logits")
def prelu_bilinear():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.mix = nn.PReLU(3), nn.Bilinear(3, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.act(x)
            return self.mix(h, torch.tanh(h))

    model, inputs = Model(), normal(N, 3)
    return model, inputs


# ---- convolutions and norms


@net(loss="cross_entropy")
def convnet():
    return nn.Sequential(
        *[nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Conv2d(3, 4, 3, padding="same"), nn.Tanh()],
        *[nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="circular")],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)],
    ), normal(N, 2, 6, 6)


@net()
def conv_transpose():
    return nn.Sequential(
        *[nn.Conv1d(2, 3, 3, stride=2), nn.Tanh(), nn.ConvTranspose1d(3, 2, 3, stride=2)],
        *[nn.AdaptiveMaxPool1d(3), nn.Flatten(), nn.Linear(6, 2)],
    ), normal(N, 2, 7)


class BasicBlock(nn.Module):
    """The ResNet block, written as torchvision does: in-place ReLU and +=."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1, self.norm2 = norm(width), norm(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += x
        return self.relu(out)


def _resnet(norm: Callable[[int], nn.Module]) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        *[nn.Conv2d(2, 3, 3, padding=1), norm(3), nn.ReLU(inplace=True), BasicBlock(3, norm)],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES)],
    ), normal(N, 2, 4, 4)


@net(loss="cross_entropy")
def resnet_eval():
    return _resnet(nn.BatchNorm2d)


@net(loss="cross_entropy", train=True)
def resnet_train():
    return _resnet(nn.BatchNorm2d)


@net(train=True)
def batch_norm_1d():
    norms = nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None, affine=False)
    return nn.Sequential(
        *[nn.Linear(3, 4), norms[0], nn.Tanh(), nn.Linear(4, 4), norms[1], nn.Linear(4, 2)]
    ), normal(N, 3)


@net(train=True)
def batch_norm_function():
    """The running statistics are moved by the model's own call."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("variance", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            return F.batch_norm(h, self.mean, self.variance, training=self.training).tanh()

    return Model(), normal(N, 3)


@net()
def group_norm():
    return nn.Sequential(
        *[nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)]
    ), normal(N, 2, 4)


@net(train=True)
def instance_norm():
    norm = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    return nn.Sequential(
        *[nn.Conv1d(2, 3, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)]
    ), normal(N, 2, 5)


@net()
def layer_and_rms_norm():
    return nn.Sequential(
        *[nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 4), nn.RMSNorm(4)],
        *[nn.GELU(), nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2)],
    ), normal(N, 3)


@net(train=True)
def dropout():
    return nn.Sequential(
        *[nn.Linear(4, 5), nn.Dropout(0.4), nn.Tanh(), nn.AlphaDropout(0.3), nn.Linear(5, 6)],
        *[nn.Unflatten(1, (3, 2)), nn.Dropout1d(0.5), nn.Flatten(), nn.Linear(6, 2)],
    ), normal(N, 4)
