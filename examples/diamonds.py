"""The prices of 53,940 diamonds, from the file that plotnine ships, or a stand-in."""

from __future__ import annotations

import csv
import importlib.util
import io
import zipfile
from pathlib import Path

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor

NUMBERS = ("carat", "depth", "table", "x", "y", "z")
KINDS = ("cut", "color", "clarity")


def diamonds(path: Path | None) -> tuple[str, Tensor, Tensor]:
    """Standardised features and log prices, or diabetes where the file is not to be had."""
    text = _csv_text(path)
    if text is None:
        print(
            "no diamonds.csv: give --data with the csv or the wheel of plotnine (`pip download "
            "--no-deps plotnine`). Taking scikit-learn's diabetes, 442 rows."
        )
        data = load_diabetes()
        x, y = torch.from_numpy(data.data), torch.from_numpy(data.target).log()
        return "diabetes, log progression", (x - x.mean(0)) / x.std(0), y
    rows = list(csv.DictReader(io.StringIO(text)))
    columns = [torch.tensor([float(row[name]) for row in rows]) for name in NUMBERS]
    for kind in KINDS:
        for value in sorted({row[kind] for row in rows}):
            columns.append(torch.tensor([float(row[kind] == value) for row in rows]))
    x = torch.stack(columns, 1).double()
    y = torch.tensor([float(row["price"]) for row in rows], dtype=torch.float64).log()
    return "diamonds, log price", (x - x.mean(0)) / x.std(0), y


def _csv_text(path: Path | None) -> str | None:
    if path is None:
        spec = importlib.util.find_spec("plotnine")
        if spec is None or spec.origin is None:
            return None
        path = Path(spec.origin).parent / "data" / "diamonds.csv"
    if not path.exists():
        raise SystemExit(f"--data {path}: there is no such file.")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            return wheel.read("plotnine/data/diamonds.csv").decode()
    return path.read_text()


def shuffled(x: Tensor, y: Tensor, train: int, test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows to train on and rows to test with, always the same."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train = min(train, 3 * len(x) // 4)
    test = min(test, len(x) - train)
    x, y = x[order], y[order]
    return x[:train], y[:train], x[train : train + test], y[train : train + test]
