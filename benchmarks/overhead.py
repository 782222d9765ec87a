"""What LLQR at its defaults adds to a training step of the base optimizer.

`python benchmarks/overhead.py` trains ResNet-18 (CIFAR stem, batch 128) and a 6-layer Transformer
(width 256, 32 texts of 128 tokens) with SGD-momentum, alone and inside `lq.LLQR` with every
structure, on random data, all interleaved in one run: medians of a step without a refresh, of a
refresh, and the overhead amortised over the first 10,000 steps.
Writes results/overhead_{device}.json.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import environment, interleaved, write
from nets import Case, resnet18, transformer
from torch import nn

import llqr_mf as lq
from llqr_mf.optimizer.schedule import period_at

STEPS = 10_000
"""Of training, over which refreshes are amortised; they thin out towards one in 1000 steps."""


def refreshes() -> int:
    """How many the default schedule asks for."""
    default = inspect.signature(lq.LLQR).parameters["refresh_every"].default
    count = step = 0
    while step < STEPS:
        count, step = count + 1, step + period_at(default, step)
    return count


def measure(name: str, case: Case, repeats: int, device: str) -> dict[str, Any]:
    """The overhead of every structure on one net."""
    model, x, y = case
    model, x, y = model.to(device).train(), x.to(device), y.to(device)
    size = sum(p.numel() for p in model.parameters())
    functions: dict[str, Callable[[], Any]] = {}
    optimizers: dict[str, lq.LLQR] = {}

    def training(net: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

        return step

    def sgd(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)

    base = copy.deepcopy(model)
    functions["base"] = training(base, sgd(base))
    for structure in ("ekronecker", "kronecker", "diagonal"):
        net = copy.deepcopy(model)
        optimizer = lq.LLQR(net, sgd(net), loss="cross_entropy", structure=structure)
        optimizers[structure] = optimizer
        functions[structure] = training(net, optimizer)
    seconds = interleaved(functions, repeats=repeats, device=device)
    for structure, optimizer in optimizers.items():
        once = {f"{structure} refresh": lambda o=optimizer: o.refresh(x, y)}
        seconds |= interleaved(once, repeats=1, warm_up=0, device=device)
    unit = statistics.median(seconds["base"])
    share = refreshes() / STEPS
    rows = []
    print(f"\n{name}: {size:,} weights, base step {unit:.3f} s")
    for structure, optimizer in optimizers.items():
        step = statistics.median(seconds[structure]) / unit
        refresh = statistics.median(seconds[f"{structure} refresh"]) / unit
        memory = optimizer.memory_usage()
        rows.append(
            {
                "structure": structure,
                "step": step,
                "refresh": refresh,
                "overhead": step - 1 + refresh * share,
                "overhead_later": step - 1 + refresh / 1000,
                "state": (memory["preconditioner"] + memory["factors"]) / 4 / size,
                "apply": optimizer.timings["apply"] / max(1, optimizer.counts.steps) / unit,
            }
        )
        print(
            f"  {structure:12} step {step:.3f} ({rows[-1]['apply']:.3f} of it M), refresh "
            f"{refresh:.2f} steps, overhead {rows[-1]['overhead']:+.1%} over "
            f"{STEPS} steps, {rows[-1]['overhead_later']:+.1%} later, state "
            f"{rows[-1]['state']:.2f} x weights",
            flush=True,
        )
    return {"net": name, "weights": size, "base_seconds": unit, "rows": rows, "seconds": seconds}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--nets", nargs="*", default=["resnet18", "transformer"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.manual_seed(0)
    cases: dict[str, Callable[[], Case]] = {
        "resnet18": lambda: resnet18(batch=128),
        "transformer": lambda: transformer(batch=32, length=128),
    }
    report: dict[str, Any] = {
        **environment(args.device),
        "refreshes": refreshes(),
        "steps": STEPS,
        "nets": [],
    }
    for name in args.nets:
        report["nets"].append(measure(name, cases[name](), args.repeats, args.device))
    write(args.output / f"overhead_{args.device}.json", report)


if __name__ == "__main__":
    main()
