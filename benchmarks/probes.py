"""The probing functions beside other libraries: products for equal error, and equal figures.

A small tanh net on digits, trained, small enough for its Gauss-Newton matrix G and its Hessian H to
be decomposed in float64. Every library multiplies the same operator, `problem.hessian`, which
counts the vectors: no seconds are measured. An eigensolver of ours is asked for the residual that
is wanted, any other for a series of looser to tighter tolerances, of which the first to give it
counts. A pair counts only if it is the right one.

A peer that is not installed is left out. PyHessian 0.1 calls `torch.eig`, which torch no longer
has; it is given one. curvlinops has no eigensolver: it hands its operators to SciPy's.

    python benchmarks/probes.py --output benchmarks/results/probes_cpu.json \
        --image docs/images/probes.png
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from harness import Table, environment
from probe_peers import DENSITIES, DIAGONALS, LOGDETS, TRACES, Estimator, Task, agreement, peer
from probe_solvers import eigen_rows
from torch import Tensor

import llqr_mf as lq

PEERS = {
    "pyhessian": "PyHessian",
    "hessian_eigenthings": "hessian-eigenthings",
    "curvlinops": "curvlinops-for-pytorch",
    "skerch": "skerch",
    "matfree": "matfree",
}
SMOOTH = 0.01
"""Width of the kernel on both cumulative distributions, in ranges of the spectrum."""

FAR = 1e-3
"""Only beyond this share of the largest |eigenvalue| are the steps of both compared."""

# ---- random estimates


def root_mean_square(values: Sequence[Tensor]) -> float:
    """Over the seeds, of norms."""
    return float(torch.stack([v.square().sum() for v in values]).mean().sqrt())


def estimate_rows(
    task: Task, kinds: dict[str, Estimator], truth: dict[str, Tensor], budgets: Any, seeds: int
) -> Iterator[dict[str, Any]]:
    """Errors over the seeds, relative to the norm of the truth, at every number of products.

    "stated" is the mean stated standard error over the error that was made, at every budget.
    """
    for matrix, exact in truth.items():
        for name, (needs, function) in kinds.items():
            if (needs and not peer(needs)) or ("nys" in name and matrix == "H"):
                continue
            row: dict[str, Any] = {"name": name, "matrix": matrix}
            for m in budgets:
                errors, stated = [], []
                for seed in range(seeds):
                    A = task.counted(matrix)
                    value, error = function(A, m, seed)
                    assert A.vectors == m, (name, A.vectors, m)
                    errors.append(torch.as_tensor(value).double() - exact)
                    if error is not None:
                        stated.append(torch.as_tensor(error).double())
                made = root_mean_square(errors)
                row[f"{m}"] = made / float(exact.norm())
                bias = torch.stack(errors).mean(0).norm()
                row[f"bias {m}"] = float(bias) / (made / seeds**0.5)
                if stated:
                    row[f"stated {m}"] = (
                        float(torch.stack([e.norm() for e in stated]).mean()) / made
                    )
            yield row


def distances(nodes: Tensor, weights: Tensor, spectrum: Tensor) -> tuple[float, float]:
    """Largest gaps of the cumulative distributions: smoothed, and of the steps far from zero."""
    nodes, order = nodes.double().flatten().sort()
    weights = (weights.double() / len(weights)).flatten()[order]
    width = SMOOTH * float(spectrum[-1] - spectrum[0])
    low, high = min(nodes[0], spectrum[0]), max(nodes[-1], spectrum[-1])
    grid = torch.linspace(float(low) - 4 * width, float(high) + 4 * width, 3000).double()

    def smooth(at: Tensor, mass: Tensor) -> Tensor:
        return torch.special.ndtr((grid[:, None] - at) / width) @ mass

    even = torch.full_like(spectrum, 1 / len(spectrum))
    gap = (smooth(nodes, weights) - smooth(spectrum, even)).abs().max()
    points = torch.cat([nodes, spectrum])
    points = points[points.abs() >= FAR * spectrum.abs().max()]
    steps = [
        torch.cat([torch.zeros(1).double(), mass.cumsum(0)])[
            torch.searchsorted(at, points, right=right)
        ]
        for right in (False, True)
        for at, mass in ((nodes, weights), (spectrum, even))
    ]
    far = max(float((steps[i] - steps[i + 1]).abs().max()) for i in (0, 2))
    return float(gap), far


def density_rows(
    task: Task, shapes: Sequence[tuple[int, int]], seeds: int
) -> Iterator[dict[str, Any]]:
    """Mean distances over the seeds for (vectors, steps)."""
    for matrix in "GH":
        for name, (needs, function) in DENSITIES.items():
            if needs and not peer(needs):
                continue
            row: dict[str, Any] = {"name": name, "matrix": matrix}
            for vectors, steps in shapes:
                made = []
                for seed in range(seeds):
                    A = task.counted(matrix)
                    rule = function(task, A, vectors, steps, seed)
                    assert A.vectors == vectors * steps
                    made.append(distances(*rule, task.spectra[matrix]))
                smooth, far = torch.tensor(made).mean(0).tolist()
                row[f"{vectors} x {steps}"], row[f"far {vectors} x {steps}"] = smooth, far
            yield row


def logdet_rows(task: Task, vectors: Sequence[int], seeds: int) -> Iterator[dict[str, Any]]:
    """Errors over the seeds of log det(G + damping), in units of one, and mean products."""
    exact = task.spectra["G + damping"].log().sum()
    for name, function in LOGDETS.items():
        row: dict[str, Any] = {"name": name, "matrix": "G + damping", "exact": float(exact)}
        for count in vectors:
            errors, stated, products = [], [], []
            for seed in range(seeds):
                A = task.counted("G + damping")
                try:
                    value, error = function(task, A, count, seed)
                except (RuntimeError, NotImplementedError, ValueError, TypeError) as problem:
                    row["note"] = f"{type(problem).__name__}: {str(problem)[:60]}"
                    break
                errors.append(torch.as_tensor(value).double() - exact)
                products.append(A.vectors)
                if error is not None:
                    stated.append(float(error))
            if not errors:
                break
            row[f"products {count}"] = sum(products) / len(products)
            row[f"error {count}"] = root_mean_square(errors)
            if stated:
                row[f"stated {count}"] = sum(stated) / len(stated) / row[f"error {count}"]
        yield row


def single_rows(task: Task) -> Iterator[dict[str, Any]]:
    """Ours in float32 beside the dense spectrum in float64, with the errors that it states."""
    for matrix, metric in (("G", "gauss_newton"), ("H", "newton")):
        problem, spectrum = task.problem(metric, 0.0, single=True), task.spectra[matrix]
        pairs = lq.probe.eigenvalues(problem, 10)
        gap = (pairs.values - spectrum[-10:].flip(0)).abs().max() / task.scale(matrix)
        made = lq.probe.trace(problem, products=96)
        z = (made.value - spectrum.sum()).abs() / made.standard_error
        yield {
            "name": "lq in float32",
            "matrix": matrix,
            "10 largest": float(gap),
            "residual": float(pairs.residual_norm.max()) / task.scale(matrix),
            "trace in errors": float(z),
        }


# ---- the picture

COLOURS = {"lq": "C3", "curvlinops": "C0", "skerch": "C2", "eigenthings": "C1", "matfree": "C4"}
COLOURS |= {"PyHessian": "C5", "SciPy": "C7", "linear_operator": "C9"}
METHODS = ["hutchinson", "hutch++", "xtrace", "xnystrace", "xdiag"]
"""Known by their marks, as the libraries are by their colours."""


def curve(ax: Any, row: dict[str, Any], points: list[tuple[float, float]]) -> None:
    """One line."""
    library, method = row["name"].replace(",", "").split(" ")[0], row["name"].split(" ")[-1]
    turn = sum(line.get_color() == COLOURS[library] for line in ax.lines)
    turn = METHODS.index(method) if method in METHODS else turn
    own = library == "lq"
    ax.loglog(
        *zip(*points, strict=True),
        marker="os^DvPX"[turn % 7],
        color=COLOURS[library],
        ls=["-", "--", ":", "-."][turn % 4],
        lw=2.4 if own else 1.3,
        ms=8 if own else 5,
        zorder=3 if own else 2,
        label=row["name"],
    )


def finish(ax: Any, title: str, ylabel: str, ticks: Sequence[int] | None = None) -> None:
    """Labels, and ticks as plain numbers."""
    ax.set(xlabel="products", ylabel=ylabel)
    ax.set_title(title, fontweight="bold")
    low, high = ax.get_xlim()
    ticks = ticks or [a * 10**b for b in range(6) for a in (1, 2, 5)]
    ax.set_xticks([t for t in ticks if low <= t <= high])
    ax.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    ax.yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(1, 0.5)))
    ax.grid(which="both", alpha=0.25)
    if ax.lines:
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def picture(path: Path, report: dict[str, Any]) -> None:
    """Error against products, log-log; a colour for each library."""
    figure, axes = plt.subplots(2, 4, figsize=(20, 13), constrained_layout=True)

    def panel(ax: Any, section: str, keys: dict[str, float], **wanted: Any) -> None:
        wanted["section"] = section
        for row in report["rows"]:
            if any(row.get(key) != value for key, value in wanted.items()):
                continue
            points = [(x, row[key]) for key, x in keys.items() if row.get(key) is not None]
            if section == "eigenvalues":
                points = [(y, x) for x, y in points]
            if section == "logdet":
                points = [(row[f"products {x}"], y / abs(row["exact"])) for x, y in points]
            if points:
                curve(ax, row, points)

    targets = {f"{t:g}": t for t in report["targets"]}
    budgets = {f"{m}": m for m in report["budgets"]}
    shapes = {f"{v} x {m}": v * m for v, m in report["shapes"]}
    relative = "root-mean-square relative error"
    cases = (("H", "largest", 10, "10 largest of H"), ("H", "smallest", 3, "3 smallest of H"))
    for ax, (matrix, which, k, title) in zip(axes[0], cases, strict=False):
        panel(ax, "eigenvalues", targets, matrix=matrix, which=which, k=k)
        finish(ax, f"eigenvalues: {title}", "residual / largest |eigenvalue|")
    places = [("trace", "G", axes[0][2]), ("trace", "H", axes[0][3])]
    places += [("diagonal", "G", axes[1][0]), ("diagonal", "H", axes[1][1])]
    for section, matrix, ax in places:
        panel(ax, section, budgets, matrix=matrix)
        finish(ax, f"{section} of {matrix}", relative, report["budgets"])
    panel(axes[1][2], "density", shapes, matrix="H")
    finish(axes[1][2], "density of H", "Kolmogorov distance, smoothed", list(shapes.values()))
    panel(axes[1][3], "logdet", {f"error {c}": c for c in report["vectors"]})
    finish(axes[1][3], "log det(G + damping)", relative)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(f"wrote {path}")


# ---- all of it


def versions() -> dict[str, str | None]:
    """Of the peers that are there."""
    found: dict[str, str | None] = {}
    for module, name in PEERS.items():
        found[name] = importlib.metadata.version(name) if peer(module) else None
    found |= {name: importlib.metadata.version(name) for name in ("scipy", "linear_operator")}
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """All sections; prints the tables, writes the JSON and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--redraw", type=Path, help="draw what --output holds, and nothing else")
    parser.add_argument("--sizes", type=int, nargs="*", default=[64, 32, 32, 10])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument("--targets", type=float, nargs="*", default=[1e-2, 1e-3, 1e-6])
    parser.add_argument("--limit", type=int, default=1000, help="products of an eigensolver")
    parser.add_argument("--budgets", type=int, nargs="*", default=[12, 24, 48, 96])
    parser.add_argument("--vectors", type=int, nargs="*", default=[2, 8, 32], help="of log det")
    parser.add_argument("--shapes", nargs="*", default=["1x24", "4x24", "10x24", "10x48"])
    parser.add_argument("--seeds", type=int, default=50, help="of traces and diagonals")
    parser.add_argument("--few", type=int, default=6, help="seeds of densities and log det")
    parser.add_argument("--starts", type=int, default=3, help="seeds of the eigensolvers")
    given = parser.parse_args(arguments)
    shapes = [tuple(map(int, shape.split("x"))) for shape in given.shapes]
    if given.redraw:
        report = json.loads(given.output.read_text())
        picture(given.redraw, report)
        return report
    task = Task(given.sizes, given.rows, given.steps, given.damping)
    report: dict[str, Any] = {
        **environment("cpu"),
        "versions": versions(),
        "sizes": given.sizes,
        "weights": task.n,
        "rows of data": given.rows,
        "training loss": task.loss,
        "damping": given.damping,
        "dtype": "float64",
        "largest": {name: task.scale(name) for name in "GH"},
        "traces": {name: float(task.spectra[name].sum()) for name in "GH"},
        "targets": given.targets,
        "budgets": given.budgets,
        "vectors": given.vectors,
        "shapes": shapes,
        "limit": given.limit,
        "seeds": {
            "estimates": list(range(given.seeds)),
            "densities and log det": list(range(given.few)),
            "eigensolvers": list(range(given.starts)),
        },
    }
    start = {"name": "library", "matrix": "matrix"}
    table = Table(given.output, report, {**start, "difference": "difference"}, first=28)

    def section(name: str, title: str, columns: dict[str, str], made: Any) -> None:
        table.columns = {**start, **columns}
        table.header(title)
        with warnings.catch_warnings():
            # Of pairs that have not converged, of ARPACK, of graphs that a peer leaves behind.
            warnings.simplefilter("ignore")
            for row in made:
                table.add({"section": name, **row})

    section("agreement", "one product", {"difference": "difference"}, agreement(task))
    section(
        "float32",
        "ours in float32",
        {key: key for key in ("10 largest", "residual", "trace in errors")},
        single_rows(task),
    )
    columns = {"which": "end", "k": "k", **{f"{t:g}": f"to {t:g}" for t in given.targets}}
    rows = eigen_rows(task, given.targets, given.starts, given.limit)
    section("eigenvalues", "eigenvalues: products to a residual", columns, rows)
    columns = {f"{m}": f"at {m}" for m in given.budgets}
    columns |= {f"stated {m}": f"stated {m}" for m in given.budgets}
    traces = {name: task.spectra[name].sum() for name in "GH"}
    rows = estimate_rows(task, TRACES, traces, given.budgets, given.seeds)
    section("trace", "trace: relative error, and stated over true", columns, rows)
    rows = estimate_rows(task, DIAGONALS, task.diagonals, given.budgets, given.seeds)
    section("diagonal", "diagonal: relative error, and stated over true", columns, rows)
    columns = {f"{v} x {m}": f"{v} x {m}" for v, m in shapes}
    columns |= {f"far {v} x {m}": f"far {v} x {m}" for v, m in shapes}
    section("density", "density: distance", columns, density_rows(task, shapes, given.few))
    columns = {
        f"{key} {c}": f"{key[:5]}. {c}"
        for c in given.vectors
        for key in ("products", "error", "stated")
    }
    rows = logdet_rows(task, given.vectors, given.few)
    section("logdet", "log det(G + damping): error in units of one", columns, rows)
    if given.image is not None:
        picture(given.image, report)
    return report


if __name__ == "__main__":
    main()
