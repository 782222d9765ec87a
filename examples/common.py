"""What the probing examples share: data, small nets, a short training, and how results are kept."""

from __future__ import annotations

import argparse
import gzip
import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.figure
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's `dataset-fashion-mnist` puts its files."""


def arguments(text: str | None) -> argparse.ArgumentParser:
    """A parser with what all of them take."""
    lines = (text or "").strip().splitlines()
    parser = argparse.ArgumentParser(description=lines[0] if lines else None)
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for results")
    parser.add_argument("--data", choices=("digits", "fashion"), default="digits")
    parser.add_argument("--samples", type=int, default=512, help="images that are probed")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def images(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] less their mean, flat, in random order, and their labels."""
    if name == "digits":
        data = load_digits()
        x, y = torch.from_numpy(data.data).to(dtype) / 16, torch.from_numpy(data.target)
    else:
        if not FASHION.exists():
            raise SystemExit(f"{FASHION} is missing: apt-get install dataset-fashion-mnist.")
        x = _idx(FASHION / "train-images-idx3-ubyte.gz").flatten(1).to(dtype) / 255
        y = _idx(FASHION / "train-labels-idx1-ubyte.gz").long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x - x.mean(0))[order], y[order]


def mlp(sizes: list[int], seed: int = 0) -> nn.Sequential:
    """Linear layers with tanh between them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, *, rate: float = 3e-3) -> float:
    """AdamW on batches of 128 in order; the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    loss = torch.tensor(float("nan"))
    for step in range(steps):
        rows = torch.arange(128 * step, 128 * (step + 1)) % len(x)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def keep(
    folder: Path, name: str, report: dict[str, Any], figure: matplotlib.figure.Figure
) -> dict[str, Any]:
    """Writes {name}.json and {name}.png and says where."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    figure.savefig(folder / f"{name}.png", dpi=130, bbox_inches="tight")
    print(f"\nwrote {folder / name}.json and .png")
    return report


def _idx(path: Path) -> Tensor:
    raw = gzip.open(path, "rb").read()
    axes = raw[3]
    shape = struct.unpack(">" + "I" * axes, raw[4 : 4 + 4 * axes])
    return torch.frombuffer(bytearray(raw[4 + 4 * axes :]), dtype=torch.uint8).reshape(shape)
