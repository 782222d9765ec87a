"""The first example beside AdamW: ten exact steps, and as much CPU time of tuned gradient steps.

python benchmarks/first_example.py --seeds 20
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from harness import environment, write
from torch import Tensor, nn
from tqdm import tqdm

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SAMPLES, WIDTH = 384, 64
EXAMPLE = Path(__file__).parent.parent / "examples" / "first_step.py"


def example() -> Any:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("first_step", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batch(data: str, seed: int) -> tuple[Tensor, Tensor]:
    """Digits and which they are, or random numbers, in float64."""
    generator = torch.Generator().manual_seed(seed)
    if data == "random":
        x = torch.randn(SAMPLES, 64, generator=generator, dtype=torch.float64)
        return x, torch.randn(SAMPLES, 1, generator=generator, dtype=torch.float64)
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = torch.randperm(len(digits.data), generator=generator)[:SAMPLES]
    x, y = torch.tensor(digits.data)[chosen] / 16, torch.tensor(digits.target)[chosen]
    return x, y.double().unsqueeze(1) / 4.5 - 1


def adamw(model: nn.Module, x: Tensor, y: Tensor, rate: float, seconds: float) -> tuple[float, int]:
    """Loss after as many steps as fit into the seconds."""
    model = copy.deepcopy(model)
    optimizer, steps = torch.optim.AdamW(model.parameters(), rate), 0
    start = time.process_time()
    while time.process_time() - start < seconds:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        steps += 1
    with torch.no_grad():
        return float(nn.functional.mse_loss(model(x), y)), steps


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs every seed on both data sets and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    train = example().train
    report: dict[str, Any] = {"benchmark": "first_example", **environment("cpu"), "rows": []}
    for data in ("digits", "random"):
        for seed in tqdm(range(options.seeds), data):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)).double()
            x, y = batch(data, seed)
            first = copy.deepcopy(model)
            start = time.process_time()
            losses, ends = train(model, x, y)
            seconds = time.process_time() - start
            tuned = [(*adamw(first, x, y, rate, seconds), rate) for rate in RATES]
            best, steps, rate = min(tuned)
            report["rows"].append(
                {
                    "data": data,
                    "seed": seed,
                    "losses": losses,
                    "fell at every step": all(b < a for a, b in pairwise(losses)),
                    "all converged": set(ends) == {"converged"},
                    "CPU seconds": seconds,
                    "AdamW loss": best,
                    "AdamW steps": steps,
                    "AdamW rate": rate,
                    "share of AdamW's loss": losses[-1] / best,
                }
            )
    for data in ("digits", "random"):
        rows = [row for row in report["rows"] if row["data"] == data]
        shares = [row["share of AdamW's loss"] for row in rows]
        report[data] = {
            "fell at every step": sum(row["fell at every step"] for row in rows),
            "all converged": sum(row["all converged"] for row in rows),
            "seeds": len(rows),
            "median share of AdamW's loss": statistics.median(shares),
            "largest share of AdamW's loss": max(shares),
            "median loss": statistics.median(row["losses"][-1] for row in rows),
            "median AdamW loss": statistics.median(row["AdamW loss"] for row in rows),
            "median CPU seconds": statistics.median(row["CPU seconds"] for row in rows),
        }
        print(data, report[data])
    write(options.output or Path(__file__).parent / "results" / "first_example_cpu.json", report)
    return report


if __name__ == "__main__":
    main()
