"""Interleaved timing, the two floors of a machine, and what is written beside every number."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

GEMM_SIZES = {"cpu": (1024, 2048, 3072), "cuda": (4096, 8192)}
"""Sides of the square products whose best rate is the floor of flops."""

COPY_BYTES = {"cpu": 2**29, "cuda": 2**30}
"""Length of the copy whose rate is the floor of bytes; larger than every cache."""


def interleaved(
    functions: dict[str, Callable[[], Any]],
    *,
    repeats: int,
    warm_up: int = 2,
    device: str = "cpu",
    limits: dict[str, int] | None = None,
    after: Callable[[str, Any], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every function, each called once per round, so that drift hits all alike.

    `warm_up` rounds go first.

    Args:
        functions: By name.
        repeats: Rounds.
        warm_up: Untimed rounds before them.
        device: To wait for.
        limits: At most so many timed calls of a function; one with a single call is not warmed up.
        after: Sees the name and the answer of every timed call, off the clock.
        clock: `time.process_time` where others use the machine.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    limits = limits or {}
    for turn in tqdm(range(-warm_up, repeats), leave=False):
        for name, function in functions.items():
            limit = limits.get(name, repeats)
            if turn >= limit or (turn < 0 and limit == 1):
                continue
            synchronize(device)
            start = clock()
            answer = function()
            synchronize(device)
            if turn >= 0:
                seconds[name].append(clock() - start)
                if after is not None:
                    after(name, answer)
            # Held, an answer of one function would be on the next one's memory.
            del answer
    return seconds


def median_ratio(seconds: dict[str, list[float]], name: str, unit: str) -> float:
    """Median time of one function in medians of another."""
    return statistics.median(seconds[name]) / statistics.median(seconds[unit])


def spread(values: list[float]) -> float:
    """Half the interquartile range over the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / statistics.median(values)


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def environment(device: str) -> dict[str, Any]:
    """Device, versions and threads."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else _cpu()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write(path: Path, report: dict[str, Any], *, quiet: bool = False) -> None:
    """The report as JSON, replaced in one move: a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(part, path)
    if not quiet:
        print(f"wrote {path}")


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Slope of the line through (log x, log y) by least squares; None for fewer than two points."""
    if len(set(xs)) < 2:
        return None
    return statistics.linear_regression(list(map(math.log, xs)), list(map(math.log, ys))).slope


@dataclass(frozen=True)
class Work:
    """What a computation needs at least.

    Args:
        flops: Of its matrix products.
        bytes: Read and written by them, each operand once per product.
    """

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Floors:
    """The measured speed limits of a device.

    Args:
        rate: flop/s of the fastest square matrix product.
        size: Its side.
        rates: flop/s of (batch, width) times (width, width), by width.
        bandwidth: Bytes read and written per second by a copy.
    """

    rate: float
    size: int
    rates: dict[int, float]
    bandwidth: float

    def seconds(self, work: Work) -> float:
        """The least time of some work."""
        return max(work.flops / self.rate, work.bytes / self.bandwidth)

    def row(self, work: Work, seconds: float, width: int | None = None) -> dict[str, Any]:
        """What a row says of its work; with the rate at its shape, if that was measured."""
        row = {
            "flops at least": work.flops,
            "bytes at least": work.bytes,
            "over the floor": seconds / self.seconds(work),
            "of the GEMM rate": work.flops / seconds / self.rate,
        }
        if width in self.rates:
            row["of the GEMM rate at its shape"] = work.flops / seconds / self.rates[width]
        return row

    def report(self) -> dict[str, Any]:
        """For the JSON."""
        return {
            "GEMM flop/s": self.rate,
            "GEMM size": self.size,
            "GEMM flop/s of (batch, width) x (width, width)": self.rates,
            "bandwidth bytes/s": self.bandwidth,
            "float32 precision": torch.get_float32_matmul_precision(),
        }

    def __str__(self) -> str:
        shapes = ", ".join(f"{w}: {r / 1e9:.4g}" for w, r in self.rates.items())
        return (
            f"floors: {self.rate / 1e9:.4g} Gflop/s (GEMM {self.size}; at batch x width {shapes}), "
            f"{self.bandwidth / 1e9:.4g} GB/s"
        )


def floors(
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    widths: Sequence[int] = (),
    batch: int = 128,
    repeats: int = 5,
) -> Floors:
    """Measures both floors; the best of all repeats, as nothing can be faster by chance.

    Args:
        device: Which.
        dtype: Of the products.
        widths: Whose rate is measured too, at (batch, width) x (width, width).
        batch: Rows of those.
        repeats: Of each.
    """
    kind = device.split(":")[0]

    def rate(rows: int, width: int) -> float:
        a = torch.randn(rows, width, device=device).to(dtype)
        b = torch.empty(width, width, device=device, dtype=dtype).fill_(0.5)
        out = torch.empty(rows, width, device=device, dtype=dtype)
        return 2 * rows * width**2 / _best(lambda: torch.mm(a, b, out=out), device, repeats)

    squares = {size: rate(size, size) for size in tqdm(GEMM_SIZES[kind], "GEMMs", leave=False)}
    rates = {width: rate(batch, width) for width in tqdm(widths, "its shapes", leave=False)}
    source = torch.ones(COPY_BYTES[kind], dtype=torch.uint8, device=device)
    copied = torch.empty_like(source)
    bandwidth = 2 * len(source) / _best(lambda: copied.copy_(source), device, repeats)
    size = max(squares, key=lambda s: squares[s])
    # Where caches favour a shape of its own, that is what the machine can do.
    return Floors(max(squares[size], *rates.values(), 0.0), size, rates, bandwidth)


def counted(function: Callable[[], Any], moved: float) -> Work:
    """Work of a function as torch's flop counter sees it, with the bytes that are given."""
    with FlopCounterMode(display=False) as counter:
        function()
    return Work(float(counter.get_total_flops()), moved)


@dataclass
class Table:
    """A report that grows: each row is printed and the JSON written at once.

    Args:
        path: Of the JSON.
        report: Holds what is beside the rows.
        columns: Keys of a row that are printed, with their heads.
        first: Width of the first column.
    """

    path: Path
    report: dict[str, Any]
    columns: dict[str, str]
    first: int = 24
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.report["rows"] = self.rows
        self.header()

    def header(self, title: str = "") -> None:
        """The heads of the columns again."""
        heads = list(self.columns.values())
        line = f"{heads[0]:{self.first}}" + "".join(f" {h:>11}" for h in heads[1:])
        tqdm.write(f"\n{title}\n{line}" if title else f"\n{line}")

    def add(self, row: dict[str, Any]) -> None:
        """One more row."""
        self.rows.append(row)
        self.save()
        first, *others = (_cell(row.get(key)) for key in self.columns)
        note = row.get("note")
        cells = "".join(f" {c:>11}" for c in others) + (f"  {note}" if note else "")
        tqdm.write(f"{first:{self.first}}{cells}")

    def save(self) -> None:
        """Writes the JSON without a word."""
        write(self.path, self.report, quiet=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "met" if value else "missed"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _best(function: Callable[[], Any], device: str, repeats: int) -> float:
    # Launches of a GPU overlap: ten of them between two waits.
    calls = 10 if device.startswith("cuda") else 1
    best = math.inf
    for turn in range(1 + repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(device)
        if turn:
            best = min(best, (time.perf_counter() - start) / calls)
    return best


def _cpu() -> str:
    lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    names = [line.split(":")[1].strip() for line in lines.splitlines() if "Model name" in line]
    return names[0] if names else platform.processor()
