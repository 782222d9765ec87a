"""One exact step on a large batch: CG, CG with a sub-sample's inverse, the dual with a sketch.

    python benchmarks/large_batch.py [--samples 10000] [--width 1024] [--damping 1e-3]

A net of two hidden tanh layers on scikit-learn's digits with noise, after some steps of SGD; the
dual has N C unknowns, 100,000 at the defaults. Every method runs once, from the user's model and
batch to a step whose true residual is measured alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Table, environment
from sklearn.datasets import load_digits
from step_methods import TRAINED
from torch import Tensor, nn

import llqr_mf as lq

HEADS = {
    "method": "method",
    "rtol": "rtol",
    "seconds": "seconds",
    "gradients": "gradients",
    "iterations": "iterations",
    "residual": "residual",
}


def make(samples: int, width: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The net, trained a little, and the batch."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    place = torch.randint(0, len(images), (samples,))
    x = torch.tensor(images / 16 - 0.3, dtype=torch.float32)[place]
    x = x + 0.1 * torch.randn_like(x)
    y = torch.tensor(labels)[place]
    layers: list[nn.Module] = [nn.Linear(64, width), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(TRAINED):
        part = torch.randint(0, samples, (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, x, y


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs every method at every tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--sub-sample", type=int, default=400)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument("--rtols", type=float, nargs="+", default=[1e-4, 1e-6])
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(arguments)
    model, x, y = make(options.samples, options.width)
    layers = lq.split(model)
    settings = {"loss": "cross_entropy", "damping": options.damping}

    def problem(samples: int) -> lq.LQRProblem:
        return lq.LQRProblem.from_network(layers, x[:samples], y[:samples], **settings)

    def sub_sampled(rtol: float) -> lq.Solution:
        M = lq.preconditioners.SubsampledDual(problem(options.sub_sample))
        whole = problem(options.samples)
        return lq.solve(whole, "cg", rtol=rtol, max_iterations=2000, preconditioner=M)

    def plain(method: Any) -> Callable[[float], lq.Solution]:
        limit = {} if method == "dual" else {"max_iterations": 2000}
        return lambda rtol: lq.solve(problem(options.samples), method, rtol=rtol, **limit)

    methods = {
        "dual with a sketch": plain("dual"),
        "CG": plain("cg"),
        "CG, sub-sample's inverse": sub_sampled,
    }
    parameters = list(model.parameters())
    times = []
    for _ in range(3):
        start = time.perf_counter()
        torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)
        times.append(time.perf_counter() - start)
    report: dict[str, Any] = {"benchmark": "large_batch", **environment("cpu")}
    report |= {"samples": options.samples, "unknowns": 10 * options.samples}
    report |= {"width": options.width, "damping": options.damping, "gradient seconds": min(times)}
    report |= {"sub-sample": options.sub_sample, "weights": sum(p.numel() for p in parameters)}
    default = Path(__file__).parent / "results" / "large_batch_cpu.json"
    table = Table(options.output or default, report, HEADS, first=26)
    for rtol in options.rtols:
        for name, run in methods.items():
            start = time.perf_counter()
            solution = run(rtol)
            seconds = time.perf_counter() - start
            row = {"method": name, "rtol": rtol, "seconds": seconds}
            row |= {"gradients": seconds / min(times), "iterations": solution.iterations}
            row |= {"residual": solution.residual_norm, "status": str(solution.status)}
            table.add(row)
    return report


if __name__ == "__main__":
    main()
