"""Which share of the exact decrease each preconditioner reaches on batches it has not seen.

`python benchmarks/decrease.py` fits every structure on seven batches (an eighth decides whether the
fit is kept) and compares all on three fresh ones: the share of -1/2 g'H^{-1}g as the preconditioner
comes, times its best number on the fitting batches, and times its best number on the fresh ones
(which nobody knows beforehand). Baselines see the same batches as one. Writes
results/decrease_{device}.json.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import environment, write
from tasks import make
from torch import Tensor

import llqr_mf as lq
from llqr_mf.fitting.authors_ekronecker import AuthorsEKronecker
from llqr_mf.fitting.measure import measure
from llqr_mf.preconditioners import Layerwise, Structure
from llqr_mf.preconditioners.baselines import ekfac, jacobi, kfac, scaled_identity, soap

FITTING, TEST = 7, 3
MATCHED = 50
"""Products per fit that the authors' recipe spends: one a step."""


def study(name: str, batch: int, damping: float, draws: int | None, rtol: float) -> dict[str, Any]:
    """All preconditioners on one task."""
    task = make(name)
    layers = lq.split(task.model)

    def problem(inputs: Tensor, targets: Tensor) -> lq.LQRProblem:
        return lq.LQRProblem.from_network(
            *(layers, inputs, targets),
            loss="cross_entropy",
            metric="fisher",
            damping=damping,
            check=False,
        )

    batches = [task.draw(batch) for _ in range(FITTING + 1)]
    fitting = [problem(*b) for b in batches]
    whole = problem(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    test = [problem(*task.draw(batch)) for _ in range(TEST)]
    gradients = torch.stack([p.gradient for p in fitting])
    print(f"\n{name}: {whole.size:,} weights, loss {task.loss:.3f}, {task.data}", flush=True)

    made: dict[str, Structure | None] = {"identity": None}
    made["scaled identity"] = scaled_identity(whole)
    made["Jacobi"] = jacobi(whole, samples=draws)
    made["K-FAC"] = kfac(whole, samples=draws)
    made["EKFAC"] = ekfac(whole, samples=draws)
    made["SOAP basis"] = soap(gradients, whole, damping=1e-8)
    made["layerwise Gauss-Newton"] = Layerwise(whole, rtol=1e-2, max_iterations=25)
    spent = dict.fromkeys(made, 0)

    def learn(label: str, start: Callable[[], Structure], **options: Any) -> None:
        structure = start()
        report = lq.fit(
            structure, fitting[:FITTING], held_out=fitting[FITTING:], exact=False, **options
        )
        made[label], spent[label] = structure, report.products
        print(f"  {label}: {report.products} products, {report.reason}", flush=True)

    starts: dict[str, tuple[str, Callable[[], Structure]]] = {
        "diagonal": ("Jacobi", lambda: lq.Diagonal(whole)),
        "Kronecker": ("K-FAC", lambda: lq.Kronecker(whole)),
        "E-Kronecker": ("EKFAC", lambda: lq.EKronecker(whole)),
    }
    for kind, (baseline, plain) in starts.items():
        known = made[baseline]
        assert known is not None
        # One probe per batch; with two charts the second needs its own first product.
        turns = MATCHED // FITTING - 1
        steps = (turns - 1) // 2 if kind == "Kronecker" else turns
        learn(
            f"LLQR {kind}, CG, <= {MATCHED} products",
            known.clone,
            **{"count": 1, "max_iterations": steps, "anchor": 0.1, "sweeps": 1},
        )
        learn(
            f"LLQR {kind}, CG",
            known.clone,
            **{"count": 4, "max_iterations": 15, "anchor": 0.1, "sweeps": 1},
        )
        learn(f"LLQR {kind}, momentum", plain, method="momentum")
        learn(f"LLQR {kind}, momentum from {baseline}", known.clone, method="momentum")
    learn("authors' E-Kronecker, momentum", lambda: AuthorsEKronecker(whole), method="momentum")

    table = lq.probe.compare(test, made, rtol=rtol)
    # A layerwise step costs a CG per layer: its multiple is not fitted.
    tuned = {
        name: multiple(M, fitting[:FITTING])
        for name, M in made.items()
        if not isinstance(M, Layerwise)
    }
    rows = []
    print(f"{'':42}{'products':>9}{'as it is':>11}{'x fitted':>10}{'x best':>8}{'cosine':>8}")
    for row in table.rows:
        # The objective along a ray: J(c) = -c a + c^2 b / 2, read off its best point.
        c, best = tuned.get(row.name, float("nan")), row.multiple
        along = row.best_fraction * (2 * c / best - (c / best) ** 2)
        rows.append(
            {
                "name": row.name,
                "products": spent[row.name],
                "fraction": row.fraction,
                "fraction_at_fitted_multiple": None if along != along else along,
                "fraction_at_best_multiple": row.best_fraction,
                "cosine": row.cosine,
                "state": None if row.state_bytes is None else row.state_bytes / 4 / whole.size,
            }
        )
        print(
            f"{row.name:42}{spent[row.name]:9d}{row.fraction:11.3f}{along:10.3f}"
            f"{row.best_fraction:8.3f}{row.cosine:8.3f}",
            flush=True,
        )
    return {
        "task": name,
        "data": task.data,
        "weights": whole.size,
        "batch": batch,
        "damping": damping,
        "loss": task.loss,
        "sign_draws": draws,
        "optimum": table.optimum,
        "rows": rows,
    }


def multiple(M: Structure | None, problems: list[lq.LQRProblem]) -> float:
    """The best c of c M on some problems."""
    (found,) = measure(
        [M.times_rows if M is not None else lambda v: v], problems, [None] * len(problems)
    )
    return found.multiple


def main() -> None:
    """Runs the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", default=["mlp", "resnet", "transformer"])
    parser.add_argument("--damping", type=float, default=1e-2)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "a layer's solve")  # 25 iterations are all it gets
    report: dict[str, Any] = {**environment("cpu"), "studies": []}
    for name in args.tasks:
        batch = args.batch or (16 if name == "transformer" else 128)
        draws = None if name == "mlp" else 8
        report["studies"].append(study(name, batch, args.damping, draws, rtol=1e-3))
        write(args.output / "decrease_cpu.json", report)


if __name__ == "__main__":
    main()
