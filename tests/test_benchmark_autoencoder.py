"""The autoencoder benchmark in a short form: it tunes, scores, writes and draws."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    spec = importlib.util.spec_from_file_location("autoencoder", BENCHMARKS / "autoencoder.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "autoencoder", module)
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


def test_the_task(bench: ModuleType) -> None:
    from digits_ae import task

    x = bench.images()
    assert x.shape == (1797, 64) and float(x.min()) == 0 and float(x.max()) == 1
    # The floor is attained where the logits are those of the pixels.
    sure = torch.logit(x.double().clamp(1e-12, 1 - 1e-12))
    least = bench.floor(x)
    assert float(task.loss(sure, x.double()) - least) == pytest.approx(0, abs=1e-8)
    assert bench.excess(torch.nn.Identity(), x, least) > 1
    order = bench.batches(0, 9, len(x))
    assert len(order) == 9 and all(len(i) == 256 for i in order)
    # Seven batches are an epoch: no image twice in it, and another order in the next.
    assert len(torch.cat(order[:7]).unique()) == 7 * 256
    assert not torch.equal(order[0], order[7])
    same = zip(bench.autoencoder(3).parameters(), bench.autoencoder(3).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_what_is_reported(bench: ModuleType) -> None:
    run = bench.Run(seconds=[1.0, 2.0, 3.0], at=[0, 2, 3], excess=[9.0, 4.0, 2.0])
    assert run.clock == [0, 3, 6]
    assert run.reached(4.0) == (2, 3) and run.reached(1.0) == (math.inf, math.inf)
    ratio = bench.bootstrap_ratio([1.0, 2.0], [2.0, 4.0])
    # Every paired draw has the same ratio.
    assert ratio["ratio"] == 0.5 and ratio["95 % interval"] == pytest.approx([0.5, 0.5])


def test_schedules_start_warm_and_end_low(bench: ModuleType) -> None:
    from digits_ae.contestants import factor

    for schedule, last in (("linear", 0.01), ("cosine", 0.01), ("constant", 1.0)):
        shape = factor(schedule, 300)
        assert shape(0) == pytest.approx(0.05, rel=1e-3)
        assert max(map(shape, range(300))) <= 1 and shape(299) <= last


def test_tunes_scores_and_draws(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pytorch_optimizer")
    from digits_ae import contestants, tuning

    monkeypatch.setattr(tuning, "SEEDS", (10,))
    monkeypatch.setattr(tuning, "MORE_SEEDS", (10, 11))
    # Nothing to tune but SGD, whose second learning rate diverges.
    for name, start in contestants.STARTS.items():
        axis = next(iter(start))
        values = (1e9, start["lr"]) if name == "SGD" else (start[axis],)
        monkeypatch.setitem(contestants.GRIDS, name, {axis: values})
    result, image = tmp_path / "result.json", tmp_path / "image.png"
    short: list[Any] = ["--steps", "4", "--results", str(result), "--image", str(image)]
    bench.main([*short, "--tune", "--workers", "1"])
    tuned = json.loads(result.read_text())["tuning"]
    assert tuned["SGD"]["chosen"] == contestants.STARTS["SGD"]
    assert all(entry["runs"] == (6 if name == "SGD" else 3) for name, entry in tuned.items())
    bench.main([*short, "--seeds", "0"])
    report = json.loads(result.read_text())
    assert set(report["optimizers"]) == set(bench.CONTESTANTS)
    # Same weights and evaluation for all: the curves start at one point.
    starts = {curve["median"][0] for curve in report["curves over seeds"].values()}
    assert len(starts) == 1
    assert report["optimizers"]["LLQR subspace"]["final excess"] < starts.pop()
    assert image.stat().st_size > 10_000
