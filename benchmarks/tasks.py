"""Small real tasks that need no network: images of 28 x 28 pixels and characters of a text."""

from __future__ import annotations

import gzip
import hashlib
import pydoc_data.topics
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from nets import Block
from torch import Tensor, nn

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Debian's package dataset-fashion-mnist."""


@dataclass(frozen=True)
class Task:
    """A model, partly trained, and batches of its data.

    Args:
        name: Of the task.
        data: Where the data come from.
        model: Partly trained.
        draw: A fresh batch of so many samples.
        loss: The training loss when training stopped.
    """

    name: str
    data: str
    model: nn.Module
    draw: Callable[[int], tuple[Tensor, Tensor]]
    loss: float


def images() -> tuple[Tensor, Tensor, str]:
    """Fashion-MNIST if it is installed, else scikit-learn's digits enlarged to 28 x 28."""
    path = FASHION / "train-images-idx3-ubyte.gz"
    if path.exists():
        x = _idx(path).float() / 255
        y = _idx(FASHION / "train-labels-idx1-ubyte.gz").long()
        name = "Fashion-MNIST (Debian dataset-fashion-mnist)"
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        small = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
        x = F.interpolate(small, size=(28, 28), mode="bilinear").squeeze(1)
        y, name = torch.from_numpy(digits.target).long(), "scikit-learn digits, enlarged"
    return ((x - x.mean()) / x.std()).unsqueeze(1), y, name


def characters() -> tuple[Tensor, int, str]:
    """The texts of `pydoc_data.topics` as tokens; they differ between versions of Python."""
    text = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    alphabet = sorted(set(text))
    place = {c: i for i, c in enumerate(alphabet)}
    digest = hashlib.sha256(text.encode()).hexdigest()
    tokens = torch.tensor([place[c] for c in text])
    return tokens, len(alphabet), f"pydoc_data.topics, {len(text)} characters, sha256 {digest[:16]}"


def mlp() -> nn.Module:
    """196-64-64-64-10 on images pooled to 14 x 14, tanh."""
    sizes = [196, 64, 64, 64]
    layers: list[nn.Module] = [nn.AvgPool2d(2), nn.Flatten()]
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def resnet() -> nn.Module:
    """Three residual blocks of 8, 16 and 16 channels with BatchNorm."""
    return nn.Sequential(
        *[nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()],
        *[Block(8, 8, 1), Block(8, 16, 2, norm_skip=False), Block(16, 16, 1)],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)],
    )


class CharacterModel(nn.Module):
    """Two pre-norm Transformer layers of width 32 over 32 characters."""

    def __init__(self, vocabulary: int, width: int = 32, length: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(0.1 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            *(width, 4, 4 * width),
            dropout=0.0,
            batch_first=True,
            norm_first=True,
            activation="gelu",
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        mask = torch.full((length, length), float("-inf")).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next character, (N, vocabulary, length)."""
        x = self.encoder(self.embed(tokens) + self.place, mask=self.mask)
        return self.head(x).mT


def make(name: str, *, steps: int = 100, seed: int = 0) -> Task:
    """A task, its model trained by so many steps of AdamW (batch 128, or 16 texts)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        if name == "transformer":
            tokens, vocabulary, data = characters()
            model: nn.Module = CharacterModel(vocabulary)

            def draw(n: int) -> tuple[Tensor, Tensor]:
                start = torch.randint(0, len(tokens) - 33, (n,), generator=generator)
                rows = tokens[start.unsqueeze(1) + torch.arange(33)]
                return rows[:, :-1], rows[:, 1:]

        else:
            x, y, data = images()
            model = mlp() if name == "mlp" else resnet()

            def draw(n: int) -> tuple[Tensor, Tensor]:
                chosen = torch.randint(0, len(x), (n,), generator=generator)
                return x[chosen], y[chosen]

        optimizer = torch.optim.AdamW(
            model.parameters(), lr=3e-3 if name == "transformer" else 1e-3
        )
        value = float("nan")
        for _ in range(steps):
            inputs, targets = draw(16 if name == "transformer" else 128)
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            value = loss.item()
    model.eval()
    return Task(name, data, model, draw, value)


def _idx(path: Path) -> Tensor:
    raw = gzip.open(path, "rb").read()
    sizes = struct.unpack(">" + "I" * raw[3], raw[4 : 4 + 4 * raw[3]])
    start = 4 + 4 * len(sizes)
    return torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8).reshape(sizes)
