"""Networks that the benchmarks run on, with random data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Work
from torch import Tensor, nn
from torch.nn.utils import skip_init

Case = tuple[nn.Module, Tensor, Tensor]

TILE = 4_194_301
"""Random numbers that weights repeat where drawing all would take minutes: a prime, so that rows of
a matrix, of another length, start at different places of it."""


def mlp(
    width: int,
    depth: int = 4,
    batch: int = 128,
    classes: int = 10,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    tiled: bool = False,
) -> Case:
    """`depth` hidden tanh layers of one width; weights as `nn.Linear` draws them.

    They are made where they stay, without a copy. `tiled` repeats 4 M random numbers.
    """
    tile = torch.empty(TILE, dtype=dtype, device=device).uniform_(-1, 1) if tiled else None

    def linear(inside: int, outside: int) -> nn.Linear:
        layer = skip_init(nn.Linear, inside, outside, dtype=dtype, device=device)
        with torch.no_grad():
            for p in layer.parameters():
                if tile is None:
                    p.uniform_(-(inside**-0.5), inside**-0.5)
                else:
                    _repeat(p.view(-1), tile * inside**-0.5)
        return layer

    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [linear(width, width), nn.Tanh()]
    model = nn.Sequential(*layers, linear(width, classes))
    x = torch.randn(batch, width, device=device).to(dtype)
    return model, x, torch.randint(0, classes, (batch,), device=device)


def _repeat(flat: Tensor, tile: Tensor) -> None:
    whole = len(flat) // len(tile) * len(tile)
    flat[:whole].view(-1, len(tile)).copy_(tile)
    flat[whole:].copy_(tile[: len(flat) - whole])


def size_of(model: nn.Module) -> int:
    """How many weights."""
    return sum(p.numel() for p in model.parameters())


def mlp_size(width: int, depth: int = 4, classes: int = 10) -> int:
    """How many weights `mlp` has, without making it."""
    return depth * (width + 1) * width + (width + 1) * classes


def activation_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the batch and of what every module without children returns for it."""
    total = x.nbytes
    hooks = []

    def count(module: nn.Module, given: object, output: Tensor) -> None:
        nonlocal total
        total += output.nbytes

    for module in model.modules():
        if not list(module.children()):
            hooks.append(module.register_forward_hook(count))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return total


def gemms(model: nn.Module, batch: int, count: Callable[[bool], int]) -> Work:
    """So many matrix products per Linear layer, `count(first)`, of the batch with its weight."""
    total = Work(0, 0)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for i, layer in enumerate(linears):
        a, b = layer.in_features, layer.out_features
        moved = layer.weight.element_size() * (a * b + batch * a + batch * b)
        total += Work(2 * batch * a * b, moved) * count(i == 0)
    return total


def gradient_work(model: nn.Module, batch: int) -> Work:
    """Of a gradient with its forward pass: three products a layer, two in the first."""
    return gemms(model, batch, lambda first: 2 if first else 3)


def product_work(model: nn.Module, batch: int) -> Work:
    """Of a curvature product along a linearisation: four products a layer, two in the first."""
    return gemms(model, batch, lambda first: 2 if first else 4)


def dual_work(model: nn.Module, batch: int, classes: int) -> Work:
    """Of an exact step in closed form, without a residual.

    Per layer a product forward and one for the step, per class one backward (none into the first
    layer), the symmetric halves of X X' and of G G', and a Cholesky factor of size N C.
    """
    total = gemms(model, batch, lambda first: 2)
    total += gemms(model, batch * classes, lambda first: 0 if first else 1)
    rows = batch * classes
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        flops = batch**2 * layer.in_features + rows**2 * layer.out_features
        size = layer.weight.element_size()
        total += Work(flops, size * (batch * layer.in_features + rows * layer.out_features))
    return total + Work(rows**3 / 3, 8 * rows**2)


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
