"""The digits deep autoencoder: images, network, batches and what is measured.

The task of "Deep autoencoders" in Hinton and Salakhutdinov 2006 and Martens 2010 in small: 1,797
images of 8 x 8 pixels from scikit-learn, 64-128-64-8-64-128-64 tanh.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

SIZES = (64, 128, 64, 8, 64, 128, 64)
BATCH = 256
PIXELS = SIZES[-1]


def images() -> Tensor:
    """All images, in [0, 1], (1797, 64)."""
    return torch.from_numpy(load_digits().data).float() / 16


def autoencoder(seed: int) -> nn.Sequential:
    """The network; its weights are uniform within 1 / sqrt(inputs), from the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for inside, outside in pairwise(SIZES):
        layer = nn.Linear(inside, outside)
        with torch.no_grad():
            for p in layer.parameters():
                bound = 1 / math.sqrt(inside)
                p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) * bound)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def batches(seed: int, steps: int, size: int) -> list[Tensor]:
    """Indices of `steps` full batches out of `size` images, shuffled anew every epoch."""
    generator = torch.Generator().manual_seed(1000 + seed)
    found: list[Tensor] = []
    while len(found) < steps:
        order = torch.randperm(size, generator=generator)
        found += order[: size // BATCH * BATCH].split(BATCH)
    return found[:steps]


def loss(logits: Tensor, x: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over pixels, mean over images."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1).mean()


def floor(x: Tensor) -> Tensor:
    """The least value of `loss`: the entropy of grey pixels."""
    x = x.double()
    return -(torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)).sum(1).mean()


@torch.no_grad()
def excess(model: nn.Module, x: Tensor, least: Tensor) -> float:
    """`loss` on images above its floor; infinite if it is not a number."""
    value = float(loss(model(x), x).double() - least)
    return value if math.isfinite(value) else math.inf
