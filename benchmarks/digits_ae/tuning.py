"""Tuning: one axis of a grid after another, every point on seeds that score nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from statistics import mean
from typing import Any

import torch

from .contestants import CONTESTANTS, GRIDS, STARTS, Settings, at_end
from .task import autoencoder, batches, excess, floor, images

Job = tuple[str, Settings, int, int]
SEEDS = (10, 11, 12)
MORE_SEEDS = range(10, 18)
FINALISTS = 4
MOST_TURNS = 4
SCORES = "excess on the tuning seeds"


def final_excess(name: str, chosen: Settings, seed: int, steps: int) -> float:
    """Excess loss on all images after a run; infinite if it failed."""
    x = images()
    model = autoencoder(seed)
    step = CONTESTANTS[name](model, chosen, steps)
    try:
        for batch in batches(seed, steps, len(x)):
            step(x[batch])
    except (ValueError, RuntimeError):
        # A diverged run: an eigensolver or the optimizer met NaN.
        return math.inf
    return excess(model, x, floor(x))


def tune(name: str, steps: int, workers: int, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """The best settings of an optimizer, on which ends of axes they lie, and every score.

    A search finds a few, and more seeds choose among them, which takes luck out of the choice.
    A score of the search that is in `earlier` is not made again, so that a grid can be extended.
    """
    scores = {
        point: [math.inf if value is None else value for value in values]
        for point, values in earlier.get(SCORES, {}).items()
    }
    with _mapper(workers) as mapped:

        def runs(points: list[Settings], seeds: Sequence[int]) -> list[list[float]]:
            jobs = [(name, point, seed, steps) for point in points for seed in seeds]
            found = iter(mapped(_run, jobs))
            return [[next(found) for _ in seeds] for _ in points]

        ranked = search(name, scores, lambda points: runs(points, SEEDS))
        finalists = ranked[:FINALISTS]
        finals = runs(finalists, MORE_SEEDS)
    chosen = min(zip(finalists, finals, strict=True), key=lambda final: mean(final[1]))[0]
    print(f"{name}: {label(chosen)}", flush=True)
    return {
        "chosen": dict(chosen),
        "at the end of an axis": at_end(name, chosen),
        "grid": {axis: list(values) for axis, values in GRIDS[name].items()},
        "runs": len(scores) * len(SEEDS) + len(finals) * len(MORE_SEEDS),
        "finalists": {label(p): values for p, values in zip(finalists, finals, strict=True)},
        SCORES: dict(sorted(scores.items(), key=lambda item: mean(item[1]))),
    }


def search(
    name: str,
    scores: dict[str, list[float]],
    score: Callable[[list[Settings]], list[list[float]]],
) -> list[Settings]:
    """Settings of the grid, best first: one axis after another until a turn changes nothing.

    Args:
        name: The optimizer.
        scores: By label; those that are missing are added.
        score: Of settings.
    """
    chosen: Settings = STARTS[name]
    tried: dict[str, Settings] = {}
    for _ in range(MOST_TURNS):
        before = chosen
        for axis, values in GRIDS[name].items():
            line: list[Settings] = [{**chosen, axis: value} for value in values]
            fresh = [point for point in line if label(point) not in scores]
            scores |= zip(map(label, fresh), score(fresh), strict=True)
            tried |= {label(point): point for point in line}
            chosen = min(line, key=lambda point: mean(scores[label(point)]))
            print(f"{name}: {label(chosen)}: {mean(scores[label(chosen)]):.3f}", flush=True)
        if chosen == before:
            break
    return sorted(tried.values(), key=lambda point: mean(scores[label(point)]))


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterable[float]]]:
    if workers == 1:
        yield map
        return
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_one_thread
    ) as pool:
        yield pool.map


def _one_thread() -> None:
    torch.set_num_threads(1)


def _run(job: Job) -> float:
    return final_excess(*job)


def label(point: Settings) -> str:
    """Settings in words."""
    return ", ".join(f"{axis} {value}" for axis, value in point.items())
