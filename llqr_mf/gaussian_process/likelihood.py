"""From a mean loss to a likelihood: the factor between the two, and what it leaves out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..losses import Loss
from ..losses.bce import BCEWithLogits
from ..losses.callable import CallableLoss
from ..losses.cross_entropy import CrossEntropy
from ..losses.mse import MeanSquaredError
from ..metrics.base import Metric
from ..metrics.fisher import Fisher
from ..metrics.gauss_newton import GaussNewton
from ..operators.control_cost import ControlCost
from ..operators.softmax_curvature import SoftmaxCurvature
from ..output_sweep import terminal_factor
from ..problem import LQRProblem
from ..streamed import StreamedProblem

MASS_SPREAD = 1e-2
"""Relative difference between samples' sums of target probabilities that is put up with."""


@dataclass(frozen=True)
class Likelihood:
    """-log p(D | theta) = s loss + constant, for a loss that is a mean.

    | loss | likelihood | s | constant |
    |---|---|---|---|
    | "cross_entropy" | categorical | N, the positions that count | 0 |
    | "bce_with_logits" | Bernoulli | N D | 0 |
    | "mse", a mean of N D squares | Gaussian, variance v | N D / (2 v) | (N D / 2) log(2 pi v) |
    | a function, the mean of -log p(y_n | f_n) | its own | N, or its divisor | 0 |

    So the posterior's precision
    Lambda = sum_n J_n' H_n J_n + delta I is s times a problem's Hessian with the damping delta / s:
    a problem with damping R stands for the prior precision s R.

    Args:
        mass: What the loss's mean divides by: N, positions, or N D elements.
        loss_value: The mean loss.
        width: D; None where batches have sequences of different lengths.
        gaussian: Whether a noise belongs to it.
        bernoulli: Whether outputs are logits of their own.
        function: Whether it is a function's, of whose outputs nothing more is known.
    """

    mass: float
    loss_value: float
    width: int | None
    gaussian: bool
    bernoulli: bool
    function: bool = False

    def scale(self, noise: float | Tensor | None = None) -> float | Tensor:
        """The factor s; `noise` is the variance v."""
        if not self.gaussian:
            return self.mass
        assert noise is not None
        return self.mass / (2 * noise)

    def log_likelihood(self, noise: float | Tensor | None = None) -> Tensor:
        """Log p(D | theta), float64; of the shape of `noise`."""
        if not self.gaussian:
            return torch.tensor(-self.mass * self.loss_value, dtype=torch.float64)
        assert noise is not None
        v = torch.as_tensor(noise, dtype=torch.float64)
        return -self.mass / 2 * (self.loss_value / v + torch.log(2 * math.pi * v))

    @property
    def loss_name(self) -> str:
        """As `LQRProblem.from_network` takes it, for messages."""
        if self.gaussian:
            return "mse"
        if self.function:
            return "a function"
        return "bce_with_logits" if self.bernoulli else "cross_entropy"

    def checked_noise(self, noise: Any) -> float | None:
        """The noise, or a ValueError unless it is there where one belongs, and positive."""
        if self.gaussian and noise is None:
            raise ValueError(
                "noise is missing: 'mse' has no variance of its own, so give noise=sigma**2, or "
                "let choose_prior(problem) find it."
            )
        if not self.gaussian and noise is not None:
            raise ValueError(f"noise is {noise} and the loss is no 'mse': leave it out.")
        return None if noise is None else positive("noise", noise)


def likelihood_of(problem: LQRProblem | StreamedProblem) -> Likelihood:
    """That of a problem's loss.

    Raises:
        ValueError: The problem has no network, its loss is no likelihood, or its metric is not the
            Gauss-Newton or the Fisher one.
    """
    loss, metric = _loss_and_metric(problem)
    if not isinstance(loss, CrossEntropy | MeanSquaredError | BCEWithLogits | CallableLoss):
        raise ValueError(
            f"the loss is a {type(loss).__name__}, of which no likelihood is known: use 'mse', "
            "'cross_entropy', 'bce_with_logits', or a function that is the mean of -log p."
        )
    if not isinstance(metric, GaussNewton | Fisher):
        raise ValueError(
            f"the metric is {type(metric).__name__}: the Laplace posterior of the linearised "
            "network takes 'gauss_newton' or 'fisher'."
        )
    if isinstance(metric, Fisher) and metric.kind != "exact":
        raise ValueError(
            f"the metric is the Fisher matrix of kind {metric.kind!r}, which is not the curvature "
            "of the likelihood: use metric='fisher' or 'gauss_newton'."
        )
    if getattr(loss, "weight", None) is not None or getattr(loss, "pos_weight", None) is not None:
        raise ValueError("the loss has weights, and is no likelihood: leave them out.")
    if isinstance(problem, StreamedProblem):
        if isinstance(loss, CrossEntropy):
            _check_sums(problem, loss)
        mass, value = problem.totals.mass, problem.loss_value
        shapes = problem.output_shapes
    else:
        assert problem.origin is not None
        mass = _count(problem, loss)
        value = float(problem.origin.loss_value)
        shapes = {problem.origin.outputs.shape[1:]}
    widths = {math.prod(shape) for shape in shapes}
    return Likelihood(
        mass,
        value,
        widths.pop() if len(widths) == 1 else None,
        gaussian=isinstance(loss, MeanSquaredError),
        bernoulli=isinstance(loss, BCEWithLogits),
        function=isinstance(loss, CallableLoss),
    )


def prior_cost(
    problem: LQRProblem | StreamedProblem, prior_precision: Any, scale: float
) -> ControlCost:
    """R = (prior precision) / s.

    Args:
        problem: Whose damping is meant by None.
        prior_precision: A number, or None.
        scale: s.

    Raises:
        ValueError: It is not positive.
    """
    cost = problem.control_cost
    if prior_precision is None:
        if cost.block_values is None:
            raise ValueError(
                "the problem's damping is an operator: a prior is a number per parameter, so give "
                "the problem another damping, or prior_precision."
            )
        if min(cost.block_values) <= 0:
            raise ValueError("the problem has no damping: give prior_precision > 0.")
        return cost
    return ControlCost.scalar(positive("prior_precision", prior_precision) / scale, cost.sizes)


def positive(name: str, value: Any) -> float:
    """A number or a tensor () as a float; a ValueError unless it is positive and finite."""
    if isinstance(value, Tensor) and value.ndim == 0 and value.dtype != torch.bool:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} is {value!r}: give a positive number.")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} is {value}: give a positive, finite number.")
    return number


def _loss_and_metric(problem: LQRProblem | StreamedProblem) -> tuple[Loss, Metric]:
    if isinstance(problem, StreamedProblem):
        return problem._loss, problem._metric
    if not isinstance(problem, LQRProblem) or problem.origin is None:
        raise ValueError("problem must be made from a network: LQRProblem.from_network(...).")
    return problem.origin.loss, problem.origin.metric


def _count(problem: LQRProblem, loss: Loss) -> float:
    """What the mean divides by; for classes read off the curvature, as targets are not kept."""
    assert problem.origin is not None
    if not isinstance(loss, CrossEntropy):
        return problem.origin.totals.mass
    curvature = terminal_factor(problem)
    # Without class weights every metric that is let through has this curvature.
    assert isinstance(curvature, SoftmaxCurvature)
    weights = curvature.weights[curvature.weights > 0]
    top = float(weights.max())
    if float(weights.min()) < (1 - MASS_SPREAD) * top:
        raise _not_normalised()
    # 1 / count, but where all target probabilities add up to another number.
    return float(len(weights)) if abs(top * len(weights) - 1) < MASS_SPREAD else 1 / top


def _check_sums(problem: StreamedProblem, loss: CrossEntropy) -> None:
    """As `_count` for target probabilities: they add up to one in all batches."""
    for _, targets in problem._passed():
        if not targets.is_floating_point():
            return
        targets = loss._probabilities(targets)
        mass = loss._mass(targets.double(), targets, loss._axis(targets, targets))
        if bool(((mass - 1).abs() > MASS_SPREAD).any()):
            raise _not_normalised()


def _not_normalised() -> ValueError:
    return ValueError(
        "the target probabilities add up to another number for every sample, so that the loss is "
        "no mean of log-likelihoods: normalise them, targets / targets.sum(class_dim, "
        "keepdim=True)."
    )
