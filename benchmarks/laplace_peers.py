"""Laplace posteriors beside laplace-torch 0.3: agreement on a small net, time and memory on wide.

On a small net the full Laplace of both libraries is the same matrix, so the two must agree. On wide
ones every flavour of laplace-torch that runs is beside the exact posterior: its predictive
variances on held-out rows, the seconds of fit and prediction, and the bytes that it needs. What
would not fit into `--memory` is not started, and the row says what it would need.

laplace-torch keeps its hyperparameters in float32, so the two agree to about 1e-6 there. It asks
for torchvision, and torchvision for another torch: install it without (`pip install --no-deps
--target DIR laplace-torch torchmetrics lightning-utilities asdfghjkl`) and put DIR on PYTHONPATH.
Without it only the library's own rows are there.

    python benchmarks/laplace_peers.py --output benchmarks/results/laplace_peers_cpu.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import resource
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from harness import Table, environment
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import llqr_mf as lq
from llqr_mf.gaussian_process import Laplace

try:
    import laplace as peer
except ImportError:
    peer = None  # type: ignore[assignment, unused-ignore]

DELTA, NOISE = 1.0, 0.1
BATCH = 64
"""Rows of which laplace-torch holds Jacobians at a time."""

COLUMNS = {
    "name": "posterior",
    "fit seconds": "fit s",
    "predict seconds": "predict s",
    "needs bytes": "bytes",
    "covariance error": "cov. error",
    "deviation ratio": "std/exact",
}

Task = tuple[nn.Module, Tensor, Tensor, Tensor, str]
"""Model, rows, targets, new rows, likelihood of laplace-torch."""


def network(inputs: int, width: int, outputs: int, dtype: torch.dtype) -> nn.Sequential:
    """Two hidden layers of one width."""
    layers: list[nn.Module] = []
    for a, b in pairwise([inputs, width, width]):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, outputs)).to(dtype)


def task(kind: str, width: int, rows: int, new: int) -> Task:
    """Diabetes or digits, briefly trained, in float64."""
    torch.manual_seed(0)
    data = load_diabetes() if kind == "regression" else load_digits()
    x = torch.from_numpy(data.data)
    x = (x - x.mean(0)) / x.std()
    y = torch.from_numpy(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    if kind == "regression":
        y = ((y - y.mean()) / y.std()).unsqueeze(1)
    model = network(x.shape[1], width, 1 if kind == "regression" else 10, torch.float64)
    loss = nn.functional.mse_loss if kind == "regression" else nn.functional.cross_entropy
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 * (512 / width) ** 0.5)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model(x[:rows]), y[:rows]).backward()
        optimizer.step()
    return model, x[:rows], y[:rows], x[rows : rows + new], kind


def exact(model: nn.Module, x: Tensor, y: Tensor, new: Tensor, kind: str) -> tuple[Any, ...]:
    """Ours: seconds of fit and prediction, and the blocks of the covariance."""
    regression = kind == "regression"
    start = time.perf_counter()
    problem = lq.LQRProblem.from_network(
        lq.split(model), x, y, loss="mse" if regression else "cross_entropy"
    )
    ours = Laplace(
        problem, prior_precision=DELTA, noise=NOISE if regression else None, method="dual"
    )
    middle = time.perf_counter()
    blocks = ours._predicted(new)[1].blocks()
    return middle - start, time.perf_counter() - middle, blocks


def theirs(
    model: nn.Module, x: Tensor, y: Tensor, new: Tensor, kind: str, **options: Any
) -> tuple[Any, ...]:
    """The same by laplace-torch."""
    assert peer is not None
    from laplace.curvature import CurvlinopsGGN

    start = time.perf_counter()
    la = peer.Laplace(
        model,
        "regression" if kind == "regression" else "classification",
        prior_precision=DELTA,
        sigma_noise=NOISE**0.5 if kind == "regression" else 1.0,
        backend=CurvlinopsGGN,
        **options,
    )
    la.fit(DataLoader(TensorDataset(x, y), batch_size=BATCH))
    middle = time.perf_counter()
    variances = [la._glm_predictive_distribution(part)[1] for part in new.split(BATCH)]
    return middle - start, time.perf_counter() - middle, torch.cat(variances)


def flavours(model: nn.Module, x: Tensor, new: Tensor) -> dict[str, tuple[dict[str, Any], float]]:
    """Options of laplace-torch, and the bytes that its matrices take at least.

    The full Laplace holds Lambda and a factor of it, (P, P) each; all but the last layer's make a
    Jacobian (64, C, P) of a batch of rows.
    """
    P = sum(p.numel() for p in model.parameters())
    last = sum(p.numel() for p in model[-1].parameters())  # type: ignore[index]
    classes, size = model[-1].out_features, 8  # type: ignore[index]
    jacobian = size * min(BATCH, len(new)) * classes * P
    everything: dict[str, Any] = {"subset_of_weights": "all"}
    return {
        "full": ({**everything, "hessian_structure": "full"}, 2 * size * P**2 + jacobian),
        "kron": ({**everything, "hessian_structure": "kron"}, jacobian),
        "diag": ({**everything, "hessian_structure": "diag"}, jacobian),
        "last layer, full": (
            {"subset_of_weights": "last_layer", "hessian_structure": "full"},
            2 * size * last**2,
        ),
        "last layer, kron": (
            {"subset_of_weights": "last_layer", "hessian_structure": "kron"},
            size * min(BATCH, len(new)) * classes * last,
        ),
    }


def rows_of(given: Task, memory: float, full: int) -> list[dict[str, Any]]:
    """Ours and every flavour of theirs on one net."""
    model, x, _, new, _ = given
    fit, predict, blocks = exact(*given)
    deviation = blocks.diagonal(dim1=1, dim2=2).sqrt()
    outputs = blocks.shape[1]
    # G, its float64 copy and Cholesky factor, and the cross kernel twice.
    needs = 8 * (3 * (len(x) * outputs) ** 2 + 2 * len(x) * outputs**2 * len(new))
    made = [
        {
            "name": "llqr_mf, exact by the dual",
            "fit seconds": fit,
            "predict seconds": predict,
            "needs bytes": float(needs),
            "covariance error": 0.0,
            "deviation ratio": 1.0,
        }
    ]
    if peer is None:
        return made
    for name, (options, needs_bytes) in flavours(model, x, new).items():
        row: dict[str, Any] = {"name": f"laplace-torch, {name}", "needs bytes": needs_bytes}
        made.append(row)
        if needs_bytes > memory:
            row["note"] = "not started: memory"
            continue
        if name == "full" and sum(p.numel() for p in model.parameters()) > full:
            row["note"] = "not started: minutes at 5,000 weights"
            continue
        try:
            fit, predict, found = theirs(*given, **options)
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
            row["note"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            continue
        row["fit seconds"], row["predict seconds"] = fit, predict
        row["covariance error"] = float((found - blocks).norm() / blocks.norm())
        ratio = found.diagonal(dim1=1, dim2=2).sqrt() / deviation
        row["deviation ratio"] = float(ratio.median())
    return made


def peak() -> float:
    """Bytes of the process at its largest so far."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """All nets; prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--small", type=int, default=16, help="width on which full Laplace fits")
    parser.add_argument("--widths", type=int, nargs="*", default=[64, 1024, 4096])
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--full", type=int, default=5000, help="weights of the last full Laplace")
    parser.add_argument("--memory", type=float, default=4e9, help="bytes that a row may take")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="laplace")
    version = None if peer is None else importlib.metadata.version("laplace-torch")
    report: dict[str, Any] = {
        **environment("cpu"),
        "laplace-torch": version,
        "prior precision": DELTA,
        "noise variance": NOISE,
        "rows": options.rows,
        "new rows": options.new,
        "dtype": "float64",
    }
    if peer is None:
        print("laplace-torch is not installed: only the library's own rows.")
    results = Table(options.output, report, COLUMNS, first=30)
    each: list[tuple[str, int]] = [
        (kind, width)
        for width in (options.small, *options.widths)
        for kind in ("regression", "classification")
    ]
    for kind, width in each:
        given = task(kind, width, options.rows, options.new)
        P = sum(p.numel() for p in given[0].parameters())
        results.header(f"{kind}, width {width}, {P:,} weights")
        for row in rows_of(given, options.memory, options.full):
            results.add({**row, "kind": kind, "width": width, "weights": P})
    report["peak bytes of the process"] = peak()
    results.save()
    return report


if __name__ == "__main__":
    main()
