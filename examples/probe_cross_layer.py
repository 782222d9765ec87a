"""How much curvature stands between layers, at the start of training and after it.

For a tanh net on images: the exact map of |H_st|_F / sqrt(|H_ss|_F |H_tt|_F) of the Gauss-Newton
matrix (from the layers' Gram matrices, one backward pass), which share of the exact step's decrease
is lost without the off-diagonal blocks, and the curvature in the activations through depth: with
the weights held, and with the best answer of all later weights.

Run `python examples/probe_cross_layer.py --output output`; it prints the tables and writes
probe_cross_layer.png and .json.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from common import arguments, images, keep, mlp, train

import llqr_mf as lq


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the example."""
    parser = arguments(__doc__)
    parser.set_defaults(samples=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=5, help="hidden layers")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--damping", type=float, default=1e-3)
    options = parser.parse_args(argv)
    x, y = images(options.data)
    model = mlp([x.shape[1], *[options.width] * options.depth, 10], options.seed)
    layers = lq.split(model)
    report: dict[str, Any] = {}
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.6))
    for ax, when, steps in zip(axes, ("before", "after"), (0, options.steps), strict=False):
        train(model, x[options.samples :], y[options.samples :], steps)
        problem = lq.LQRProblem.from_network(
            layers,
            x[: options.samples],
            y[: options.samples],
            loss="cross_entropy",
            damping=options.damping,
        )
        found = lq.probe.cross_layer(problem)
        depth = lq.probe.through_depth(problem, seed=options.seed)
        print(f"\n{when} {options.steps} steps of AdamW\n{found}\n\n{depth}")
        report[when] = {"cross_layer": found.to_dict(), "depth": depth.to_dict()}
        found.plot(ax)
        best = f"{1 - found.best_fraction:.0%}"
        ax.set_title(
            f"{when} training: without the off-diagonal blocks, {best} of the\n"
            "exact decrease is lost, with the best step length"
        )
        ls, face = ("--", "white") if when == "before" else ("-", None)
        for kind, color, label in (
            ("curvature", "C0", "weights held, C_t"),
            ("value", "C3", "later weights answer, P_t"),
        ):
            axes[2].plot(
                [row.time for row in depth.rows],
                [float(row.values[kind][0]) for row in depth.rows],
                color=color,
                ls=ls,
                marker="o",
                markerfacecolor=face,
                label=f"{label}, {when}",
            )
    axes[2].set(
        xlabel="t: the activations that enter layer t",
        ylabel="largest eigenvalue",
        yscale="log",
        title="curvature in the activations",
    )
    axes[2].legend(frameon=False, fontsize=8)
    axes[2].grid(alpha=0.3)
    figure.tight_layout()
    return keep(options.output, "probe_cross_layer", report, figure)


if __name__ == "__main__":
    main()
