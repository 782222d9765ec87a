"""Every mean of a stream divides by what it divides by in one large batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import dense_gradient, dense_jacobian
from small_models import F64, mlp, normal
from torch import Tensor, nn
from torch.nn import functional as F

import llqr_mf as lq
from llqr_mf.losses import BCEWithLogits, CallableLoss, CrossEntropy
from llqr_mf.metrics import Divergence, Fisher, Newton, StateCosts

# A dozen sums of float64 numbers of one size, in another order.
CLOSE = {"rtol": 1e-11, "atol": 1e-13}
N, IGNORED = 11, [0, 1, 2, 3, 7]
X = normal(N, 4, seed=1)
LABELS = torch.arange(N) % 3
SOME = LABELS.clone()
SOME[IGNORED] = -100
WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=F64)
REAL = normal(N, 3, seed=2)


def log_cosh(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).cosh().log().mean()


LOSSES: dict[str, tuple[Any, Tensor]] = {
    "classes": ("cross_entropy", LABELS),
    "ignored": ("cross_entropy", SOME),
    "weighted": (CrossEntropy(weight=WEIGHT), LABELS),
    "both": (CrossEntropy(weight=WEIGHT, label_smoothing=0.1), SOME),
    "probabilities": (CrossEntropy(weight=WEIGHT), REAL.softmax(1)),
    "logits": (BCEWithLogits(weight=WEIGHT, pos_weight=2 * WEIGHT), REAL.sigmoid()),
    "squares": ("mse", REAL),
    "function": (log_cosh, REAL),
}
COSTS = {"0": 0.3, 1: 0.2}
METRICS: dict[str, Any] = {
    **{name: name for name in ("gauss_newton", "newton", "fisher", "empirical_fisher")},
    "squared_error": "squared_error",
    "divergence": Divergence(lambda a, b: (a - b).square().sum(1).mean()),
    "costs": StateCosts(COSTS),
    "costs and newton": StateCosts(COSTS, base=Newton()),
    "costs and gradients": StateCosts(COSTS, base=Fisher("empirical")),
}
# The first of three holds ignored targets alone, and the second a single one that is not.
CUTS = [3, 2, 6]


def pair(
    loss: Any, y: Tensor, metric: Any, sizes: list[int], x: Tensor = X
) -> tuple[lq.LQRProblem, lq.StreamedProblem]:
    layers = lq.split(mlp(4, 5, 3))
    options = {"loss": loss, "metric": metric, "damping": 0.1}
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    return (
        lq.LQRProblem.from_network(layers, x, y, **options),
        lq.StreamedProblem(layers, parts, **options),
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_and_metric_is_that_of_the_whole_batch(loss: str, metric: str) -> None:
    spec, y = LOSSES[loss]
    if loss == "function" and metric == "fisher":
        pytest.skip("a function has no distribution")
    whole, streamed = pair(spec, y, METRICS[metric], CUTS)
    v = normal(whole.size, 2, seed=3)
    torch.testing.assert_close(streamed.gradient, whole.gradient, **CLOSE)
    torch.testing.assert_close(streamed.hessian @ v, whole.hessian @ v, **CLOSE)
    weights = [i for i, name in enumerate(whole.names) if name.endswith("weight")]
    block = (problem.curvature_block(weights, weights) for problem in (streamed, whole))
    w = v[: sum(whole.layout.sizes[i] for i in weights)]
    torch.testing.assert_close(*(b @ w for b in block), **CLOSE)
    assert streamed.loss_value == pytest.approx(float(whole.origin.loss_value), rel=1e-12)


def lengths(targets: Callable[[int], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Sequences of three lengths."""
    return [
        (normal(n, s, 4, seed=s), targets(n * s).reshape(n, s, -1))
        for n, s in ((4, 5), (3, 9), (2, 2))
    ]


@pytest.mark.parametrize("metric", ["gauss_newton", "fisher", "kl", "newton"])
@pytest.mark.parametrize("loss", ["mse", "bce_with_logits"])
def test_sequences_of_unequal_length_weigh_by_their_elements(loss: str, metric: str) -> None:
    batches = lengths(lambda n: normal(n, 3, seed=n).sigmoid())
    # Every position goes through the network alone: all of them are one batch.
    x = torch.cat([x.flatten(0, 1) for x, _ in batches])
    y = torch.cat([y.flatten(0, 1) for _, y in batches])
    layers = lq.split(mlp(4, 5, 3))
    options = {"loss": loss, "metric": metric, "damping": 0.1}
    streamed = lq.StreamedProblem(layers, batches, **options)
    whole = lq.LQRProblem.from_network(layers, x, y, **options)
    v = normal(whole.size, 2)
    torch.testing.assert_close(streamed.gradient, whole.gradient, **CLOSE)
    torch.testing.assert_close(streamed.hessian @ v, whole.hessian @ v, **CLOSE)
    assert streamed.loss_value == pytest.approx(float(whole.origin.loss_value), rel=1e-12)


def test_empirical_fisher_of_sequences_of_unequal_length() -> None:
    """Sum over samples of g g' / N with g the gradient of N times the sample's share."""
    batches = lengths(lambda n: normal(n, 3, seed=n))
    model = mlp(4, 5, 3)
    streamed = lq.StreamedProblem(
        lq.split(model), batches, loss="mse", metric="empirical_fisher", damping=0.0
    )
    n, elements = (sum(f(y) for _, y in batches) for f in (len, Tensor.numel))
    total = torch.zeros(streamed.size, streamed.size, dtype=F64)
    for x, y in batches:
        for one, t in zip(x.split(1), y.split(1), strict=True):
            g = dense_gradient(
                model, one, lambda o, t=t: n / elements * F.mse_loss(o, t, reduction="sum")
            )
            total += torch.outer(g, g) / n
    torch.testing.assert_close(streamed.hessian.to_dense(), total, **CLOSE)


def test_a_cost_on_a_layer_counts_the_samples_of_an_ignored_batch() -> None:
    y = LABELS.clone()
    y[3:7] = -100
    model = mlp(4, 5, 3)
    layers, parts = lq.split(model), list(zip(X.split([3, 4, 4]), y.split([3, 4, 4]), strict=True))
    streamed = lq.StreamedProblem(
        layers, parts, loss="cross_entropy", metric=StateCosts({"0": 0.3}), damping=0.0
    )
    inner = dense_jacobian(model[:1], X)
    without = lq.StreamedProblem(layers, parts, loss="cross_entropy", damping=0.0)
    added = (streamed.hessian.to_dense() - without.hessian.to_dense())[:25, :25]
    torch.testing.assert_close(added, 0.3 / N * inner.mT @ inner, **CLOSE)


def test_smoothed_targets_of_classes_without_weight_are_not_passed_over() -> None:
    weight = torch.tensor([0.0, 1.0, 2.0], dtype=X.dtype)
    y = torch.arange(len(X)) % 3
    y[:4] = 0
    loss = CrossEntropy(weight=weight, label_smoothing=0.1)
    # Torch's mean of the first batch divides by zero, and the whole one counts its smoothed share.
    with pytest.raises(ValueError, match="larger batches"):
        pair(loss, y, "newton", [4, len(X) - 4])
    whole, streamed = pair(loss, y, "newton", [5, len(X) - 5])
    torch.testing.assert_close(streamed.gradient, whole.gradient, **CLOSE)


def test_a_stream_without_any_target_is_refused() -> None:
    layers = lq.split(mlp(4, 5, 3))
    for loss, y in (
        ("cross_entropy", torch.full((N,), -100)),
        (CrossEntropy(weight=torch.tensor([0.0, 1.0, 1.0])), torch.zeros(N, dtype=torch.int64)),
    ):
        chunks = lq.StreamedProblem.chunks(X, y, 4)
        with pytest.raises(ValueError, match="no target counts in any of the batches"):
            lq.StreamedProblem(layers, chunks, loss=loss)


def test_a_posterior_passes_over_ignored_batches_and_lengths() -> None:
    y = LABELS.clone()
    y[:4] = -100
    whole, streamed = pair("cross_entropy", y, "gauss_newton", [4, 7])
    a, b = (
        lq.gaussian_process.Laplace(problem, prior_precision=0.5, method="cg", rtol=1e-12)
        for problem in (whole, streamed)
    )
    new = normal(3, 4, seed=9)
    assert a.scale == b.scale == N - 4
    # Two solves to 1e-12.
    torch.testing.assert_close(
        a.predict(new).covariance_matrix, b.predict(new).covariance_matrix, rtol=1e-9, atol=1e-10
    )
    assert b.sample(2).isfinite().all()


def test_noise_of_sequences_of_unequal_length() -> None:
    batches = lengths(lambda n: normal(n, 1, seed=n))
    model = mlp(4, 3, 1)
    streamed = lq.StreamedProblem(lq.split(model), batches, loss="mse", damping=1.0)
    laplace = lq.gaussian_process.Laplace(streamed, prior_precision=0.5, noise=0.3, rtol=1e-12)
    x = torch.cat([x.flatten(0, 1) for x, _ in batches])
    y = torch.cat([y.flatten(0, 1) for _, y in batches])
    J = dense_jacobian(model, x)
    precision = J.mT @ J / 0.3 + 0.5 * torch.eye(J.shape[1], dtype=F64)
    for length in (1, 5, 7):
        new = normal(2, length, 4, seed=length)
        made = laplace.predict(new).covariance_matrix
        K = dense_jacobian(model, new)
        torch.testing.assert_close(
            made, K @ torch.linalg.solve(precision, K.mT), rtol=1e-9, atol=1e-11
        )
    fit = torch.distributions.Normal(model(x).detach(), 0.3**0.5).log_prob(y).sum()
    assert float(laplace.likelihood.log_likelihood(0.3)) == pytest.approx(float(fit), rel=1e-12)
    assert "outputs=of every length" in repr(laplace)


# ---- functions


def summed(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum()


def masked(a: Tensor, b: Tensor) -> Tensor:
    kept = b[:, :1] > 0
    return ((a - b).square() * kept).sum() / kept.sum().clamp(min=1)


def centred(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) - (a - b).mean(0)).square().mean()


@pytest.mark.parametrize("loss", [summed, masked, centred])
def test_a_function_that_is_no_mean_over_samples_is_refused(loss: Any) -> None:
    layers = lq.split(mlp(4, 5, 3))
    for size in (4, 6):
        chunks = lq.StreamedProblem.chunks(X, REAL, size)
        with pytest.raises(ValueError, match=r"no mean over samples.*divisor"):
            lq.StreamedProblem(layers, chunks, loss=loss)
    # One batch is averaged with no other.
    whole = lq.LQRProblem.from_network(layers, X, REAL, loss=loss)
    one = lq.StreamedProblem(layers, [(X, REAL)], loss=loss)
    torch.testing.assert_close(one.gradient, whole.gradient, **CLOSE)


def test_a_mean_over_tokens_whose_halves_balance_is_no_mean_over_samples() -> None:
    """Two halves with six tokens each average to the whole; two parts of unequal size do not."""
    counts = torch.tensor([1, 1, 4, 2, 2, 2])
    kept = torch.arange(4) < counts.unsqueeze(1)
    real = torch.where(kept, normal(6, 4).abs() + 1, torch.zeros(6, 4).double())

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return ((a - b).square() * (b > 0)).sum() / (b > 0).sum()

    layers, x = lq.split(mlp(4, 5, 4)), normal(6, 4, seed=2)
    with pytest.raises(ValueError, match="no mean over samples"):
        lq.StreamedProblem(layers, [(x, real), (x, real)], loss=loss)


def test_a_divisor_makes_a_mean_of_it() -> None:
    loss = CallableLoss(masked, divisor=lambda a, b: (b[:, :1] > 0).sum())
    whole, streamed = pair(loss, REAL, "gauss_newton", [4, 1, 6])
    v = normal(whole.size, 2)
    torch.testing.assert_close(streamed.gradient, whole.gradient, **CLOSE)
    torch.testing.assert_close(streamed.hessian @ v, whole.hessian @ v, **CLOSE)
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="divisor of the loss is"):
            pair(CallableLoss(masked, divisor=lambda a, b, c=bad: c), REAL, "gauss_newton", [4, 7])


def test_a_loss_that_cannot_take_parts_of_a_batch_passes() -> None:
    """It is known for whole batches alone, so there is nothing to compare."""
    layers = lq.split(mlp(4, 5, 3))

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return (a.reshape(5, 3) - b).square().mean()

    chunks = lq.StreamedProblem.chunks(X[:10], REAL[:10], 5)
    streamed = lq.StreamedProblem(layers, chunks, loss=loss)
    whole = lq.LQRProblem.from_network(layers, X[:10], REAL[:10], loss="mse")
    torch.testing.assert_close(streamed.gradient, whole.gradient, **CLOSE)


# ---- draws


@pytest.mark.parametrize("costs", [False, True])
def test_monte_carlo_draws_are_the_batchs_own_in_every_pass(costs: bool) -> None:
    metric = Fisher("monte_carlo", seed=3)
    given = StateCosts(COSTS, base=metric) if costs else metric
    layers = lq.split(mlp(4, 5, 3))
    options = {"loss": "cross_entropy", "metric": given, "damping": 0.0}
    whole = lq.LQRProblem.from_network(layers, X, LABELS, **options)
    v = normal(whole.size, 2)
    alone = lq.StreamedProblem(layers, [(X, LABELS)], **options)
    torch.testing.assert_close(alone.hessian @ v, whole.hessian @ v, **CLOSE)
    twice = lq.StreamedProblem(layers, [(X, LABELS)] * 2, **options)
    product = twice.hessian @ v
    torch.testing.assert_close(twice.hessian @ v, product, rtol=0, atol=0)
    assert not torch.allclose(product, whole.hessian @ v, rtol=1e-3)


def test_variance_of_monte_carlo_falls_with_batches() -> None:
    loss, outputs = CrossEntropy(), normal(4, 3)
    labels = LABELS[:4]

    def spread(places: range) -> float:
        """Of the mean over batches of the same samples, by seed."""
        draws = torch.stack(
            [
                torch.stack(
                    [
                        Fisher("monte_carlo", seed=s)
                        .of_batch(i)
                        .terminal(loss, outputs, labels)
                        .to_dense()
                        for i in places
                    ]
                ).mean(0)
                for s in range(150)
            ]
        )
        return float(draws.var(0).sum())

    # A quarter; the ratio of two variances of 150 draws is known to about a sixth each.
    assert spread(range(4)) / spread(range(1)) == pytest.approx(0.25, rel=0.5)


def test_dropout_masks_are_the_batchs_own_in_every_pass() -> None:
    model = nn.Sequential(nn.Linear(4, 40), nn.Dropout(0.5), nn.Linear(40, 3)).double()
    layers = lq.split(model)
    options = {"loss": "cross_entropy", "damping": 0.0}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    once, twice = (lq.StreamedProblem(layers, [(X, LABELS)] * count, **options) for count in (1, 2))
    whole = lq.LQRProblem.from_network(layers, X, LABELS, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(once.gradient, whole.gradient, **CLOSE)
    assert not torch.allclose(twice.gradient, once.gradient, rtol=1e-3)
    v = normal(once.size)
    product = twice.hessian @ v
    torch.rand(3)
    torch.testing.assert_close(twice.hessian @ v, product, rtol=0, atol=0)
