"""Time and peak memory of an exact step against width, depth, batch and classes.

    python benchmarks/cost_tables.py [--methods dual cg] [--device cuda]

Hidden tanh layers, cross-entropy; the dual to 1e-4, and ten iterations of conjugate gradients. One
size moves at a time, in powers of two, from width 512, depth 4, batch 64 and 10 classes. Time is
the median of interleaved runs and memory what the step takes beyond net and batch, in a process of
its own. Writes a JSON and a picture of eight log-log panels with the fitted exponents.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from harness import Table, Work, environment, exponent, floors, interleaved, spread
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
from nets import dual_work, gradient_work, mlp, mlp_size, product_work
from peak import available, limit_memory, peak_memory
from tqdm import tqdm

import llqr_mf as lq

ROOT = Path(__file__).parent

AXES = ("width", "depth", "batch", "classes")

CENTRE = {"width": 512, "depth": 4, "batch": 64, "classes": 10}

GRIDS = {
    "width": [256, 512, 1024, 2048],
    "depth": [2, 4, 8, 16],
    "batch": [16, 32, 64, 128],
    "classes": [5, 10, 20, 40],
}

DAMPING, RTOL, ITERATIONS = 1e-3, 1e-4, 10

COPIES = 8
"""Weight-sized arrays that must be free."""

HEADS = {
    "axis": "axis",
    "value": "value",
    "method": "method",
    "seconds": "seconds",
    "gradients": "gradients",
    "growth MB": "memory MB",
    "over the floor": "/ floor",
    "residual": "residual",
}

COLOURS = {"dual": "#d55e00", "cg": "#0072b2"}

NAMES = {"dual": "dual, exact", "cg": "CG, 10 iterations"}


def make(sizes: dict[str, int], device: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The net and the batch of a point."""
    torch.manual_seed(0)
    return mlp(
        *(sizes["width"], sizes["depth"], sizes["batch"], sizes["classes"]),
        device=device,
    )


def solver(method: str, sizes: dict[str, int], device: str) -> Callable[[], lq.Solution]:
    """From the model and the batch to the step."""
    model, x, y = make(sizes, device)
    limit = {"rtol": RTOL} if method == "dual" else {"rtol": 1e-12, "max_iterations": ITERATIONS}

    def run() -> lq.Solution:
        problem = lq.LQRProblem.from_network(
            lq.split(model), x, y, loss="cross_entropy", damping=DAMPING
        )
        return lq.solve(problem, method=method, **limit)

    return run


def prepare_memory(
    method: str, sizes: dict[str, int], device: str, *, tiny: bool = False
) -> Callable[[], None]:
    """For `peak_memory`."""
    step = solver(
        method, {"width": 16, "depth": 1, "batch": 2, "classes": 3} if tiny else sizes, device
    )

    def run() -> None:
        step()

    return run


def point(axis: str, value: int, options: argparse.Namespace, floor: Any) -> list[dict[str, Any]]:
    """The rows of one point."""
    sizes, device = {**CENTRE, axis: value}, options.device
    weights = mlp_size(sizes["width"], sizes["depth"], sizes["classes"])
    rows = [{"axis": axis, "value": value, "method": method, **sizes} for method in options.methods]
    if 4 * weights * COPIES > available(device):
        return [row | {"note": "does not fit"} for row in rows]
    for row in rows:
        arguments = {"method": row["method"], "sizes": sizes, "device": device}
        row["memory"] = peak_memory("cost_tables:prepare_memory", arguments, device=device)
        if "growth" in row["memory"]:
            row["growth MB"] = row["memory"]["growth"] / 1e6
    model, x, y = make(sizes, device)
    parameters = list(model.parameters())

    def gradient() -> None:
        torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), y), parameters)

    functions: dict[str, Callable[[], Any]] = {"gradient": gradient}
    functions |= {method: solver(method, sizes, device) for method in options.methods}
    found: dict[str, lq.Solution] = {}

    def look(name: str, answer: Any) -> None:
        if answer is not None and name not in found:
            found[name] = answer

    seconds = interleaved(functions, repeats=options.repeats, warm_up=1, device=device, after=look)
    unit = median(seconds["gradient"])
    for row in rows:
        method = row["method"]
        taken = median(seconds[method])
        row |= {"weights": weights, "seconds": taken, "gradients": taken / unit}
        row |= {"gradient seconds": unit, "spread": spread(seconds[method])}
        row["residual"] = float(found[method].residual_norm)
        work: Work = dual_work(model, len(x), sizes["classes"])
        if method == "cg":
            work = gradient_work(model, len(x)) + product_work(model, len(x)) * ITERATIONS
        row |= floor.row(work, taken)
    return rows


def exponents(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fitted exponents of time and memory, per axis and method, over all of a grid."""
    fits = []
    for axis in AXES:
        for method in NAMES:
            for key in ("seconds", "growth MB"):
                xs, ys = _curve(rows, axis, method, key)
                slope = exponent(xs, ys)
                if slope is not None:
                    fit = {"axis": axis, "method": method, "of": key, "exponent": slope}
                    last = exponent(xs[-2:], ys[-2:])
                    fits.append(fit | {"exponent of the last two": last})
    return fits


def _curve(
    rows: Sequence[dict[str, Any]], axis: str, method: str, key: str
) -> tuple[list[float], list[float]]:
    """One line of a panel; points without a positive number are left out."""
    here = [r for r in rows if r["axis"] == axis and r["method"] == method and r.get(key, 0) > 0]
    here.sort(key=lambda row: row["value"])
    return [row["value"] for row in here], [row[key] for row in here]


def draw(report: dict[str, Any], path: Path) -> None:
    """Two rows of four log-log panels."""
    rows = report["rows"]
    with plt.rc_context({"font.size": 10, "axes.titlesize": 11}):
        figure, panels = plt.subplots(
            2, len(AXES), figsize=(13, 6.4), sharey="row", layout="constrained"
        )
        labels = {"seconds": "seconds per step", "growth MB": "peak memory beyond the net, MB"}
        for line, (key, label) in zip(panels, labels.items(), strict=True):
            for panel, axis in zip(line, AXES, strict=True):
                _panel(panel, rows, axis, key)
            line[0].set_ylabel(label)
            # Room for the legends; the panels of a row share their limits.
            low, high = line[0].get_ylim()
            line[0].set_ylim(low, high * (high / low) ** 0.25)
        for panel, axis in zip(panels[0], AXES, strict=True):
            others = ", ".join(f"{k} {v}" for k, v in CENTRE.items() if k != axis)
            panel.set_title(f"against {axis}\n({others})", fontsize=9.5)
        figure.suptitle(f"Cost of a step, {report['device']}, {report['threads']} threads")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)
    print(f"wrote {path}")


def _panel(panel: Axes, rows: Sequence[dict[str, Any]], axis: str, key: str) -> None:
    ticks: set[float] = set()
    for method, name in NAMES.items():
        xs, ys = _curve(rows, axis, method, key)
        if not xs:
            continue
        ticks |= set(xs)
        slope = exponent(xs, ys)
        label = name if slope is None else f"{name}: {axis}$^{{{slope:.2f}}}$"
        panel.plot(xs, ys, "o-", color=COLOURS[method], label=label, markersize=4, linewidth=1.6)
    panel.set(xscale="log", yscale="log", xlabel=axis)
    panel.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    panel.grid(alpha=0.3, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    panel.margins(y=0.1)
    if ticks:
        panel.legend(fontsize=8, frameon=False, loc="upper left")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures the grids, writes the JSON after every row, and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for axis in AXES:
        parser.add_argument(f"--{axis}", type=int, nargs="*", default=GRIDS[axis])
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--picture", action="store_true", help="only draw what was written")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--image", type=Path, default=None)
    options = parser.parse_args(arguments)
    path = options.output or ROOT / "results" / f"cost_tables_{options.device}.json"
    image = options.image or ROOT.parent / "docs" / "images" / f"cost_tables_{options.device}.png"
    if options.picture:
        report = json.loads(path.read_text())
        draw(report, image)
        return report
    floor = floors(options.device, widths=options.width, batch=CENTRE["batch"])
    print(floor)
    report = {"benchmark": "cost_tables", **environment(options.device), "centre": CENTRE}
    report |= {"damping": DAMPING, "rtol": RTOL, "CG iterations": ITERATIONS}
    report["floors"] = floor.report()
    table = Table(path, report, HEADS, first=8)
    points = [(axis, value) for axis in AXES for value in sorted(getattr(options, axis))]
    for axis, value in tqdm(points, "points"):
        for row in point(axis, value, options, floor):
            table.add(row)
    report["exponents"] = exponents(table.rows)
    table.save()
    for fit in report["exponents"]:
        print(f"{fit['of']:10} of {fit['method']:5} ~ {fit['axis']}^{fit['exponent']:.2f}")
    draw(report, image)
    return report


if __name__ == "__main__":
    limit_memory()
    main()
