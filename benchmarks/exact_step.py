"""The exact Gauss-Newton step: the dual, own CG, curvlinops with its CG, and a hand-written loop.

    python benchmarks/exact_step.py [--data digits] [--widths 1024 4096] [--max-seconds 600]

Random inputs and labels are an easy system for CG; real data and a net that has seen some are not,
and `--data` has both. Four hidden tanh layers, batch 128, 10 classes, cross-entropy. The clock runs
from the user's model and batch to the flat step: linearisation, checks and gradient are in. All
methods take turns in one run per width, damping and tolerance, and the true residual |Hu + g| / |g|
of every answer comes from one piece of code: products in float32, and in float64 up to width 1024.
Up to `--tune-up-to` the peers' tolerance is tightened, off the clock, until the true residual is
what was asked for; wider nets take over what was found there. Above `--once-above` every iterative
method runs once, and not at all where the estimate exceeds `--max-seconds` or the memory does not
suffice: then the table shows the estimate, marked ~.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import Floors, Table, Work, environment, exponent, floors, interleaved, spread
from nets import activation_bytes, dual_work, gradient_work, mlp_size, product_work
from peak import available, limit_memory, peak_memory
from step_methods import BATCH, CLASSES, DEPTH, SOLVERS, Answer, Batch, make, true_residual
from torch import nn
from tqdm import tqdm

ITERATIVE = ("cg", "curvlinops", "hessian_free")
METHODS = ("dual", *ITERATIVE)

COPIES = {"dual": 2.2, "cg": 5, "curvlinops": 10, "hessian_free": 7}
"""Weight-sized arrays beyond the weights, until a narrower net has been measured."""

PER_PRODUCT = {"cg": 1.5, "curvlinops": 3.0, "hessian_free": 1.8}
"""Gradients per iteration, likewise."""

FLOAT64_UP_TO = 1024

REACHED = 1.1
"""Times the tolerance: two float32 products of one step differ by as much near 1e-6."""

TARGET_WIDTH, TARGET_GRADIENTS, TARGET_SPEEDUP = 4096, 10, 20

HEADS = {
    "method": "method",
    "width": "width",
    "damping": "damping",
    "rtol": "rtol",
    "shown seconds": "seconds",
    "shown gradients": "gradients",
    "shown iterations": "iterations",
    "residual": "residual",
    "residual float64": "in float64",
    "memory over weights": "mem/weights",
    "over the floor": "/ floor",
}


class Comparison:
    """All rows, and what narrower nets have taught about wider ones."""

    def __init__(self, options: argparse.Namespace, floor: Floors, table: Table) -> None:
        self.options, self.floor, self.table = options, floor, table
        self.copies = dict(COPIES)
        self.per_product = dict(PER_PRODUCT)
        self.counts: dict[tuple[float, float], dict[int, int]] = {}
        self.tightened: dict[tuple[str, float, float], float] = {}

    def width(self, width: int) -> None:
        """All rows of one width."""
        options = self.options
        size = 4 * mlp_size(width, DEPTH, CLASSES)
        memory = {} if options.no_memory else self._memories(width, size)
        if size * (1 + self.copies["dual"]) > available(options.device):
            self.table.add({"method": "all", "width": width, "note": "does not fit"})
            return
        batch = make(width, options.device, options.data)
        for damping in options.dampings:
            self.table.header(f"width {width}, damping {damping:g}")
            for rtol in options.rtols:
                self._compare(batch, damping, rtol, memory)

    def _memories(self, width: int, size: int) -> dict[str, Any]:
        device, found = self.options.device, {}
        for method in self.options.methods:
            if not _installed(method) or size * (1 + self.copies[method]) > available(device):
                continue
            arguments = {"width": width, "method": method, "device": device}
            arguments |= {"damping": self.options.dampings[0], "rtol": min(self.options.rtols)}
            found[method] = peak_memory("step_methods:prepare_memory", arguments, device=device)
            # On narrow nets activations and the Gram matrix weigh more than weights.
            if "growth" in found[method] and width >= 2048:
                self.copies[method] = found[method]["growth"] / size
        return found

    def _compare(self, batch: Batch, damping: float, rtol: float, memory: dict[str, Any]) -> None:
        options, width, device = self.options, batch[1].shape[1], self.options.device
        parameters = list(batch[0].parameters())
        size = 4 * sum(p.numel() for p in parameters)

        def gradient() -> None:
            torch.autograd.grad(
                nn.functional.cross_entropy(batch[0](batch[1]), batch[2]), parameters
            )

        once = min(interleaved({"": gradient}, repeats=2, warm_up=1, device=device)[""])
        functions: dict[str, Callable[[], Any]] = {"gradient": gradient}
        rows: dict[str, dict[str, Any]] = {}
        for method in options.methods:
            rows[method] = {"method": method, "width": width, "damping": damping, "rtol": rtol}
            rows[method] |= {"weights": size // 4}
            reason = self._why_not(method, width, damping, rtol, once, size, rows[method])
            if reason:
                rows[method]["note"] = reason
                continue
            functions[method] = self._function(method, batch, damping, rtol)
            if method in ("curvlinops", "hessian_free") and width <= options.tune_up_to:
                functions[method] = self._tuned(method, batch, damping, rtol)
        limits = dict.fromkeys(ITERATIVE, 1) if width > options.once_above else {}

        def look(method: str, answer: Answer | None) -> None:
            if answer is None or "residual" in rows[method]:
                return
            row = rows[method]
            row |= {"iterations": answer.iterations, "products": answer.products}
            row |= {"status": answer.status, "shown iterations": answer.iterations}
            row["residual"] = true_residual(batch, damping, answer.step)
            if width <= FLOAT64_UP_TO:
                wide = true_residual(batch, damping, answer.step, torch.float64)
                row["residual float64"] = wide
            row["reached"] = row["residual"] <= REACHED * rtol

        seconds = interleaved(
            *(functions,),
            repeats=options.repeats,
            warm_up=1,
            device=device,
            limits=limits,
            after=look,
        )
        unit = median(seconds["gradient"])
        for method, row in rows.items():
            if method in functions:
                self._timed(row, seconds[method], unit, batch)
            row["gradient seconds"] = unit
            self._remembered(row, memory.get(method), batch)
            self.table.add(row)
        self.table.save()

    def _function(
        self, method: str, batch: Batch, damping: float, rtol: float, limit: int | None = None
    ) -> Callable[[], Answer]:
        factor = self.tightened.get((method, damping, rtol), 1.0)
        most = limit or self.options.max_iterations
        return lambda: SOLVERS[method](batch, damping, rtol * factor, most)

    def _tuned(
        self, method: str, batch: Batch, damping: float, rtol: float
    ) -> Callable[[], Answer]:
        """With the loosest tolerance that gives the true residual asked for, or the strictest."""
        limit = None
        for factor in (1.0, 0.5, 0.2, 0.05):
            self.tightened[method, damping, rtol] = factor
            answer = self._function(method, batch, damping, rtol, limit)()
            if true_residual(batch, damping, answer.step) <= REACHED * rtol:
                break
            # A recurrence that cannot get there would go on for ever.
            limit = limit or 3 * answer.iterations + 10
        return self._function(method, batch, damping, rtol, limit)

    def _why_not(
        self,
        method: str,
        width: int,
        damping: float,
        rtol: float,
        gradient: float,
        size: int,
        row: dict[str, Any],
    ) -> str:
        """Why a method does not run here; its estimate then stands in the row."""
        if not _installed(method):
            return "not installed"
        # The residual needs the step, its product and a gradient beside the weights.
        needed = int(size * max(self.copies[method], 3))
        row["bytes estimated"] = needed
        fits = needed <= available(self.options.device)
        if method in ITERATIVE and width > self.options.once_above:
            count = self._expected(width, damping, rtol)
            estimate = count * self.per_product[method] * gradient
            row["estimated iterations"] = count
            if not fits or estimate > self.options.max_seconds:
                row["estimated seconds"] = estimate
                row["shown seconds"] = f"~{estimate:.4g}"
                row["shown gradients"] = f"~{estimate / gradient:.4g}"
                row["shown iterations"] = f"~{count}"
                return "estimate: " + ("too slow" if fits else "does not fit")
        return "" if fits else "does not fit"

    def _expected(self, width: int, damping: float, rtol: float) -> int:
        """Iterations of CG, from narrower nets; a small one is solved if there is none."""
        known = self.counts.setdefault((damping, rtol), {})
        if not known:
            for small in (128, 256, 512):
                if small < width:
                    answer = SOLVERS["cg"](
                        make(small, self.options.device, self.options.data),
                        *(damping, rtol, self.options.max_iterations),
                    )
                    known[small] = answer.iterations
        if width in known:
            return known[width]
        slope = exponent(list(known), list(known.values()))
        last = max(known)
        return round(known[last] * (width / last) ** (0.5 if slope is None else slope))

    def _timed(self, row: dict[str, Any], seconds: list[float], unit: float, batch: Batch) -> None:
        """Times, floors and what wider nets learn."""
        taken, method, width = median(seconds), row["method"], row["width"]
        row |= {"seconds": taken, "gradients": taken / unit, "repeats": len(seconds)}
        row |= {"spread": spread(seconds), "shown seconds": taken, "shown gradients": taken / unit}
        work: Work = dual_work(batch[0], BATCH, CLASSES)
        if method in ITERATIVE:
            work = gradient_work(batch[0], BATCH)
            work += product_work(batch[0], BATCH) * row["iterations"]
            self.per_product[method] = taken / unit / max(1, row["iterations"])
        if method == "cg":
            key = (row["damping"], row["rtol"])
            self.counts.setdefault(key, {})[width] = max(1, row["iterations"])
        row |= self.floor.row(work, taken, width)

    def _remembered(self, row: dict[str, Any], memory: dict[str, Any] | None, batch: Batch) -> None:
        if memory is None:
            return
        row["memory"] = memory
        if "growth" in memory:
            weights = 4 * row["weights"]
            total = weights + memory["growth"]
            row["memory over weights"] = total / weights
            row["activation bytes"] = activation_bytes(batch[0], batch[1])
            row["memory target met"] = total <= 3 * weights + row["activation bytes"]


def _installed(method: str) -> bool:
    return method != "curvlinops" or importlib.util.find_spec("curvlinops") is not None


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Growth exponents of seconds with width, and the targets at width 4096."""
    found: dict[str, Any] = {"exponents": [], "targets": []}
    keys = sorted({(r["damping"], r["rtol"]) for r in rows if "damping" in r})
    for damping, rtol in keys:
        here = [r for r in rows if (r.get("damping"), r.get("rtol")) == (damping, rtol)]
        for method in METHODS:
            timed = [r for r in here if r["method"] == method and "seconds" in r]
            slope = exponent([r["width"] for r in timed], [r["seconds"] for r in timed])
            if slope is not None:
                entry = {"damping": damping, "rtol": rtol, "method": method, "exponent": slope}
                entry["gradient's exponent"] = exponent(
                    [r["width"] for r in timed], [r["gradient seconds"] for r in timed]
                )
                found["exponents"].append(entry | {"at most 2": slope <= 2})
        for dual in (r for r in here if r["method"] == "dual" and "seconds" in r):
            peers = {
                r["method"]: r.get("seconds", r.get("estimated seconds"))
                for r in here
                if r["width"] == dual["width"] and r["method"] in ("curvlinops", "hessian_free")
            }
            peers = {name: seconds for name, seconds in peers.items() if seconds is not None}
            entry = {"damping": damping, "rtol": rtol, "width": dual["width"]}
            entry |= {"gradients": dual["gradients"], "residual reached": dual["reached"]}
            entry["memory met"] = dual.get("memory target met")
            if peers:
                best = min(peers, key=lambda name: peers[name])
                entry["times faster than the best peer"] = peers[best] / dual["seconds"]
                entry["best peer"] = best
                entry["best peer is an estimate"] = not any(
                    r["method"] == best and r["width"] == dual["width"] and "seconds" in r
                    for r in here
                )
            if dual["width"] == TARGET_WIDTH:
                entry["gradients met"] = dual["gradients"] <= TARGET_GRADIENTS
                faster = entry.get("times faster than the best peer")
                entry["speed-up met"] = None if faster is None else faster >= TARGET_SPEEDUP
            found["targets"].append(entry)
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compares at every width and writes the JSON after each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--data", choices=["random", "digits"], default="random")
    parser.add_argument("--dampings", type=float, nargs="+", default=[1e-3, 1e-5])
    parser.add_argument("--rtols", type=float, nargs="+", default=[1e-4, 1e-6])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--once-above", type=int, default=2048)
    parser.add_argument("--tune-up-to", type=int, default=2048)
    parser.add_argument("--max-seconds", type=float, default=900)
    parser.add_argument("--max-iterations", type=int, default=2000)
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(arguments)
    floor = floors(options.device, widths=options.widths, batch=BATCH)
    print(floor)
    name = f"exact_step_{options.data}_{options.device}.json"
    default = Path(__file__).parent / "results" / name
    report: dict[str, Any] = {"benchmark": "exact_step", **environment(options.device)}
    report["data"] = options.data
    report |= {"batch": BATCH, "classes": CLASSES, "hidden layers": DEPTH}
    report["floors"] = floor.report()
    table = Table(options.output or default, report, HEADS, first=14)
    comparison = Comparison(options, floor, table)
    for width in tqdm(sorted(options.widths), "widths"):
        comparison.width(width)
        report |= summary(table.rows)
        table.save()
    for entry in (*report["exponents"], *report["targets"]):
        print(
            ", ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items()
            )
        )
    print(f"wrote {table.path}")
    return report


if __name__ == "__main__":
    limit_memory()
    main()
