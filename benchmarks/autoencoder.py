"""The digits deep autoencoder: seven optimizers, tuned, at equal steps and in seconds.

    python benchmarks/autoencoder.py --tune      # chooses settings on seeds of its own
    python benchmarks/autoencoder.py             # scores what was chosen, with five other seeds
    python benchmarks/autoencoder.py --picture   # draws the committed result again

Per seed all optimizers start from the same weights and see the same batches. They take turns step
by step, so that drift of the machine hits all alike, on one thread, which small matrices like best.
The loss is evaluated off the clock on all images. `make bench-env` comes first.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from digits_ae.contestants import CONTESTANTS, Settings
from digits_ae.task import BATCH, SIZES, autoencoder, batches, excess, floor, images
from digits_ae.tuning import tune
from harness import environment, write
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator
from tqdm import tqdm

ROOT = Path(__file__).parent
RESULT = ROOT / "results" / "autoencoder_cpu.json"
PICTURE = ROOT.parent / "docs" / "images" / "autoencoder.png"
STEPS = 300
EVALUATE_EVERY = 5
RIVAL, OURS = "SOAP", "LLQR subspace"


@dataclass
class Run:
    """One optimizer on one seed.

    Args:
        seconds: Of every step.
        at: Steps after which the loss was evaluated, 0 first.
        excess: Excess loss there.
    """

    seconds: list[float] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    excess: list[float] = field(default_factory=list)

    @property
    def clock(self) -> list[float]:
        """Seconds of training up to every evaluation."""
        return [sum(self.seconds[:step]) for step in self.at]

    def reached(self, target: float) -> tuple[float, float]:
        """Steps and seconds until an evaluation is at or below a target; infinite for never."""
        for step, seconds, value in zip(self.at, self.clock, self.excess, strict=True):
            if value <= target:
                return step, seconds
        return math.inf, math.inf


def race(chosen: dict[str, Settings], seed: int, steps: int) -> dict[str, Run]:
    """All optimizers on one seed, in turn at every step; a round of one step each warms up."""
    x = images()
    least = floor(x)
    for name, settings in chosen.items():
        CONTESTANTS[name](autoencoder(seed), settings, steps)(x[:BATCH])
    models = {name: autoencoder(seed) for name in chosen}
    step = {name: CONTESTANTS[name](models[name], chosen[name], steps) for name in chosen}
    runs = {name: Run(at=[0], excess=[excess(models[name], x, least)]) for name in chosen}
    for t, indices in enumerate(tqdm(batches(seed, steps, len(x)), leave=False), start=1):
        batch = x[indices]
        for name, run in runs.items():
            start = time.perf_counter()
            step[name](batch)
            run.seconds.append(time.perf_counter() - start)
            if t % EVALUATE_EVERY == 0 or t == steps:
                run.at.append(t)
                run.excess.append(excess(models[name], x, least))
    return runs


def summary(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Per optimizer the final excess, the time of a step, and when it passed the rival's end."""
    targets = [run.excess[-1] for run in runs[RIVAL]]
    rows = {}
    for name, own in runs.items():
        hits = [run.reached(target) for run, target in zip(own, targets, strict=True)]
        rows[name] = {
            "final excess": mean(run.excess[-1] for run in own),
            "final excess per seed": [run.excess[-1] for run in own],
            "ms per step, median": 1e3 * median(s for run in own for s in run.seconds),
            "ms per step, mean": 1e3 * mean(s for run in own for s in run.seconds),
            **dict(zip(_reached(), map(median, zip(*hits, strict=True)), strict=True)),
            f"seconds to {RIVAL}'s end per seed": [seconds for _, seconds in hits],
        }
    return rows


def bootstrap_ratio(
    ours: Sequence[float], theirs: Sequence[float], draws: int = 10_000
) -> dict[str, Any]:
    """Ratio of mean final losses, and its 95 % interval over paired draws of seeds."""
    pairs = torch.tensor([list(ours), list(theirs)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(ours), (draws, len(ours)), generator=generator)
    means = pairs[:, drawn].mean(2)
    ends = (means[0] / means[1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {"ratio": float(pairs[0].mean() / pairs[1].mean()), "95 % interval": ends.tolist()}


def curves(runs: list[Run]) -> dict[str, list[float]]:
    """Median, least and greatest over seeds, at every evaluation."""
    excesses = list(zip(*(run.excess for run in runs), strict=True))
    clocks = list(zip(*(run.clock for run in runs), strict=True))
    return {
        "step": list(runs[0].at),
        "seconds": [median(c) for c in clocks],
        "median": [median(e) for e in excesses],
        "least": [min(e) for e in excesses],
        "greatest": [max(e) for e in excesses],
    }


def score(chosen: dict[str, Settings], seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """The report without the tuning."""
    races = [race(chosen, seed, steps) for seed in tqdm(seeds)]
    runs = {name: [each[name] for each in races] for name in chosen}
    rows = summary(runs)
    finals = {name: rows[name]["final excess per seed"] for name in rows}
    return {
        "benchmark": "autoencoder",
        **environment("cpu"),
        "task": {
            "data": "sklearn digits, 1797 x 64, in [0, 1]",
            "network": "-".join(map(str, SIZES)) + " tanh",
            "loss": "cross-entropy per image, less the entropy of its pixels, on all images",
            "steps": steps,
            "batch": BATCH,
            "seeds": list(seeds),
            "a miss": None,
        },
        "optimizers": {name: {"settings": dict(chosen[name]), **row} for name, row in rows.items()},
        f"{OURS} over {RIVAL}": bootstrap_ratio(finals[OURS], finals[RIVAL]),
        "curves over seeds": {name: curves(own) for name, own in runs.items()},
    }


def table(report: dict[str, Any]) -> str:
    """The report's first numbers, best last."""
    rows = report["optimizers"]
    keys = ("final excess", "ms per step, median", *_reached())
    heads = ("excess", "ms/step", "steps", "seconds")
    lines = [" " * 16 + "".join(f"{h:>9}" for h in heads) + f"  (to {RIVAL}'s final loss)"]
    for name in sorted(rows, key=lambda name: -rows[name]["final excess"]):
        numbers = [rows[name][key] for key in keys]
        lines.append(f"{name:16}" + "".join(f"{number:9.4g}" for number in numbers))
    ratio = report[f"{OURS} over {RIVAL}"]
    low, high = ratio["95 % interval"]
    return "\n".join([*lines, f"{OURS} / {RIVAL}: {ratio['ratio']:.3f} [{low:.3f}, {high:.3f}]"])


COLOURS = {
    "SGD": "#b8b8b8",
    "AdamW": "#8c8c8c",
    "Muon": "#56b4e9",
    "SOAP": "#0072b2",
    "LLQR(SGD)": "#e6c229",
    "LLQR(AdamW)": "#e69f00",
    "LLQR subspace": "#d55e00",
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Excess loss against steps and against seconds: median over seeds, band from least to most."""
    made = report["curves over seeds"]
    goal = made[RIVAL]["median"][-1]
    with plt.rc_context({"font.size": 11, "axes.titlesize": 12}):
        figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
        for axis, key in zip(axes, ("step", "seconds"), strict=True):
            for name, curve in made.items():
                shown = {"color": COLOURS[name], "zorder": 3 if name in (OURS, RIVAL) else 2}
                x = curve[key]
                axis.fill_between(
                    *(x, curve["least"], curve["greatest"]), alpha=0.2, linewidth=0, **shown
                )
                axis.plot(
                    x, curve["median"], linewidth=2.4 if name in (OURS, RIVAL) else 1.5, **shown
                )
                axis.plot(x[-1], curve["median"][-1], "o", markersize=4, **shown)
            axis.axhline(goal, color=COLOURS[RIVAL], linewidth=1, linestyle=":")
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(FixedLocator([1, 1.5, 2, 3, 5, 10, 20]))
            axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.set_xlim(left=0)
            axis.grid(alpha=0.3, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        by_step, by_time = axes
        by_step.set(title="at equal steps", xlabel="step", ylabel="excess loss, nats per image")
        by_time.set(title="in time, on one core", xlabel="seconds")
        by_time.annotate(
            f"{RIVAL}'s final loss",
            (0, goal),
            (6, -12),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color=COLOURS[RIVAL],
            fontsize=9,
        )
        _name_lines(by_step, made)
        # Room for the names.
        figure.get_layout_engine().set(wspace=0.36)
        seeds = len(report["task"]["seeds"])
        figure.suptitle(
            f"Digits deep autoencoder: distance from the least possible loss "
            f"(median and range of {seeds} seeds)"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)
    print(f"wrote {path}")


def _name_lines(axis: Axes, made: dict[str, dict[str, list[float]]]) -> None:
    """Names at the right ends of lines, moved apart where they would cover each other."""
    ends = sorted((curve["median"][-1], name) for name, curve in made.items())
    last = made[OURS]["step"][-1]
    low = 0.0
    for value, name in ends:
        at = max(value, low)
        low = at * 1.16
        text = axis.annotate(
            f"{name}  {value:.2f}",
            (last, at),
            (8, 0),
            textcoords="offset points",
            color=COLOURS[name],
            va="center",
            weight="bold" if name in (OURS, RIVAL) else "normal",
            annotation_clip=False,
        )
        text.set_in_layout(False)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Tunes, scores or draws; returns the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="choose settings, then stop")
    parser.add_argument("--picture", action="store_true", help="only draw what was written")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2, help="processes for --tune")
    parser.add_argument("--results", type=Path, default=RESULT)
    parser.add_argument("--image", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    report = json.loads(options.results.read_text()) if options.results.exists() else {}
    if options.tune:
        for name in options.only:
            made = report.get("tuning", {})
            made[name] = tune(name, options.steps, options.workers, made.get(name, {}))
            report["tuning"] = {each: made[each] for each in CONTESTANTS if each in made}
            write(options.results, _without_infinity(report))
        return report
    if not options.picture:
        chosen = {name: report["tuning"][name]["chosen"] for name in options.only}
        scored = score(chosen, options.seeds, options.steps)
        print(table(scored))
        report = {**scored, "tuning": report["tuning"]}
        write(options.results, _without_infinity(report))
    draw(report, options.image)
    return report


def _reached() -> tuple[str, str]:
    return f"steps to {RIVAL}'s end", f"seconds to {RIVAL}'s end"


def _without_infinity(value: Any) -> Any:
    """For JSON: four digits, and None for infinity."""
    if isinstance(value, dict):
        return {key: _without_infinity(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


if __name__ == "__main__":
    main()
