"""Interleaved timing, and what is written beside every number."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


def interleaved(
    functions: dict[str, Callable[[], Any]],
    *,
    repeats: int,
    warm_up: int = 2,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Seconds of every function, each called once per round, so that drift hits all alike.

    `warm_up` rounds go first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in tqdm(range(-warm_up, repeats), leave=False):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: dict[str, list[float]], name: str, unit: str) -> float:
    """Median time of one function in medians of another."""
    return statistics.median(seconds[name]) / statistics.median(seconds[unit])


def spread(values: list[float]) -> float:
    """Half the interquartile range over the median."""
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


def write(path: Path, report: dict[str, Any]) -> None:
    """The report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")


def _cpu() -> str:
    lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    names = [line.split(":")[1].strip() for line in lines.splitlines() if "Model name" in line]
    return names[0] if names else platform.processor()
