"""Error bars for a wide network: the exact Laplace posterior, and how well it is calibrated.

1. Regression: the log price of diamonds by a wide network. The marginal likelihood chooses prior
   precision and noise, and held-out rows say how good the error bars are. The prior is centred at
   the initial weights, from which a wide network moves little; beside it stands the usual prior
   centred at zero, which takes the size of the random initial weights for what the data need.
2. Classification: scikit-learn's digits, the class probabilities of the trained network beside
   those of its posterior. A network that fits its few images leaves the softmax no curvature, and
   the posterior with the prior of the largest evidence is far too wide; a prior precision chosen
   on held-out images is there as well.

No per-sample Jacobian is formed: the posterior works with one Gram matrix of the training data.

Run `python examples/laplace_wide_regression.py --data diamonds.csv --output output`. The data are
in the wheel of plotnine (`pip download --no-deps plotnine`), which `--data` takes as well; without
it, and without plotnine, the regression is on scikit-learn's diabetes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from diamonds import diamonds, shuffled
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import llqr_mf as lq
from llqr_mf.gaussian_process import Laplace, PriorChoice, choose_prior

LEVELS = (0.5, 0.9, 0.95)
BLUE, ORANGE, GREY, GREEN, VIOLET = "#2a6fbb", "#d9722e", "#777777", "#3a8f5c", "#8a5fb0"
COLOURS = (GREY, ORANGE, BLUE, GREEN)


# ---- networks


def network(inputs: int, width: int, depth: int, outputs: int) -> nn.Sequential:
    """`depth` hidden layers of one width."""
    layers: list[nn.Module] = []
    for a, b in pairwise([inputs, *[width] * depth]):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def weights(model: nn.Module) -> Tensor:
    """A flat float64 copy."""
    return nn.utils.parameters_to_vector(model.parameters()).detach().double()


def train(model: nn.Module, x: Tensor, y: Tensor, loss: Any, epochs: int, lr: float) -> float:
    """AdamW in float32 with a cosine schedule; seconds."""
    start = time.perf_counter()
    x, y = x.float(), y.float() if y.is_floating_point() else y
    batch = max(16, min(128, len(x) // 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    steps = epochs * math.ceil(len(x) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    for _ in tqdm(range(epochs), "training", leave=False):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad()
            loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return time.perf_counter() - start


# ---- regression


def regression(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains, chooses the prior, predicts; the numbers, and what the picture is made of."""
    torch.manual_seed(0)
    name, x, y = diamonds(options.data)
    x, y, test_x, test_y = shuffled(x, y, options.rows, options.test_rows)
    middle, spread = y.mean(), y.std()
    y, test_y = ((t - middle).unsqueeze(1) / spread for t in (y, test_y))
    model = network(x.shape[1], options.width, options.depth, 1)
    initial, rate = weights(model), 1e-3 * (512 / options.width) ** 0.5
    trained = train(model, x, y, nn.functional.mse_loss, options.epochs, rate)
    # The posterior is a difference of nearly equal matrices: float64.
    model = model.double()
    start = time.perf_counter()
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="mse")
    # Any prior and noise will do until they are chosen.
    laplace = Laplace(problem, prior_precision=1.0, noise=1.0, method="dual")
    gram_seconds = time.perf_counter() - start
    start = time.perf_counter()
    choice = choose_prior(laplace, prior_mean=initial)
    prior_seconds = time.perf_counter() - start
    print(f"\n{name}: {problem.size:,} weights, {len(x)} rows; {choice}")
    start = time.perf_counter()
    assert choice.noise is not None
    predicted = laplace.with_prior(choice.prior_precision, choice.noise).predict(test_x)
    mean, of_weights = predicted.mean.detach(), predicted.variance
    predict_seconds = time.perf_counter() - start
    error = test_y[:, 0] - mean
    at_zero = choose_prior(laplace)
    assert at_zero.noise is not None
    wider = laplace.with_prior(at_zero.prior_precision, at_zero.noise).predict(test_x).variance
    residual = laplace.likelihood.loss_value
    variances = {
        "trained, training error": torch.full_like(error, residual),
        "trained, chosen noise": torch.full_like(error, choice.noise),
        "Laplace": of_weights + choice.noise,
        "Laplace, prior at zero": wider + at_zero.noise,
    }
    rows = [gaussian_scores(name, error, v, float(spread)) for name, v in variances.items()]
    table(rows, ("name", "NLL", "RMSE", *(f"in {level:.0%}" for level in LEVELS)))
    correlation = torch.corrcoef(torch.stack([of_weights.log(), error.square().log()]))[0, 1]
    report = {
        "data": name,
        "weights": problem.size,
        "rows": len(x),
        "test rows": len(test_x),
        "training error": residual,
        "prior precision": choice.prior_precision,
        "noise variance": choice.noise,
        "log evidence": choice.log_evidence,
        "log evidence, prior at zero": at_zero.log_evidence,
        "effective parameters": choice.effective_parameters,
        "correlation of log variance and log squared error": float(correlation),
        "seconds": {
            "training": trained,
            "Gram matrix and Cholesky": gram_seconds,
            "eigenvalues and prior": prior_seconds,
            "predictions": predict_seconds,
        },
        "scores": rows,
    }
    drawn = {"choice": choice, "error": error, "variances": variances, "of_weights": of_weights}
    return report, drawn


def gaussian_scores(name: str, error: Tensor, variance: Tensor, spread: float) -> dict[str, Any]:
    """Scores in the units of the log target: mean negative log-likelihood, error, coverage."""
    z = error / variance.sqrt()
    nll = 0.5 * (math.log(2 * math.pi) + variance.log() + z.square()).mean() + math.log(spread)
    row = {"name": name, "NLL": float(nll), "RMSE": spread * float(error.square().mean().sqrt())}
    for level in LEVELS:
        half = math.sqrt(2) * float(torch.erfinv(torch.tensor(level)))
        row[f"in {level:.0%}"] = float((z.abs() <= half).double().mean())
    return row


# ---- classification


def classification(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Digits: the trained network's probabilities beside those of its posterior."""
    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.from_numpy(data.data) / 16, torch.from_numpy(data.target).long()
    test_rows = min(options.test_rows, 600)
    held = min(200, options.digit_rows // 2)
    x, y, test_x, test_y = shuffled(x - x.mean(0), y, options.digit_rows, test_rows + held)
    held_x, held_y, test_x, test_y = test_x[:held], test_y[:held], test_x[held:], test_y[held:]
    model = network(64, options.digit_width, options.depth, 10)
    initial, rate = weights(model), 1e-3 * (512 / options.digit_width) ** 0.5
    trained = train(model, x, y, nn.functional.cross_entropy, options.epochs, rate)
    model = model.double()
    start = time.perf_counter()
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy")
    laplace = Laplace(problem, prior_precision=1.0, method="dual")
    choice = choose_prior(laplace, prior_mean=initial)
    seconds = time.perf_counter() - start
    print(f"\ndigits: {problem.size:,} weights, {len(x)} images; {choice}")
    at_zero = choose_prior(laplace)
    wider = laplace.with_prior(at_zero.prior_precision)
    laplace = laplace.with_prior(choice.prior_precision)
    start = time.perf_counter()
    with torch.no_grad():
        of = {"trained": torch.softmax(model(test_x), -1)}
    of["Laplace, Monte-Carlo"] = laplace.probabilities(test_x, samples=2000, seed=0)
    of["Laplace, probit"] = laplace.probabilities(test_x, method="probit")
    predict_seconds = time.perf_counter() - start
    # Where evidence at one set of weights misleads, a few held-out images choose better.
    stronger = [choice.prior_precision * 10.0**i for i in range(6)]
    scores = []
    for delta in stronger:
        p = laplace.with_prior(delta).probabilities(held_x, method="probit")
        scores.append(float(nn.functional.nll_loss(p.log(), held_y)))
    chosen = stronger[scores.index(min(scores))]
    by_held = laplace.with_prior(chosen)
    of["Laplace, prior by held-out"] = by_held.probabilities(test_x, samples=2000, seed=0)
    of["Laplace, prior at zero"] = wider.probabilities(test_x, samples=2000, seed=0)
    rows = [class_scores(name, p, test_y) for name, p in of.items()]
    table(rows, ("name", "NLL", "ECE", "accuracy", "mean confidence"))
    report = {
        "weights": problem.size,
        "rows": len(x),
        "test rows": len(test_x),
        "prior precision": choice.prior_precision,
        "prior precision, by held-out": chosen,
        "log evidence": choice.log_evidence,
        "log evidence, prior at zero": at_zero.log_evidence,
        "effective parameters": choice.effective_parameters,
        "seconds": {
            "training": trained,
            "posterior and prior": seconds,
            "predictions": predict_seconds,
        },
        "scores": rows,
    }
    return report, {"choice": choice, "probabilities": of, "labels": test_y}


def class_scores(name: str, p: Tensor, labels: Tensor) -> dict[str, Any]:
    """Negative log-likelihood, expected calibration error (15 bins) and accuracy."""
    confidence, guess = p.max(-1)
    right = (guess == labels).double()
    ece = sum(
        float(here.double().mean()) * abs(float(right[here].mean() - confidence[here].mean()))
        for here in bins(confidence, 15)
    )
    return {
        "name": name,
        "NLL": -float(p[torch.arange(len(p)), labels].log().mean()),
        "ECE": ece,
        "accuracy": float(right.mean()),
        "mean confidence": float(confidence.mean()),
    }


def bins(confidence: Tensor, count: int) -> list[Tensor]:
    """Masks of the bins that hold anything."""
    place = (confidence * count).long().clamp(max=count - 1)
    return [place == i for i in range(count) if bool((place == i).any())]


# ---- output


def table(rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    """Prints rows."""
    first, *others = columns
    print(f"{'':26}" + "".join(f"{c:>17}" for c in others))
    for row in rows:
        print(f"{row[first]:26}" + "".join(f"{row[c]:17.4f}" for c in others))


def draw(path: Path, prices: dict[str, Any], digits: dict[str, Any]) -> None:
    """Six panels."""
    figure, axes = plt.subplots(2, 3, figsize=(13.5, 8), layout="constrained")
    evidence_panel(axes[0, 0], prices["choice"], "Regression: evidence by prior precision")
    colours = {"trained, training error": GREY, "Laplace": BLUE}
    panel = axes[0, 1]
    for name, colour in colours.items():
        z = prices["error"] / prices["variances"][name].sqrt()
        u = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        panel.hist(
            u.numpy(), 20, range=(0, 1), density=True, histtype="step", color=colour, label=name
        )
    panel.axhline(1, color="black", linewidth=0.8, linestyle=":")
    panel.set(
        title="Probability integral transform, held-out rows",
        xlabel="predicted CDF at the true value",
        ylabel="density (flat is calibrated)",
    )
    panel.legend(frameon=False)
    panel = axes[0, 2]
    order = prices["of_weights"].argsort()
    groups = torch.tensor_split(order, 10)
    std = prices["variances"]["Laplace"].sqrt()
    xs = [float(std[g].square().mean().sqrt()) for g in groups]
    ys = [float(prices["error"][g].square().mean().sqrt()) for g in groups]
    panel.scatter(std.numpy(), prices["error"].abs().numpy(), s=4, color=GREY, alpha=0.3)
    panel.plot(xs, ys, "o-", color=BLUE, label="root mean square in deciles")
    ends = [float(std.min()), float(std.max())]
    panel.plot(ends, ends, ":", color="black", label="calibrated")
    panel.set(
        title="Error beside predicted deviation",
        xlabel="predicted standard deviation",
        ylabel="absolute error",
        xscale="log",
        yscale="log",
    )
    panel.set_ylim(bottom=float(prices["error"].abs().median()) / 100)
    panel.legend(frameon=False)
    coverage_panel(axes[1, 0], prices)
    evidence_panel(axes[1, 1], digits["choice"], "Digits: evidence by prior precision")
    reliability_panel(axes[1, 2], digits)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def evidence_panel(panel: Any, choice: PriorChoice, title: str) -> None:
    """Log evidence; the lowest part is cut off."""
    panel.plot(choice.prior_precisions, choice.curve, color=BLUE)
    panel.axvline(choice.prior_precision, color=ORANGE, label=f"{choice.prior_precision:.3g}")
    top, median = choice.log_evidence, float(choice.curve.median())
    panel.set_ylim(min(median, top - 10), top + 0.1 * max(top - median, 10))
    panel.set(title=title, xlabel="prior precision", ylabel="log evidence", xscale="log")
    panel.legend(frameon=False)


def coverage_panel(panel: Any, prices: dict[str, Any]) -> None:
    """Share of held-out rows inside central intervals."""
    levels = torch.linspace(0.02, 0.99, 60, dtype=torch.float64)
    half = math.sqrt(2) * torch.erfinv(levels)
    for name, colour in zip(prices["variances"], COLOURS, strict=True):
        z = (prices["error"] / prices["variances"][name].sqrt()).abs()
        panel.plot(levels, (z <= half[:, None]).double().mean(1), color=colour, label=name)
    panel.plot([0, 1], [0, 1], ":", color="black")
    panel.set(
        title="Coverage of central intervals, held-out rows",
        xlabel="nominal",
        ylabel="observed share",
    )
    panel.legend(frameon=False)


def reliability_panel(panel: Any, digits: dict[str, Any]) -> None:
    """Accuracy by confidence."""
    for (name, p), colour in zip(digits["probabilities"].items(), (*COLOURS, VIOLET), strict=True):
        confidence, guess = p.max(-1)
        right = (guess == digits["labels"]).double()
        held = [here for here in bins(confidence, 10) if int(here.sum()) >= 5]
        xs = [float(confidence[here].mean()) for here in held]
        ys = [float(right[here].mean()) for here in held]
        panel.plot(xs, ys, "o-", color=colour, label=name)
    panel.plot([0, 1], [0, 1], ":", color="black")
    panel.set(
        title="Digits: reliability, bins of 5 images or more",
        xlabel="confidence",
        ylabel="accuracy",
    )
    panel.legend(frameon=False)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Both parts; prints tables and writes the picture and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, help="diamonds.csv, or the wheel of plotnine")
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--rows", type=int, default=4096, help="to train the regression on")
    parser.add_argument("--test-rows", type=int, default=2000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--digit-rows", type=int, default=500)
    parser.add_argument("--digit-width", type=int, default=2048)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    prices, drawn_prices = regression(options)
    digits, drawn_digits = classification(options)
    report = {"regression": prices, "classification": digits}
    draw(options.output / "laplace_wide_regression.png", drawn_prices, drawn_digits)
    path = options.output / "laplace_wide_regression.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwrote {path} and the picture beside it")
    return report


if __name__ == "__main__":
    main()
