"""What `auto` takes, beside the better of cg and dual: CPU seconds of one thread, interleaved.

The constants of the cost model were tuned on the first grid; the second was kept aside.

python benchmarks/auto_choice.py
python benchmarks/auto_choice.py --grids tuned --cases "mlp 64" "conv 8" --batches 16 256
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import environment, interleaved, spread, write
from torch import Tensor, nn
from tqdm import tqdm

import llqr_mf as lq

METHODS = ("auto", "cg", "dual")
ALLOWED = 1.5
"""Times the better of cg and dual that auto may take."""

LONGEST = 0.2
"""Seconds of a solve by CG above which every method is run once."""


class Opaque(nn.Module):
    """A network that is not looked into: it has no rule, and its flops are told by its graph."""

    def __init__(self, inner: nn.Module, axes: int) -> None:
        super().__init__()
        self.inner, self.axes = inner, axes

    def forward(self, x: Tensor) -> Tensor:
        """As the inner network."""
        if x.ndim != self.axes:
            raise ValueError("a batch, please")
        return self.inner(x)


class Physics(nn.Module):
    """Residuals of -u_xx - u_yy: derivatives of a network by its inputs."""

    def __init__(self, inner: nn.Module, way: str) -> None:
        super().__init__()
        self.inner, self.way = inner, way

    def forward(self, x: Tensor) -> Tensor:
        """Shape (N, 1)."""
        if self.way == "func":
            hessians = torch.func.vmap(torch.func.hessian(lambda p: self.inner(p)[0]))(x)
            return -hessians.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.inner(y).sum(), y, create_graph=True)
            bends = [
                torch.autograd.grad(slope[:, i].sum(), y, create_graph=True)[0][:, i]
                for i in range(x.shape[1])
            ]
        return -torch.stack(bends).sum(0).unsqueeze(1)


def mlp(*widths: int, between: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers with tanh, or what is given, between any two."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), between()]
    return nn.Sequential(*layers[:-1])


class Attention(nn.Module):
    """One block of a Transformer without norms, on sequences of vectors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into = nn.Linear(16, width)
        self.queries, self.keys = nn.Linear(width, width), nn.Linear(width, width)
        self.values, self.mixed = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (N, 10), from (N, T, 16)."""
        x = self.into(x)
        scores = self.queries(x) @ self.keys(x).mT / x.shape[-1] ** 0.5
        x = x + self.mixed(scores.softmax(-1) @ self.values(x))
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    """An LSTM and a layer on its last state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (N, 10), from (N, T, 16)."""
        return self.head(self.lstm(x)[0][:, -1])


def convnet(channels: int) -> nn.Sequential:
    """Three convolutions, pooled."""
    layers: list[nn.Module] = []
    for before in (3, channels, channels):
        layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)
    return nn.Sequential(*layers, *head)


def labelled(samples: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Random inputs and classes."""
    return torch.randn(samples, *shape), torch.randint(0, 10, (samples,))


def digits(samples: int) -> tuple[Tensor, Tensor]:
    """Of sklearn."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (
        torch.tensor(data.data[:samples] / 16).float(),
        torch.tensor(data.target[:samples]),
    )


Made = Callable[[int], tuple[nn.Module, Tensor, Tensor, str]]
"""From a batch size: model, inputs, targets, loss."""


def cases() -> dict[str, Made]:
    """Those that the cost model's constants were fitted to, by name."""
    made: dict[str, Any] = {}
    for w in (64, 128, 256, 512, 1024):
        made[f"mlp {w}"] = lambda n, w=w: (mlp(32, w, w, w, 10), *labelled(n, 32), "cross_entropy")
    for w in (64, 256):
        made[f"opaque mlp {w}"] = lambda n, w=w: (
            *(Opaque(mlp(32, w, w, w, 10), 2), *labelled(n, 32), "cross_entropy"),
        )
    for w in (64, 512):
        made[f"regression {w}"] = lambda n, w=w: (
            *(mlp(16, w, w, 1), torch.randn(n, 16), torch.randn(n, 1), "mse"),
        )
    for c in (8, 16):
        made[f"conv {c}"] = lambda n, c=c: (convnet(c), *labelled(n, 3, 16, 16), "cross_entropy")
    made["opaque conv 16"] = lambda n: (
        *(Opaque(convnet(16), 4), *labelled(n, 3, 16, 16), "cross_entropy"),
    )
    made["digits"] = lambda n: (mlp(64, 512, 512, 10), *digits(n), "cross_entropy")
    for way in ("func", "nested"):
        made[f"pinn {way}"] = lambda n, way=way: (
            Physics(mlp(2, 64, 64, 1), way).double(),
            *(torch.rand(n, 2).double(), torch.randn(n, 1).double(), "mse"),
        )
    return made


def held_out() -> dict[str, Made]:
    """Those that nothing was fitted to."""
    made: dict[str, Any] = {}
    for w, between in itertools.product((96, 384, 768), (nn.ReLU, nn.Tanh)):
        made[f"{between.__name__} {w}"] = lambda n, w=w, between=between: (
            *(mlp(24, w, w, 10, between=between), *labelled(n, 24), "cross_entropy"),
        )
    made["conv 12"] = lambda n: (convnet(12), *labelled(n, 3, 12, 12), "cross_entropy")
    made["transformer 64"] = lambda n: (Attention(64), *labelled(n, 8, 16), "cross_entropy")
    made["lstm 48"] = lambda n: (Recurrent(48), *labelled(n, 8, 16), "cross_entropy")
    for way in ("func", "nested"):
        made[f"pinn 96 {way}"] = lambda n, way=way: (
            Physics(mlp(2, 96, 96, 1), way).double(),
            *(torch.rand(n, 2).double(), torch.randn(n, 1).double(), "mse"),
        )
    return made


GRIDS: dict[str, tuple[Callable[[], dict[str, Made]], list[int], list[float]]] = {
    "tuned": (cases, [16, 128], [1e-4]),
    "held out": (held_out, [24, 96, 384], [1e-3, 1e-6]),
}
"""Cases, batch sizes and tolerances."""

UP_TO = {"ReLU 768": 96, "Tanh 768": 96, "transformer 64": 96, "lstm 48": 96}
"""Largest batches of those that would take many minutes."""


def measure(
    made: Made, name: str, samples: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for every damping and tolerance."""
    torch.manual_seed(0)
    model, x, y, loss = made(samples)
    layers = lq.split(model)
    rows = []
    for damping, rtol in itertools.product(options.dampings, options.rtols):
        problem = lq.LQRProblem.from_network(layers, x, y, loss=loss, damping=damping, check=False)
        found: dict[str, lq.Solution] = {}
        functions = {m: partial(lq.solve, problem, m, rtol=rtol) for m in METHODS}
        start = time.process_time()
        found["cg"] = functions["cg"]()
        once = time.process_time() - start > options.longest
        seconds = interleaved(
            functions,
            repeats=options.repeats,
            warm_up=0 if once else 1,
            limits=dict.fromkeys(METHODS, 1) if once else None,
            after=found.__setitem__,
            clock=time.process_time,
        )
        median = {method: statistics.median(each) for method, each in seconds.items()}
        solved = [m for m in ("cg", "dual") if found[m].status.ok] or ["cg", "dual"]
        best = min(solved, key=lambda m: median[m])
        row = {
            "case": name,
            "batch": samples,
            "weights": problem.size,
            "damping": damping,
            "rtol": rtol,
            **{f"{method} seconds": median[method] for method in METHODS},
            **{f"{method} spread": spread(seconds[method]) for method in METHODS},
            **{f"{method} status": found[method].status.code.value for method in METHODS},
            "cg iterations": found["cg"].iterations,
            "auto iterations": found["auto"].iterations,
            "auto ended with": found["auto"].method,
            "repeats": len(seconds["auto"]),
            "better": best,
            "times the better": median["auto"] / median[best],
        }
        rows.append(row)
        tqdm.write(
            f"{name}, N {samples}, damping {damping:g}, rtol {rtol:g}: auto "
            f"{1e3 * median['auto']:.1f} ms ({found['auto'].method}, {found['auto'].iterations}), "
            f"cg {1e3 * median['cg']:.1f} ({found['cg'].iterations}, "
            f"{found['cg'].status.code.value}), dual {1e3 * median['dual']:.1f} "
            f"({found['dual'].status.code.value}): {row['times the better']:.2f}"
        )
    return rows


def told(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Quantiles of the times the better, and the rows above what is allowed."""
    times = sorted(row["times the better"] for row in rows)
    worst = [row for row in rows if row["times the better"] > ALLOWED]
    worst.sort(key=lambda row: -float(row["times the better"]))
    return {
        "rows": len(rows),
        "share within the allowed": 1 - len(worst) / len(rows),
        **{f"quantile {q}": times[round(q * (len(times) - 1))] for q in (0.5, 0.9, 0.95, 1.0)},
        "above the allowed": [
            f"{row['case']}, N {row['batch']}, damping {row['damping']:g}, rtol {row['rtol']:g}: "
            f"{row['times the better']:.2f}"
            for row in worst
        ],
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures every case and writes the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grids", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--cases", nargs="+", default=None)
    parser.add_argument("--batches", type=int, nargs="+", default=None)
    parser.add_argument("--dampings", type=float, nargs="+", default=[1e-1, 1e-3, 1e-5])
    parser.add_argument("--rtols", type=float, nargs="+", default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--longest", type=float, default=LONGEST)
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    default = Path(__file__).parent / "results" / "auto_choice_cpu.json"
    report: dict[str, Any] = {"benchmark": "auto_choice", **environment("cpu"), "rows": []}
    report["seconds are"] = "of the process, on one thread"
    for grid in given.grids:
        made, batches, rtols = GRIDS[grid]
        options = argparse.Namespace(**vars(given))
        options.rtols = given.rtols or rtols
        names = [name for name in made() if given.cases is None or name in given.cases]
        every = itertools.product(names, given.batches or batches)
        for name, samples in tqdm([(m, n) for m, n in every if n <= UP_TO.get(m, n)]):
            rows = measure(made()[name], name, samples, options)
            report["rows"] += [{"grid": grid, **row} for row in rows]
            report[grid] = told([row for row in report["rows"] if row["grid"] == grid])
            write(given.output or default, report, quiet=True)
    print({grid: report.get(grid) for grid in given.grids})
    return report


if __name__ == "__main__":
    main()
