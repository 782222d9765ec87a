"""Peak memory of one computation, in a process of its own.

A process remembers the most it ever held, and a child started by fork inherits that number (in
`ru_maxrss`), so neither two methods in one process nor a child of a large process can be compared
by it. Here every method has a fresh process, which prepares, warms up on a tiny case where there is
one, resets the mark (Linux: /proc/self/clear_refs) and then runs the method once.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SPARE = 0.06
"""Share of the free memory that nothing here asks for."""


def available(device: str = "cpu") -> int:
    """Bytes that could be allocated now, less a spare part."""
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info()[0]
        # What torch has cached is free to it.
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    return int(free * (1 - SPARE))


def limit_memory() -> None:
    """Lets an allocation beyond the free memory raise, in place of the kernel's killing someone.

    Not with a GPU, whose driver maps far more than it uses.
    """
    if not torch.cuda.is_available():
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (available() + _status("VmData"), hard))


def peak_memory(task: str, arguments: dict[str, Any], *, device: str = "cpu") -> dict[str, Any]:
    """Runs a task in a fresh process.

    Args:
        task: "module:function" of this folder. The function takes the arguments and returns a
            function without any, which is measured; what it returns, a dict or None, comes back.
            With `tiny=True` added to the arguments it returns one for a warm-up on a tiny case.
        arguments: JSON.
        device: "cpu" or "cuda".

    Returns:
        "before" (bytes held when the measured function began), "peak" and their difference
        "growth", and "answer"; or "failed", the reason.
    """
    order = {"task": task, "arguments": arguments, "device": device}
    order["threads"] = torch.get_num_threads()
    # Small blocks then go back to the system when freed, as large ones do: what is left is alive.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(order)],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    if done.returncode < 0:
        return {"failed": f"killed by {signal.Signals(-done.returncode).name}"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"failed": lines[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def measured(order: dict[str, Any]) -> dict[str, Any]:
    """The child's part."""
    device = order["device"]
    torch.set_num_threads(order["threads"])
    limit_memory()
    module, name = order["task"].split(":")
    prepare = getattr(importlib.import_module(module), name)
    # Libraries, threads and their buffers come with the first call.
    prepare(**order["arguments"], tiny=True)()
    function = prepare(**order["arguments"])
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        answer = function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        before = _reset()
        answer = function()
        peak = _status("VmHWM")
    return {"before": before, "peak": peak, "growth": peak - before, "answer": answer}


def _reset() -> int:
    """Sets the mark of the most memory held to what is held now, and returns that."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":"))


if __name__ == "__main__":
    print(json.dumps(measured(json.loads(sys.argv[1]))))
