"""Networks that the benchmarks run on, with random data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Case = tuple[nn.Module, Tensor, Tensor]


def mlp(width: int, depth: int = 4, batch: int = 128) -> Case:
    """`depth` hidden tanh layers of one width, 10 classes."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    return model, torch.randn(batch, width), torch.randint(0, 10, (batch,))


class Block(nn.Module):
    """A residual block of two convolutions with BatchNorm, on the skip's convolution too or not."""

    def __init__(self, inside: int, outside: int, stride: int, *, norm_skip: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            project = nn.Conv2d(inside, outside, 1, stride, bias=False)
            norm = nn.BatchNorm2d(outside)
            self.skip = nn.Sequential(project, norm) if norm_skip else project

    def forward(self, x: Tensor) -> Tensor:
        """ReLU of the branch and the skip."""
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.skip(x))


def resnet18(batch: int = 32) -> Case:
    """ResNet-18 with the CIFAR stem, BatchNorm in evaluation mode (the peers need that)."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 3, 1, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
    ]
    inside = 64
    for outside, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(inside, outside, stride), Block(outside, outside, 1)]
        inside = outside
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return model.eval(), torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))


class _Language(nn.Module):
    def __init__(self, width: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        # One row per position, as every peer's cross-entropy takes it.
        return self.head(self.encoder(self.embed(tokens))).flatten(0, 1)


def transformer(width: int = 256, layers: int = 6, batch: int = 8, length: int = 64) -> Case:
    """A pre-norm Transformer over 128 tokens."""
    tokens = torch.randint(0, 128, (batch, length))
    return _Language(width, layers, 128), tokens, torch.randint(0, 128, (batch * length,))
