"""The main job on handwritten digits: the exact Gauss-Newton step, then training with it.

1. One exact step by every method, on a narrow net (where the dense Riccati oracle fits) and on a
   wide one, with time, residual and agreement.
2. A deep autoencoder trained to a target error with the exact step and Levenberg-Marquardt
   damping, beside AdamW, all on the same images.

Run `python examples/demo.py --output output`; it prints two tables and writes demo.png and
demo.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import llqr_mf as lq


def digits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The 1,797 images of scikit-learn, in [0, 1] less their mean, and their labels."""
    data = load_digits()
    x = torch.from_numpy(data.data).to(dtype) / 16
    return x - x.mean(0), torch.from_numpy(data.target)


def mlp(width: int, depth: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A tanh network with `depth` hidden layers of one width."""
    sizes = [64, *[width] * depth]
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 10)).to(dtype)


def compare_methods(
    title: str, model: nn.Module, x: Tensor, y: Tensor, methods: list[str], rtol: float
) -> list[dict[str, Any]]:
    """Solves one batch by every method and prints the table; agreement is with the first."""
    start = time.perf_counter()
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy", damping=1e-2)
    gradient_norm = float(problem.gradient.norm())
    setup = time.perf_counter() - start
    print(f"\n{title}: {problem.size:,} weights, {len(x)} images, {x.dtype}")
    print(f"set-up with one forward pass and the gradient {setup:.3f} s, |g| = {gradient_norm:.3g}")
    header = f"{'method':10} {'seconds':>8} {'iterations':>10} {'residual':>9} {'agreement':>9}"
    print(header + "  status")
    rows, reference = [], None
    for method in methods:
        start = time.perf_counter()
        solution = lq.solve(problem, method, rtol=rtol)  # type: ignore[arg-type]
        seconds = time.perf_counter() - start
        reference = solution.step if reference is None else reference
        agreement = float((solution.step - reference).norm() / reference.norm())
        print(
            f"{method:10} {seconds:8.3f} {solution.iterations:10d} {solution.residual_norm:9.1e} "
            f"{agreement:9.1e}  {solution.status.code.value}"
        )
        rows.append(
            {
                "net": title,
                "method": method,
                "seconds": seconds,
                "iterations": solution.iterations,
                "residual": solution.residual_norm,
                "agreement": agreement,
            }
        )
    return rows


def autoencoder() -> nn.Sequential:
    """64-128-64-8-64-128-64 with tanh, on which first-order methods are slow."""
    sizes = [64, 128, 64, 8, 64, 128, 64]
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


Step = Callable[[], str]


def train(
    name: str, model: nn.Module, step: Step, x: Tensor, target: float, steps: int
) -> dict[str, Any]:
    """Runs until the squared error per image is at the target; evaluation is not timed."""

    def error() -> float:
        with torch.no_grad():
            return x.shape[1] * float(nn.functional.mse_loss(model(x), x))

    errors, clock, seconds = [error()], [0.0], 0.0
    bar = tqdm(range(steps), desc=f"{name:12}", unit="step", mininterval=0.5)
    for _ in bar:
        start = time.perf_counter()
        note = step()
        seconds += time.perf_counter() - start
        errors.append(error())
        clock.append(seconds)
        bar.set_postfix_str(f"error {errors[-1]:.3f} {note}", refresh=False)
        if errors[-1] <= target:
            break
    bar.close()
    return {"name": name, "errors": errors, "seconds": clock, "reached": errors[-1] <= target}


def gauss_newton(model: nn.Module, x: Tensor) -> Step:
    """The exact Gauss-Newton step, its damping set by the reduction ratio."""
    layers = lq.split(model)
    rule = lq.LevenbergMarquardt(damping=1e-1)

    def step() -> str:
        nonlocal rule
        problem = lq.LQRProblem.from_network(
            layers, x, x, loss="mse", damping=rule.damping, check=False
        )
        solution = lq.solve(problem, "cg", rtol=1e-2, max_iterations=250)
        parts = problem.unflatten(solution.step)
        with torch.no_grad():
            before = {name: value.clone() for name, value in model.named_parameters()}
            for name, parameter in model.named_parameters():
                parameter += parts[name]
            fall = problem.origin.loss_value - nn.functional.mse_loss(model(x), x)
            rule = rule.updated(actual=float(fall), predicted=float(solution.model_decrease))
            if not rule.accepted:
                for name, parameter in model.named_parameters():
                    parameter.copy_(before[name])
        return f"damping {rule.damping:.1e}, {solution.iterations} CG iterations"

    return step


def adamw(model: nn.Module, x: Tensor, lr: float) -> Step:
    """One AdamW step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)

    def step() -> str:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), x).backward()
        optimizer.step()
        return f"lr {lr:g}"

    return step


def picture(runs: list[dict[str, Any]], target: float, path: Path) -> None:
    """Loss against steps and against seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for run in runs:
        axes[0].plot(range(len(run["errors"])), run["errors"], label=run["name"])
        axes[1].plot(run["seconds"], run["errors"], label=run["name"])
    for axis, label in zip(axes, ("steps", "training seconds"), strict=True):
        axis.axhline(target, color="0.6", linewidth=1, linestyle=":")
        axis.set_xlabel(label)
        axis.set_yscale("log")
        axis.grid(True, which="major", alpha=0.3)
    axes[0].set_xscale("symlog", linthresh=1)
    axes[0].set_xlim(left=0)
    for kind in ("major", "minor"):
        getattr(axes[0].yaxis, f"set_{kind}_formatter")(matplotlib.ticker.FormatStrFormatter("%g"))
    axes[0].set_ylabel("squared error per image")
    axes[0].legend(frameon=False)
    axes[0].set_title("Deep autoencoder of digits")
    axes[1].set_title(f"the same by the clock (dotted: target {target:g})")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs both parts and writes the picture and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32, help="images in the method table")
    parser.add_argument("--target", type=float, default=0.5, help="squared error per image")
    parser.add_argument("--steps", type=int, default=60, help="most Gauss-Newton steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    x64, y = digits(torch.float64)
    narrow = mlp(16, 2, torch.float64)
    every = ["riccati", "dual", "low_rank", "cg", "auto"]
    rows = compare_methods("narrow net", narrow, x64[:24], y[:24], every, 1e-10)
    x, _ = digits()
    wide = mlp(options.width, 3)
    chosen = slice(0, options.batch)
    rows += compare_methods("wide net", wide, x[chosen], y[chosen], every[1:], 1e-5)
    print("(the dense Riccati recursion would need matrices of N x width rows on the wide net)\n")

    coder = autoencoder()
    start = {name: value.clone() for name, value in coder.state_dict().items()}
    entrants: dict[str, tuple[Step, int]] = {
        "exact GN": (gauss_newton(coder, x), options.steps),
        "AdamW 3e-3": (adamw(coder, x, 3e-3), 100 * options.steps),
        "AdamW 1e-3": (adamw(coder, x, 1e-3), 100 * options.steps),
    }
    runs = []
    for name, (step, most) in entrants.items():
        coder.load_state_dict(start)
        runs.append(train(name, coder, step, x, options.target, most))
    print(f"\n{'optimizer':12} {'steps':>6} {'seconds':>8} {'error':>8}  target {options.target:g}")
    for run in runs:
        mark = "" if run["reached"] else "  not reached"
        print(
            f"{run['name']:12} {len(run['errors']) - 1:6d} {run['seconds'][-1]:8.2f} "
            f"{run['errors'][-1]:8.3f}{mark}"
        )
    report = {"methods": rows, "training": runs, "torch": torch.__version__}
    (options.output / "demo.json").write_text(json.dumps(report, indent=1))
    picture(runs, options.target, options.output / "demo.png")
    print(f"\nwrote {options.output / 'demo.png'} and {options.output / 'demo.json'}")
    return report


if __name__ == "__main__":
    main()
