"""One condensed-Hessian product in units of one gradient, beside curvlinops' GGN.

    python benchmarks/product_cost.py [--widths 1024 2048] [--device cuda]

The gradient is `torch.autograd.grad` of the mean cross-entropy, forward pass included. The
products reuse one linearisation. All are timed in turn in one run, and the ratios are of medians.
Peak memory is of making the operator and one product with it, beyond weights, batch and vector, in
a process per method. The floor is the least time of the product's flops and bytes on this device.
curvlinops joins if it is installed (`make bench-env`).
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import (
    Floors,
    Table,
    counted,
    environment,
    floors,
    interleaved,
    median_ratio,
    spread,
)
from nets import Case, gradient_work, mlp, mlp_size, product_work, resnet18, size_of, transformer
from peak import available, limit_memory, peak_memory
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import llqr_mf as lq

COLUMNS = 16

LINEAR_TARGET, OTHER_TARGET, PEER_TARGET = 1.35, 2.0, 1.5
"""Gradients per product at most, and how many times faster than the peer at least."""

AGREEMENT = 1e-4

COPIES = {"held": 3, "gradient": 1, "product": 1, "curvlinops": 3, "memory": 2}
"""Weight-sized arrays: held all along (weights, vector, buffer), and in use during each."""

METHODS = ("product", "product into a buffer", "curvlinops")

HEADS = {
    "net": "net",
    "parameters": "weights",
    "gradient seconds": "gradient s",
    "gradients per product": "fresh",
    "gradients per product into a buffer": "buffered",
    "gradients per curvlinops product": "curvlinops",
    "relative difference to curvlinops": "difference",
    "peak of ours": "peak/weights",
    "peak of curvlinops": "its peak",
    "over the floor": "/ floor",
    "cost target met": "cost",
    "peer target met": "peer",
}


def make(net: str, device: str, *, tiny: bool = False) -> Case:
    """A net by name, "mlp 512", "resnet18" or "transformer", and its batch."""
    torch.manual_seed(0)
    if net.startswith("mlp"):
        return mlp(16 if tiny else int(net.split()[1]), device=device)
    small = {"resnet18": {"batch": 2}, "transformer": {"width": 16, "layers": 1, "batch": 2}}
    build = {"resnet18": resnet18, "transformer": transformer}[net]
    model, x, y = build(**(small[net] if tiny else {}))
    return model.to(device), x.to(device), y.to(device)


def make_problem(model: nn.Module, x: Tensor, y: Tensor) -> lq.LQRProblem:
    """The Gauss-Newton problem without damping."""
    return lq.LQRProblem.from_network(
        lq.split(model), x, y, loss="cross_entropy", damping=0.0, check=False
    )


def curvlinops_product(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The peer's Gauss-Newton product, or None if it is not installed."""
    if importlib.util.find_spec("curvlinops") is None:
        return None
    from curvlinops import GGNLinearOperator

    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = nn.CrossEntropyLoss()
    operator = GGNLinearOperator(model, loss, parameters, [(x, y)], check_deterministic=False)
    return lambda v: operator @ v


def prepare_memory(net: str, method: str, device: str, *, tiny: bool = False) -> Callable[[], None]:
    """For `peak_memory`: makes the operator of a method and multiplies once."""
    model, x, y = make(net, device, tiny=tiny)
    v = torch.randn(size_of(model), device=device)
    buffer = torch.zeros(1, len(v), device=device) if method == "product into a buffer" else None

    def run() -> None:
        # Fused attention has no second derivative: the peer needs the MATH backend too.
        with sdpa_kernel(SDPBackend.MATH):
            if method == "curvlinops":
                curvlinops_product(model, x, y)(v)
                return
            hessian = make_problem(model, x, y).hessian
            with torch.no_grad():
                if buffer is None:
                    hessian @ v
                else:
                    hessian.multiply_rows(v.unsqueeze(0), buffer)

    return run


def memories(net: str, weights: int, methods: Sequence[str], device: str) -> dict[str, Any]:
    """Peak memory of every method that fits."""
    found = {}
    for method in methods:
        needed = 4 * weights * (2 + COPIES["curvlinops" if method == "curvlinops" else "memory"])
        if needed > available(device):
            found[method] = _does_not_fit(needed, device)
        else:
            arguments = {"net": net, "method": method, "device": device}
            found[method] = peak_memory("product_cost:prepare_memory", arguments, device=device)
    return found


def measure(net: str, options: argparse.Namespace, floor: Floors) -> dict[str, Any]:
    """One row of the table."""
    device = options.device
    linear = net.startswith("mlp")
    has_peer = importlib.util.find_spec("curvlinops") is not None
    weights = mlp_size(int(net.split()[1])) if linear else size_of(make(net, "cpu")[0])
    row: dict[str, Any] = {"net": net, "parameters": weights}
    copies = COPIES["held"] + COPIES["product"]
    if 4 * weights * copies > available(device):
        return row | _does_not_fit(4 * weights * copies, device) | {"note": "does not fit"}
    # First, while this process holds nothing.
    methods = METHODS if has_peer else METHODS[:2]
    memory = {} if options.no_memory else memories(net, weights, methods, device)
    model, x, y = make(net, device)
    parameters = list(model.parameters())
    problem = make_problem(model, x, y)
    hessian = problem.hessian
    v = torch.randn(problem.size, device=device)
    # Touched, for the pages of an empty one are not in memory yet.
    buffer = torch.zeros(1, problem.size, device=device)

    def gradient() -> None:
        torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)

    def buffered() -> None:
        hessian.multiply_rows(v.unsqueeze(0), buffer)

    functions: dict[str, Callable[[], Any]] = {
        "gradient": gradient,
        "product": _no_grad(lambda: hessian @ v),
        "product into a buffer": _no_grad(buffered),
    }
    if has_peer:
        needed = 4 * weights * COPIES["curvlinops"]
        if needed > available(device):
            row["curvlinops"] = _does_not_fit(needed, device)
            row["note"] = "curvlinops does not fit"
        else:
            peer = curvlinops_product(model, x, y)
            functions["curvlinops"] = lambda: peer(v)
            theirs = peer(v)
            with torch.no_grad():
                buffered()
                unit = float(theirs.norm())
                row["relative difference to curvlinops"] = float(theirs.sub_(buffer[0]).norm())
            row["relative difference to curvlinops"] /= unit
            del theirs
    once = _seconds(gradient, device)
    # A round is about six gradients.
    repeats = max(options.least, min(options.repeats, int(options.seconds / (6 * once))))
    seconds = interleaved(functions, repeats=repeats, device=device)
    taken = median(seconds["gradient"])
    row |= {
        "batch": len(x),
        "repeats": repeats,
        "gradient seconds": taken,
        "gradients per product": median_ratio(seconds, "product", "gradient"),
        "gradients per product into a buffer": median_ratio(
            seconds, "product into a buffer", "gradient"
        ),
    }
    if "curvlinops" in functions:
        row["gradients per curvlinops product"] = median_ratio(seconds, "curvlinops", "gradient")
    if linear:
        width = int(net.split()[1])
        work = product_work(model, len(x))
        gradients = gradient_work(model, len(x))
    else:
        width = None
        # Weights twice, the vector and the product; or weights twice and the gradient.
        work = counted(functions["product into a buffer"], 16 * weights)
        gradients = counted(gradient, 12 * weights)
    row |= floor.row(work, median(seconds["product into a buffer"]), width)
    row["gradient's floor"] = floor.row(gradients, taken, width)
    row |= _blocks(hessian, weights, taken, options)
    row["spread"] = row.get("spread", {}) | {name: spread(s) for name, s in seconds.items()}
    row["memory"] = memory
    for name, key in (("ours", "product"), ("curvlinops", "curvlinops")):
        if "growth" in memory.get(key, {}):
            row[f"peak of {name}"] = memory[key]["growth"] / (4 * weights)
    return row | targets(row, linear)


def targets(row: dict[str, Any], linear: bool) -> dict[str, Any]:
    """Which targets a row meets; None where there is nothing to compare with."""
    ours = row["gradients per product into a buffer"]
    limit = LINEAR_TARGET if linear else OTHER_TARGET
    met: dict[str, Any] = {
        "cost target": limit,
        "cost target met": ours <= limit,
        "cost target met fresh": row["gradients per product"] <= limit,
        "peer target": PEER_TARGET,
        "peer target met": None,
        "agreement met": None,
        "memory target met": None,
    }
    if "gradients per curvlinops product" in row:
        row["times faster than curvlinops"] = row["gradients per curvlinops product"] / ours
        row["times faster than curvlinops, fresh"] = (
            row["gradients per curvlinops product"] / row["gradients per product"]
        )
        met["peer target met"] = row["times faster than curvlinops"] >= PEER_TARGET
        met["agreement met"] = row["relative difference to curvlinops"] <= AGREEMENT
    if "peak of ours" in row and "peak of curvlinops" in row:
        met["memory target met"] = row["peak of ours"] <= row["peak of curvlinops"]
    return met


def _blocks(
    hessian: Any, weights: int, gradient: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Sixteen columns at once beside sixteen single products, if there is room."""
    needed = 2 * COLUMNS * 4 * weights
    if needed > available(options.device) // 2:
        return {"16 columns": _does_not_fit(needed, options.device)}
    block = torch.randn(COLUMNS, weights, device=options.device)
    out = torch.zeros_like(block)

    def single() -> None:
        for j in range(COLUMNS):
            hessian.multiply_rows(block[j : j + 1], out[j : j + 1])

    blocks = interleaved(
        {
            "16 columns": _no_grad(lambda: hessian.multiply_rows(block, out)),
            "16 single": _no_grad(single),
        },
        # A round is 32 products.
        repeats=max(min(3, options.repeats), min(15, int(options.seconds / (45 * gradient)))),
        warm_up=1,
        device=options.device,
    )
    return {
        "16 columns over 16 single": median_ratio(blocks, "16 columns", "16 single"),
        "spread": {name: spread(values) for name, values in blocks.items()},
    }


def _does_not_fit(needed: int, device: str) -> dict[str, Any]:
    return {"does not fit": {"bytes needed": needed, "bytes available": available(device)}}


def _seconds(function: Callable[[], Any], device: str) -> float:
    return min(interleaved({"": function}, repeats=1, warm_up=1, device=device)[""])


def _no_grad(function: Callable[[], Any]) -> Callable[[], Any]:
    def wrapped() -> Any:
        with torch.no_grad():
            return function()

    return wrapped


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures every net and writes the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--widths", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192, 16384]
    )
    parser.add_argument("--nets", nargs="*", default=["mlp", "resnet18", "transformer"])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--least", type=int, default=3, help="repeats of the largest nets")
    parser.add_argument("--seconds", type=float, default=120, help="of rounds, about, per net")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(arguments)
    names = [f"mlp {w}" for w in options.widths] if "mlp" in options.nets else []
    names += [net for net in options.nets if net != "mlp"]
    floor = floors(options.device, widths=options.widths if "mlp" in options.nets else ())
    print(floor)
    default = Path(__file__).parent / "results" / f"product_cost_{options.device}.json"
    report: dict[str, Any] = {"benchmark": "product_cost", **environment(options.device)}
    report["floors"] = floor.report()
    table = Table(options.output or default, report, HEADS)
    for net in names:
        with sdpa_kernel(SDPBackend.MATH):
            table.add(measure(net, options, floor))
    print(f"wrote {table.path}")
    return report


if __name__ == "__main__":
    limit_memory()
    main()
