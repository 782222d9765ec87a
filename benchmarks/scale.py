"""The widest net that one exact step fits into this machine's memory for.

    python benchmarks/scale.py [--width 8192 16384 24576 32768] [--dtype bfloat16] [--in-place]

Every width has a process of its own, which makes the net where it stays (weights repeat 4 M random
numbers, as drawing billions takes minutes), solves once by the dual and reports time, peak memory,
true residual, weights per second and the share of the measured GEMM rate. Widths are climbed until
the memory would not do. `--in-place` adds the step to the weights without forming it.
"""

from __future__ import annotations

import argparse
import inspect
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Floors, Table, Work, environment, floors, synchronize
from nets import dual_work, mlp, mlp_size
from peak import available, limit_memory, peak_memory
from tqdm import tqdm

import llqr_mf as lq

BATCH, CLASSES = 128, 10

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

RTOL = {"float32": 1e-4, "bfloat16": 1e-2, "float64": 1e-8}

COPIES = {False: 3.1, True: 1.2}
"""Weight-sized arrays that are needed, weights included, without and with `--in-place`."""

HEADS = {
    "width": "width",
    "weights": "weights",
    "seconds": "seconds",
    "residual": "residual",
    "peak GB": "peak GB",
    "peak over weights": "peak/weights",
    "weights per second": "weights/s",
    "of the GEMM rate": "of GEMM",
    "of the GEMM rate at its shape": "at shape",
}


def in_place_works() -> bool:
    """Whether this version of the library can solve without forming the step."""
    has_option = "form_step" in inspect.signature(lq.solve).parameters
    return has_option and hasattr(lq, "apply_step_")


def prepare(
    width: int,
    layers: int,
    dtype: str,
    damping: float,
    rtol: float,
    in_place: bool,
    repeats: int,
    device: str,
    *,
    tiny: bool = False,
) -> Callable[[], dict[str, Any]]:
    """For `peak_memory`: makes the net; the function returned takes the step."""
    torch.manual_seed(0)
    model, x, y = mlp(
        *(16 if tiny else width, layers, BATCH, CLASSES),
        dtype=DTYPES[dtype],
        device=device,
        tiled=True,
    )

    def once() -> tuple[float, lq.Solution]:
        synchronize(device)
        start = time.perf_counter()
        problem = lq.LQRProblem.from_network(
            lq.split(model), x, y, loss="cross_entropy", damping=damping
        )
        if in_place:
            solution = lq.solve(problem, method="dual", rtol=rtol, form_step=False)
            lq.apply_step_(problem, solution)
        else:
            solution = lq.solve(problem, method="dual", rtol=rtol)
        synchronize(device)
        return time.perf_counter() - start, solution

    def run() -> dict[str, Any]:
        every = []
        for _ in range(1 if tiny else repeats):
            # In place the next step starts from other weights, which cost the same.
            seconds, solution = once()
            every.append(seconds)
            residual = float(solution.residual_norm)
            status, products = str(solution.status), solution.products
            del solution
        rss = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work = dual_work(model, BATCH, CLASSES)
        answer = {"seconds": min(every), "all seconds": every, "residual": residual}
        answer |= {"status": status, "products": products, "peak RSS": rss}
        return answer | {"flops": work.flops, "bytes": work.bytes}

    return run


def row_of(width: int, options: argparse.Namespace, floor: Floors) -> dict[str, Any]:
    """One width, in a process of its own, or why not."""
    size = mlp_size(width, options.layers, CLASSES)
    weights = size * DTYPES[options.dtype].itemsize
    row: dict[str, Any] = {"width": width, "layers": options.layers, "weights": size}
    row |= {"bytes estimated": int(COPIES[options.in_place] * weights)}
    row |= {"bytes available": available(options.device)}
    if row["bytes estimated"] > row["bytes available"]:
        needed = row["bytes estimated"] / 1e9
        return row | {"fits": False, "note": f"does not fit: {needed:.1f} GB"}
    keys = ("layers", "dtype", "damping", "rtol", "in_place", "repeats", "device")
    arguments = {"width": width, **{key: getattr(options, key) for key in keys}}
    found = peak_memory("scale:prepare", arguments, device=options.device)
    if "failed" in found:
        return row | {"fits": False, "note": found["failed"]}
    answer = found.pop("answer")
    row |= {"fits": True, "memory": found, **answer}
    row |= {"peak GB": found["peak"] / 1e9, "peak over weights": found["peak"] / weights}
    row["growth over weights"] = found["growth"] / weights
    row["weights per second"] = size / answer["seconds"]
    work = Work(answer["flops"], answer["bytes"])
    return row | floor.row(work, answer["seconds"], width)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Climbs the widths and writes the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    widths = [4096, 8192, 16384, 20480, 24576, 28672, 32768]
    parser.add_argument("--width", type=int, nargs="+", default=widths)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument("--rtol", type=float, default=None)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--in-place", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(arguments)
    if options.rtol is None:
        options.rtol = RTOL[options.dtype]
    if options.in_place and not in_place_works():
        parser.error("--in-place needs lq.solve(form_step=False) and lq.apply_step_.")
    dtype = DTYPES[options.dtype]
    # Wider ones would crowd out what is measured.
    small = [w for w in options.width if 2 * w**2 * dtype.itemsize <= available(options.device)]
    floor = floors(options.device, dtype, widths=small, batch=BATCH, repeats=3)
    print(floor)
    name = f"scale_{options.dtype}{'_in_place' if options.in_place else ''}_{options.device}.json"
    report: dict[str, Any] = {"benchmark": "scale", **environment(options.device)}
    keys = ("layers", "dtype", "damping", "rtol", "in_place")
    report |= {key: getattr(options, key) for key in keys}
    report |= {"batch": BATCH, "classes": CLASSES, "floors": floor.report()}
    path = options.output or Path(__file__).parent / "results" / name
    table = Table(path, report, HEADS, first=8)
    for width in tqdm(sorted(options.width), "widths"):
        table.add(row_of(width, options, floor))
        if not table.rows[-1]["fits"]:
            break
    fitting = [row["width"] for row in table.rows if row["fits"]]
    report["widest"] = max(fitting, default=None)
    table.save()
    print(f"widest: {report['widest']}; wrote {path}")
    return report


if __name__ == "__main__":
    limit_memory()
    main()
