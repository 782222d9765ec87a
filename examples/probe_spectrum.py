"""The spectrum of a trained net's loss Hessian and Gauss-Newton matrix, with error bars.

Largest and smallest eigenvalues by Lanczos, the density by stochastic Lanczos quadrature, the trace
by four estimators at equal numbers of products, log-determinant and effective dimension. One batch
or, with `--stream`, the whole of the images, one batch in memory at a time, in which case every
estimate can be stopped and gone on with (`--resume`).

Run `python examples/probe_spectrum.py --output output`; it prints the tables and writes
probe_spectrum.png and .json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from common import arguments, images, keep, mlp, train

import llqr_mf as lq

TRACES = ("hutchinson", "hutch++", "xtrace", "xnystrace")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the example."""
    parser = arguments(__doc__)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument("--top", type=int, default=12, help="eigenvalues at the upper end")
    parser.add_argument("--vectors", type=int, default=10, help="for the density")
    parser.add_argument("--lanczos", type=int, default=60, help="Lanczos steps for each vector")
    parser.add_argument("--products", type=int, default=60, help="for each trace")
    parser.add_argument("--stream", action="store_true", help="all images, in batches")
    parser.add_argument("--resume", type=Path, help="folder of files to go on from")
    options = parser.parse_args(argv)
    x, y = images(options.data)
    model = mlp([x.shape[1], options.width, options.width, 10], options.seed)
    loss = train(model, x, y, options.steps)
    layers, report = lq.split(model), {"training_loss": loss}
    if options.resume is not None:
        options.resume.mkdir(parents=True, exist_ok=True)

    def file(name: str) -> Path | None:
        return None if options.resume is None else options.resume / f"{name}.pt"

    def problem(metric: str, damping: float) -> lq.LQRProblem | lq.StreamedProblem:
        asked = {"loss": "cross_entropy", "metric": metric, "damping": damping}
        if options.stream:
            chunks = lq.StreamedProblem.chunks(x, y, options.samples)
            return lq.StreamedProblem(layers, chunks, **asked)
        rows = slice(0, options.samples)
        return lq.LQRProblem.from_network(layers, x[rows], y[rows], **asked)

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6))
    for metric, name, color in (
        ("newton", "Hessian", "C0"),
        ("gauss_newton", "Gauss-Newton", "C3"),
    ):
        H = problem(metric, 0.0)
        top = lq.probe.eigenvalues(
            H, options.top, seed=options.seed, progress=True, checkpoint=file(f"{metric}_top")
        )
        bottom = lq.probe.eigenvalues(H, 3, which="smallest", rtol=1e-3, seed=options.seed)
        density = lq.probe.spectral_density(
            H,
            vectors=options.vectors,
            steps=options.lanczos,
            seed=options.seed,
            columns=options.vectors,
            progress=True,
            checkpoint=file(f"{metric}_density"),
        )
        share = lq.probe.gradient_alignment(H.gradient, top)
        print(f"\n{name}, {H.size:,} weights\n{top}\n\nsmallest\n{bottom}\n\n{share}")
        band = density.density(normalize=True)
        left.plot(band.grid, band.mean, color=color, label=name)
        left.fill_between(band.grid, band.lower, band.upper, color=color, alpha=0.25, lw=0)
        left.plot(top.values, [3e-6] * len(top.values), "|", color=color, ms=12)
        report[metric] = {
            "largest": top.to_dict(),
            "smallest": bottom.to_dict(),
            "density": density.to_dict(),
            "alignment": share.to_dict(),
        }
    bare = problem("gauss_newton", 0.0)
    print(f"\ntrace of the Gauss-Newton matrix, at most {options.products} products each")
    traces = {
        method: lq.probe.trace(bare, method=method, products=options.products, seed=options.seed)
        for method in TRACES
    }
    for method, found in traces.items():
        print(f"  {method:12} {found}")
    damped = problem("gauss_newton", options.damping)
    others = {
        "log-determinant": lq.probe.logdet(
            damped, vectors=options.vectors, lower=options.damping, seed=options.seed
        ),
        "effective dimension": lq.probe.effective_dimension(
            bare, options.damping, vectors=options.vectors, seed=options.seed
        ),
        "Frobenius norm": lq.probe.frobenius_norm(
            bare, products=options.products, seed=options.seed
        ),
    }
    for name, found in others.items():
        print(f"  {name:20} {found}")
    report["estimates"] = {name: e.to_dict() for name, e in {**traces, **others}.items()}

    left.set(
        yscale="log",
        ylim=(1e-6, None),
        xlabel="eigenvalue",
        ylabel="share of eigenvalues per unit",
        title="density with 95 % bands; ticks are the largest eigenvalues",
    )
    left.legend(frameon=False)
    places = range(len(TRACES))
    right.errorbar(
        [float(traces[m]) for m in TRACES],
        places,
        xerr=[2 * float(traces[m].standard_error) for m in TRACES],
        fmt="o",
        capsize=4,
    )
    right.set_yticks(places, TRACES)
    right.set_ylim(-0.5, len(TRACES) - 0.5)
    right.set(
        xlabel="trace of the Gauss-Newton matrix",
        title=f"four estimators, {options.products} products each, two standard errors",
    )
    for ax in (left, right):
        ax.grid(alpha=0.3)
    figure.tight_layout()
    return keep(options.output, "probe_spectrum", report, figure)


if __name__ == "__main__":
    main()
