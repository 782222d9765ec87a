"""The second half of the main job: preconditioners learned on the LQR objective, and LLQR training.

1. On a digits classifier, the three structures are fitted on a few batches and compared, on
   batches they have not seen, with K-FAC, EKFAC and Jacobi: which share of the exact step's
   decrease does each reach?
2. A deep autoencoder is trained by SGD, AdamW, LLQR around SGD, and LLQR's subspace step.

Run `python examples/demo_preconditioners.py --output output`; it prints two tables and writes
demo_preconditioners.png and .json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import llqr_mf as lq
from llqr_mf.preconditioners.baselines import ekfac, jacobi, kfac, scaled_identity


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 images of scikit-learn, in [0, 1], and their labels."""
    data = load_digits()
    return torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target)


def tanh_net(sizes: list[int]) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def compare_structures(x: Tensor, y: Tensor) -> lq.probe.Comparison:
    """Fits Diagonal, Kronecker and EKronecker and compares them on fresh batches."""
    model = tanh_net([64, 64, 64, 10])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for start in range(0, 1536, 128):
        optimizer.zero_grad()
        F.cross_entropy(model(x[start : start + 128]), y[start : start + 128]).backward()
        optimizer.step()
    layers = lq.split(model)

    def problem(rows: Tensor) -> lq.LQRProblem:
        return lq.LQRProblem.from_network(
            layers, x[rows], y[rows], loss="cross_entropy", metric="fisher", damping=1e-2
        )

    parts = torch.randperm(len(x))[:1536].split(128)
    fitting, fresh = [problem(rows) for rows in parts[:8]], [problem(rows) for rows in parts[8:]]
    whole = problem(torch.cat(parts[:8]))
    made: dict[str, Any] = {
        "scaled identity": scaled_identity(whole),
        "Jacobi": jacobi(whole),
        "K-FAC": kfac(whole),
        "EKFAC": ekfac(whole),
    }
    starts = {"Diagonal": "Jacobi", "Kronecker": "K-FAC", "EKronecker": "EKFAC"}
    for name, baseline in starts.items():
        structure = made[baseline].clone()
        report = lq.fit(structure, fitting, count=1, anchor=0.1, max_iterations=6, sweeps=1)
        print(f"\n{report}")
        made[f"LLQR {name}"] = structure
    return lq.probe.compare(fresh, made, rtol=1e-4)


def autoencoder() -> nn.Sequential:
    """64-128-64-8-64-128-64, on which first-order methods are slow."""
    return tanh_net([64, 128, 64, 8, 64, 128, 64])


def batches(x: Tensor, size: int, steps: int) -> Iterator[Tensor]:
    """Shuffled epochs, the same for every optimizer."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(size):
            if steps == 0:
                return
            if len(rows) == size:
                steps -= 1
                yield x[rows]


Step = Callable[[Tensor], None]


def entrants(steps: int) -> dict[str, Callable[[nn.Module], Step]]:
    """What each optimizer does with a batch; settings near those of benchmarks/autoencoder.py."""

    def late(t: int) -> float:
        return min(1.0, (t + 1) / 20) * min(1.0, 5 * (1 - t / steps))

    def plain(
        base: Callable[[nn.Module], torch.optim.Optimizer], factor: Callable[[int], float]
    ) -> Callable[[nn.Module], Step]:
        def make(model: nn.Module) -> Step:
            optimizer = base(model)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

            def step(x: Tensor) -> None:
                if isinstance(optimizer, lq.LLQR) and optimizer.refresh_due:
                    optimizer.refresh(x, x)
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(model(x), x).backward()
                optimizer.step()
                schedule.step()

            return step

        return make

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=6.4, momentum=0.8)

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.7, 0.8), weight_decay=0.0)

    def wrapped(model: nn.Module) -> torch.optim.Optimizer:
        return lq.LLQR(
            model,
            torch.optim.SGD(model.parameters(), lr=1.28, momentum=0.95),
            loss="bce_with_logits",
            precondition="update",
            recipe=lq.optimizer.Recipe(damping=1.6e-6),
            refresh_every=lq.optimizer.burn_in(5, every=1, then=10),
            max_state=None,
        )

    def subspace(model: nn.Module) -> Step:
        optimizer = lq.LLQR(
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            loss="bce_with_logits",
            recipe=lq.optimizer.Recipe(damping=5e-6),
            step="subspace",
            subspace=lq.optimizer.Subspace(damping=1.5e-4),
            refresh_every=lq.optimizer.burn_in(5, every=1, then=10),
            max_state=None,
        )

        def step(x: Tensor) -> None:
            optimizer.step(x, x)

        return step

    return {
        "SGD": plain(sgd, late),
        "AdamW": plain(adamw, late),
        "LLQR(SGD)": plain(wrapped, late),
        "LLQR subspace": subspace,
    }


def train(name: str, make: Callable[[nn.Module], Step], x: Tensor, steps: int) -> dict[str, Any]:
    """Excess loss over the data's entropy, per image; evaluation is not timed."""
    torch.manual_seed(0)
    model = autoencoder()
    floor = F.binary_cross_entropy(x, x)

    def excess() -> float:
        with torch.no_grad():
            return x.shape[1] * float(F.binary_cross_entropy_with_logits(model(x), x) - floor)

    losses, clock, seconds = [excess()], [0.0], 0.0
    step = make(model)
    for batch in tqdm(batches(x, 256, steps), desc=f"{name:14}", total=steps, mininterval=0.5):
        start = time.perf_counter()
        step(batch)
        seconds += time.perf_counter() - start
        losses.append(excess())
        clock.append(seconds)
    return {"name": name, "losses": losses, "seconds": clock}


def picture(table: lq.probe.Comparison, runs: list[dict[str, Any]], path: Path) -> None:
    """Shares of the exact decrease, and training by steps and by the clock."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), gridspec_kw={"width_ratios": [1.2, 1, 1]})
    rows = table.rows[::-1]
    places = range(len(rows))
    axes[0].barh(places, [r.best_fraction for r in rows], color="0.85", label="at best multiple")
    axes[0].barh(
        *(places, [max(r.fraction, 0.0) for r in rows]),
        height=0.45,
        color=["C0" if r.name.startswith("LLQR") else "0.4" for r in rows],
        label="as it comes (0: raises the model)",
    )
    axes[0].set_yticks(places, [r.name for r in rows])
    axes[0].set_xlabel("share of the exact decrease on unseen batches")
    axes[0].legend(frameon=False, loc="upper right", fontsize=8)
    axes[0].set_title("Which step does M make?")
    for run in runs:
        axes[1].plot(range(len(run["losses"])), run["losses"], label=run["name"])
        axes[2].plot(run["seconds"], run["losses"], label=run["name"])
    for axis, label in zip(axes[1:], ("steps", "training seconds"), strict=True):
        axis.set_xlabel(label)
        axis.set_yscale("log")
        for kind in ("major", "minor"):
            getattr(axis.yaxis, f"set_{kind}_formatter")(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.grid(True, which="major", alpha=0.3)
    axes[1].set_ylabel("loss over the entropy floor, per image")
    axes[1].legend(frameon=False)
    axes[1].set_title("Deep autoencoder of digits")
    axes[2].set_title("the same by the clock")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs both parts and writes the picture and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    x, y = digits()
    table = compare_structures(x, y)
    print(f"\n{table}\n")
    runs = [train(name, make, x, options.steps) for name, make in entrants(options.steps).items()]
    print(f"\n{'optimizer':14} {'steps':>6} {'seconds':>8} {'excess loss':>12}")
    for run in runs:
        print(
            f"{run['name']:14} {options.steps:6d} {run['seconds'][-1]:8.2f} "
            f"{run['losses'][-1]:12.3f}"
        )
    report = {"structures": table.to_dict(), "training": runs, "torch": torch.__version__}
    (options.output / "demo_preconditioners.json").write_text(json.dumps(report, indent=1))
    picture(table, runs, options.output / "demo_preconditioners.png")
    print(f"\nwrote {options.output / 'demo_preconditioners.png'} and .json")
    return report


if __name__ == "__main__":
    main()
