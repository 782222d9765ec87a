"""Losses of log-probabilities are cross-entropies of the logits, curvature and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import dense_gradient, dense_hessian_columns, dense_jacobian
from small_models import F64, mlp, normal
from torch import Tensor, nn
from torch.nn import functional as F

import llqr_mf as lq
from llqr_mf.losses import KLDivergence, NegativeLogLikelihood, get_loss

# Sums of a dozen float64 numbers of one size.
CLOSE = {"rtol": 1e-11, "atol": 1e-13}
X, LABELS = normal(7, 4, seed=1), torch.tensor([0, 2, 1, 1, 0, 2, 1])
SOME = torch.tensor([0, -100, 1, 1, -100, 2, 1])
WEIGHT = torch.tensor([0.3, 1.0, 2.0], dtype=F64)
SOFT = normal(7, 3, seed=2).softmax(1)

# A loss of log-probabilities, one of logits with the same value but for a constant, and targets.
PAIRS: dict[str, tuple[Any, Any, Tensor]] = {
    "module": (nn.NLLLoss(), nn.CrossEntropyLoss(), LABELS),
    "function": (F.nll_loss, F.cross_entropy, LABELS),
    "weighted": (nn.NLLLoss(weight=WEIGHT), nn.CrossEntropyLoss(weight=WEIGHT), LABELS),
    "ignored": (nn.NLLLoss(), nn.CrossEntropyLoss(), SOME),
    "another index": (
        nn.NLLLoss(ignore_index=1, weight=WEIGHT),
        nn.CrossEntropyLoss(ignore_index=1, weight=WEIGHT),
        LABELS,
    ),
    "kl": (nn.KLDivLoss(reduction="batchmean"), nn.CrossEntropyLoss(), SOFT),
    "logarithms": (
        nn.KLDivLoss(reduction="batchmean", log_target=True),
        lambda o, t: F.cross_entropy(o, t.exp()),
        SOFT.log(),
    ),
    "by elements": (
        nn.KLDivLoss(reduction="mean"),
        lambda o, t: F.cross_entropy(o, t) / 3,
        SOFT,
    ),
}


def heads() -> tuple[nn.Sequential, nn.Sequential]:
    logits = mlp(4, 5, 3)
    return nn.Sequential(*logits, nn.LogSoftmax(1)), logits


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
@pytest.mark.parametrize("name", PAIRS)
def test_problems_are_those_of_the_logits(name: str, metric: str) -> None:
    loss, of_logits, y = PAIRS[name]
    model, logits = heads()
    made = lq.LQRProblem.from_network(lq.split(model), X, y, loss=loss, metric=metric, damping=0.0)
    value = loss(model(X), y)
    assert float(made.origin.loss_value) == pytest.approx(float(value.detach()), rel=1e-12)
    gradient = dense_gradient(model, X, lambda o: loss(o, y))
    torch.testing.assert_close(made.gradient, gradient, **CLOSE)
    eye = torch.eye(made.size, dtype=F64)
    if metric == "newton":
        expected = dense_hessian_columns(model, X, lambda o: loss(o, y), eye)
    else:
        J = dense_jacobian(logits, X)
        z = logits(X).detach()
        Q = torch.func.hessian(lambda v: of_logits(v.reshape(z.shape), y))(z.flatten())
        expected = J.mT @ Q @ J
    torch.testing.assert_close(made.hessian.to_dense(), expected, **CLOSE)


@pytest.mark.parametrize("metric", ["fisher", "empirical_fisher"])
def test_fisher_matrices_are_those_of_the_logits(metric: str) -> None:
    model, logits = heads()
    options = {"metric": metric, "damping": 0.0}
    made = lq.LQRProblem.from_network(lq.split(model), X, SOME, loss=nn.NLLLoss(), **options)
    same = lq.LQRProblem.from_network(lq.split(logits), X, SOME, loss="cross_entropy", **options)
    torch.testing.assert_close(made.hessian.to_dense(), same.hessian.to_dense(), **CLOSE)


def test_classes_of_positions_lie_on_axis_one() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.LogSoftmax(1)).double()
    x, y = normal(4, 2, 5), torch.arange(20).reshape(4, 5) % 3
    made = lq.LQRProblem.from_network(lq.split(model), x, y, loss=nn.NLLLoss(), damping=0.0)
    same = lq.LQRProblem.from_network(
        lq.split(model[0]), x, y, loss=nn.CrossEntropyLoss(), damping=0.0
    )
    torch.testing.assert_close(made.hessian.to_dense(), same.hessian.to_dense(), **CLOSE)


def test_streams_divide_by_what_the_mean_divides_by() -> None:
    model, _ = heads()
    layers = lq.split(model)
    for loss, y in ((nn.NLLLoss(weight=WEIGHT), SOME), (nn.KLDivLoss(reduction="batchmean"), SOFT)):
        whole = lq.LQRProblem.from_network(layers, X, y, loss=loss)
        streamed = lq.StreamedProblem(layers, lq.StreamedProblem.chunks(X, y, 2), loss=loss)
        v = normal(whole.size)
        torch.testing.assert_close(streamed.gradient, whole.gradient, **CLOSE)
        torch.testing.assert_close(streamed.hessian @ v, whole.hessian @ v, **CLOSE)


def test_a_posterior_is_that_of_the_logits() -> None:
    model, logits = heads()
    for y, loss in ((LABELS, nn.NLLLoss()), (SOFT, PAIRS["kl"][0])):
        problem = lq.LQRProblem.from_network(lq.split(model), X, y, loss=loss)
        same = lq.LQRProblem.from_network(lq.split(logits), X, y, loss="cross_entropy")
        a, b = (lq.gaussian_process.Laplace(p, prior_precision=1.0) for p in (problem, same))
        assert a.scale == pytest.approx(b.scale, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_large_logits_pass_and_unnormalised_outputs_do_not(dtype: torch.dtype) -> None:
    logits = (100 * normal(7, 3)).to(dtype)
    loss, kl = NegativeLogLikelihood(class_dim=1), KLDivergence()
    loss.check(logits.log_softmax(1), LABELS)
    kl.check(logits.log_softmax(1), SOFT)
    for outputs in (logits, logits.softmax(1), logits.log_softmax(1) + 0.3):
        with pytest.raises(ValueError, match=r"no log-probabilities, as NLLLoss.*LogSoftmax\(1\)"):
            loss.check(outputs, LABELS)
        with pytest.raises(ValueError, match="no log-probabilities, as KLDivLoss"):
            kl.check(outputs, SOFT)


def test_targets_of_the_other_kind_are_refused() -> None:
    outputs = normal(7, 3).log_softmax(1)
    with pytest.raises(ValueError, match="takes class indices"):
        get_loss(nn.NLLLoss()).check(outputs, SOFT)
    with pytest.raises(ValueError, match="takes probabilities"):
        get_loss(nn.KLDivLoss(reduction="batchmean")).check(outputs, LABELS)
    for reduction in ("sum", "none"):
        with pytest.raises(ValueError, match="use reduction='mean'"):
            get_loss(nn.KLDivLoss(reduction=reduction))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("axis", [1, 2])
def test_the_classes_of_a_divergence_lie_where_outputs_are_normalised(
    axis: int, log_target: bool, dtype: torch.dtype
) -> None:
    logits = normal(5, 4, 3, seed=4).to(dtype)
    outputs = logits.log_softmax(axis)
    targets = normal(5, 4, 3, seed=5).softmax(axis).to(dtype)
    targets = targets.log() if log_target else targets
    loss = get_loss(nn.KLDivLoss(reduction="batchmean", log_target=log_target))
    loss.check(outputs, targets)
    wide = logits.double().requires_grad_()
    torchs = F.kl_div(
        wide.log_softmax(axis), targets.double(), reduction="batchmean", log_target=log_target
    )
    (expected,) = torch.autograd.grad(torchs, wide)
    # Outputs and targets have the rounding of their dtype, and logits up to 3.
    close = {"rtol": 0.0, "atol": 10 * torch.finfo(dtype).eps}
    torch.testing.assert_close(loss.gradient(outputs, targets).double(), expected, **close)
    p = logits.double().softmax(axis).movedim(axis, -1)
    variance = (p * (1 - p)).movedim(-1, axis).flatten() / 5
    curvature = loss.gauss_newton(outputs, targets).to_dense().double()
    torch.testing.assert_close(curvature.diagonal(), variance, **close)
