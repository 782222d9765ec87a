"""One condensed-Hessian product in units of one gradient, beside curvlinops' GGN.

    python benchmarks/product_cost.py [--widths 1024 2048] [--device cuda]

The gradient is `torch.autograd.grad` of the mean cross-entropy, forward pass included. The
products reuse one linearisation. All are timed in turn in one run, and the ratios are of medians.
curvlinops joins if it is installed (`make bench-env`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import environment, interleaved, median_ratio, spread, write
from nets import Case, mlp, resnet18, transformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import llqr_mf as lq

COLUMNS = 16


def curvlinops_product(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The peer's Gauss-Newton product, or None if it is not installed."""
    try:
        from curvlinops import GGNLinearOperator
    except ImportError:
        return None
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = nn.CrossEntropyLoss()
    operator = GGNLinearOperator(model, loss, parameters, [(x, y)], check_deterministic=False)
    return lambda v: operator @ v


def measure(name: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    device = options.device
    model, x, y = case[0].to(device), case[1].to(device), case[2].to(device)
    parameters = list(model.parameters())
    problem = lq.LQRProblem.from_network(
        lq.split(model), x, y, loss="cross_entropy", damping=0.0, check=False
    )
    hessian = problem.hessian
    v = torch.randn(problem.size, device=device)
    buffer = torch.empty(1, problem.size, device=device)

    def gradient() -> None:
        torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)

    functions: dict[str, Callable[[], Any]] = {
        "gradient": gradient,
        "product": lambda: hessian @ v,
        "product into a buffer": lambda: hessian.multiply_rows(v.unsqueeze(0), buffer),
    }
    peer = curvlinops_product(model, x, y)
    difference = None
    if peer is not None:
        functions["curvlinops"] = lambda: peer(v)
        ours, theirs = hessian @ v, peer(v)
        difference = float((ours - theirs).norm() / theirs.norm())
    with torch.no_grad():
        single = functions.pop("product"), functions.pop("product into a buffer")
    functions["product"], functions["product into a buffer"] = (_no_grad(f) for f in single)
    seconds = interleaved(functions, repeats=options.repeats, device=device)
    block = torch.randn(COLUMNS, problem.size, device=device)
    out = torch.empty_like(block)
    blocks = interleaved(
        {
            "16 columns": _no_grad(lambda: hessian.multiply_rows(block, out)),
            "16 single": _no_grad(
                lambda: [
                    hessian.multiply_rows(block[j : j + 1], out[j : j + 1]) for j in range(COLUMNS)
                ]
            ),
        },
        # A round is 32 products; about a minute of rounds, three at least.
        repeats=max(3, min(15, int(60 / (45 * median(seconds["gradient"]))))),
        device=device,
    )
    row = {
        "net": name,
        "batch": len(x),
        "parameters": problem.size,
        "gradient seconds": median(seconds["gradient"]),
        "gradients per product": median_ratio(seconds, "product", "gradient"),
        "gradients per product into a buffer": median_ratio(
            seconds, "product into a buffer", "gradient"
        ),
        "16 columns over 16 single": median_ratio(blocks, "16 columns", "16 single"),
        "spread": {name: spread(values) for name, values in {**seconds, **blocks}.items()},
    }
    if peer is not None:
        row["gradients per curvlinops product"] = median_ratio(seconds, "curvlinops", "gradient")
        row["relative difference to curvlinops"] = difference
    return row


def _no_grad(function: Callable[[], Any]) -> Callable[[], Any]:
    def wrapped() -> Any:
        with torch.no_grad():
            return function()

    return wrapped


def main() -> None:
    """Measures every width and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--nets", nargs="+", default=["mlp", "resnet18", "transformer"])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.manual_seed(0)
    cases: dict[str, Callable[[], Case]] = {}
    if "mlp" in options.nets:
        cases |= {f"mlp width {w}": lambda w=w: mlp(w) for w in options.widths}
    if "resnet18" in options.nets:
        cases["resnet18"] = resnet18
    if "transformer" in options.nets:
        cases["transformer, 6 layers"] = transformer
    rows = []
    for name, make in cases.items():
        # Fused attention has no second derivative: the peer needs the MATH backend too.
        with sdpa_kernel(SDPBackend.MATH):
            row = measure(name, make(), options)
        rows.append(row)
        for key, value in row.items():
            if isinstance(value, float):
                print(f"{name:24} {key:40} {value:.4g}")
    report = {"benchmark": "product_cost", **environment(options.device), "rows": rows}
    default = Path(__file__).parent / "results" / f"product_cost_{options.device}.json"
    write(options.output or default, report)


if __name__ == "__main__":
    main()
