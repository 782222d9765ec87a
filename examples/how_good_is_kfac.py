"""How good is K-FAC, really? What it leaves of the curvature, and what it reaches of the step.

Preconditioners M of the Fisher matrix H of a classifier are learned on some batches and judged on
one that none of them has seen: the share of the exact decrease that the step -M g reaches (as it
comes, and times the best number), the eigenvalues of M^{1/2} H M^{1/2} (all 1 for the exact
inverse) with their condition number, and the iterations of CG that they leave.

Run `python examples/how_good_is_kfac.py --output output`; it prints the table and writes
how_good_is_kfac.png and .json.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import torch
from common import arguments, images, keep, mlp, train

import llqr_mf as lq
from llqr_mf.preconditioners.baselines import ekfac, jacobi, kfac, scaled_identity


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the example."""
    parser = arguments(__doc__)
    parser.set_defaults(samples=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--batches", type=int, default=8, help="to learn from")
    parser.add_argument("--damping", type=float, default=1e-2)
    parser.add_argument("--vectors", type=int, default=8, help="for the spectra")
    parser.add_argument("--lanczos", type=int, default=80, help="Lanczos steps for each vector")
    options = parser.parse_args(argv)
    x, y = images(options.data)
    model = mlp([x.shape[1], options.width, options.width, 10], options.seed)
    train(model, x, y, options.steps)
    layers = lq.split(model)

    def problem(start: int, count: int) -> lq.LQRProblem:
        rows = slice(start, start + count)
        return lq.LQRProblem.from_network(
            layers,
            x[rows],
            y[rows],
            loss="cross_entropy",
            metric="fisher",
            damping=options.damping,
        )

    n = options.samples
    fitting = [problem(n * i, n) for i in range(1, 1 + options.batches)]
    whole, fresh = problem(n, n * options.batches), problem(0, n)
    made: dict[str, Any] = {
        "scaled identity": scaled_identity(whole),
        "Jacobi": jacobi(whole),
        "K-FAC": kfac(whole),
        "EKFAC": ekfac(whole),
    }
    learned = made["EKFAC"].clone()
    lq.fit(learned, fitting, count=1, anchor=0.1, max_iterations=6, sweeps=1)
    made["LLQR E-Kronecker"] = learned
    layerwise = lq.preconditioners.Layerwise(fresh)
    shares = lq.probe.compare(fresh, {**made, "layerwise, this batch": layerwise})
    print(shares)

    report: dict[str, Any] = {"compare": shares.to_dict(), "spectra": {}}
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8))
    print(f"\n{'':18}{'largest':>10}{'smallest':>10}{'condition':>11}{'CG iterations':>15}")
    for i, (name, M) in enumerate({"none": None, **made}.items()):
        seen = fresh.hessian if M is None else lq.probe.preconditioned(fresh, M)
        condition = lq.probe.condition_number(seen, seed=options.seed)
        density = lq.probe.spectral_density(
            seen, vectors=options.vectors, steps=options.lanczos, seed=options.seed
        )
        solution = lq.solve(fresh, "cg", preconditioner=M, rtol=1e-6)
        print(
            f"{name:18}{condition.largest:10.3g}{condition.smallest:10.3g}"
            f"{condition.value:11.3g}{solution.iterations:15d}"
        )
        # How many eigenvalues are further from 1 than a factor: the step is wrong there by it.
        factors = torch.logspace(0.02, 4, 200, dtype=torch.float64)
        gap = density.nodes.clamp(min=1e-12).log10().abs().unsqueeze(-1)
        above = (density.weights.unsqueeze(-1) * (gap > factors.log10())).sum(1)
        mean, error = above.mean(0), above.std(0) / len(above) ** 0.5
        left.plot(factors, mean.clamp(min=1e-2), color=f"C{i}", label=name)
        left.fill_between(
            factors,
            (mean - 2 * error).clamp(min=1e-2),
            (mean + 2 * error).clamp(min=1e-2),
            color=f"C{i}",
            alpha=0.2,
            lw=0,
        )
        report["spectra"][name] = {
            "condition": condition.to_dict(),
            "density": density.to_dict(),
            "iterations": solution.iterations,
        }
    left.set(
        xscale="log",
        yscale="log",
        ylim=(0.1, None),
        xlabel="factor, up or down",
        ylabel=f"eigenvalues, of {fresh.size:,}",
        title="eigenvalues of $M^{1/2} H M^{1/2}$ off 1 by more than a factor",
    )
    left.legend(frameon=False, fontsize=8)
    names = [row.name for row in shares.rows]
    places = torch.arange(len(names))
    right.barh(places - 0.2, [max(0.0, r.fraction) for r in shares.rows], 0.4, label="as it comes")
    right.barh(places + 0.2, [r.best_fraction for r in shares.rows], 0.4, label="best multiple")
    for place, row in zip(places.tolist(), shares.rows, strict=True):
        if row.fraction < 0:
            right.text(0.005, place - 0.2, "raises the model", va="center", fontsize=7)
    right.set_yticks(places, names)
    right.invert_yaxis()
    right.set(
        xlim=(0, 1),
        xlabel="share of the exact decrease",
        title="the step $-Mg$ on a batch not learned from",
    )
    right.legend(frameon=False)
    for ax in (left, right):
        ax.grid(alpha=0.3)
    figure.tight_layout()
    return keep(options.output, "how_good_is_kfac", report, figure)


if __name__ == "__main__":
    main()
