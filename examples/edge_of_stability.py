"""Sharpness along a training run: gradient descent goes to the edge of stability and stays there.

Full-batch gradient descent on a tanh net, at two step sizes h. The largest eigenvalue of the loss
Hessian (`lq.probe.Sharpness`, each measurement started from the last one's eigenvector) rises to
2 / h and hovers there, while the loss falls, though not at every step (Cohen et al. 2021).

Run `python examples/edge_of_stability.py --output output`; it prints a table and writes
edge_of_stability.png and .json.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from common import arguments, images, keep, mlp
from torch import Tensor
from tqdm import tqdm

import llqr_mf as lq


def run(
    x: Tensor, y: Tensor, width: int, rate: float, steps: int, every: int, seed: int
) -> dict[str, Any]:
    """One training run; the history of the sharpness."""
    model = mlp([x.shape[1], width, width, 10], seed)
    targets = F.one_hot(y, 10).to(x.dtype)
    watch = lq.probe.Sharpness(model, x, targets, loss="mse", every=every, k=2)
    losses = []
    for step in tqdm(range(steps + 1), desc=f"step size {rate:g}"):
        loss = F.mse_loss(model(x), targets)
        losses.append(float(loss.detach()))
        if not losses[-1] < 1e6:
            raise SystemExit(f"step size {rate:g} diverges at step {step}: give a smaller one.")
        watch(step)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.sub_(gradient, alpha=rate)
    return {"rate": rate, "edge": 2 / rate, "losses": losses, "history": watch.to_dict()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the example."""
    parser = arguments(__doc__)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.5, 3.0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--every", type=int, default=15, help="steps between measurements")
    options = parser.parse_args(argv)
    x, y = (part[: options.samples] for part in images(options.data))
    runs = [
        run(x, y, options.width, rate, options.steps, options.every, options.seed)
        for rate in options.rates
    ]
    print(
        f"\n{'step size':>10}{'2 / h':>9}{'sharpness at 0':>16}{'last fifth':>12}{'products':>10}"
    )
    for one in runs:
        history = one["history"]
        late = [point["values"][0] for point in history[-max(1, len(history) // 5) :]]
        products = sum(point["products"] for point in history) / len(history)
        one["late_sharpness"] = sum(late) / len(late)
        print(
            f"{one['rate']:10g}{one['edge']:9.3f}{history[0]['values'][0]:16.3f}"
            f"{one['late_sharpness']:12.3f}{products:10.1f}"
        )
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for i, one in enumerate(runs):
        steps = [point["step"] for point in one["history"]]
        color, label = f"C{i}", f"h = {one['rate']:g}"
        left.plot(one["losses"], color=color, label=label, lw=1)
        tops = [point["values"][0] for point in one["history"]]
        seconds = [point["values"][1] for point in one["history"]]
        right.plot(steps, tops, color=color, marker=".", ms=4, lw=1, label=label)
        right.plot(steps, seconds, color=color, lw=0.8, alpha=0.4)
        right.axhline(one["edge"], color=color, ls="--", lw=1)
        right.text(
            steps[-1], one["edge"] * 1.02, f"2/h = {one['edge']:.3g}", color=color, ha="right"
        )
    left.set(xlabel="step", ylabel="mean squared error", yscale="log", title="loss, full batch")
    right.set(
        xlabel="step",
        ylabel="eigenvalue of the loss Hessian",
        title="largest eigenvalue (faint: second) against 2/h",
    )
    right.set_ylim(bottom=0)
    for ax in (left, right):
        ax.legend(frameon=False)
        ax.grid(alpha=0.3)
    figure.tight_layout()
    return keep(options.output, "edge_of_stability", {"runs": runs}, figure)


if __name__ == "__main__":
    main()
