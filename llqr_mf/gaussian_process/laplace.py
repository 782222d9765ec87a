"""The Laplace posterior of a trained network, and what it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from torch import Tensor

from ..errors import StaleLayersError
from ..network import Layer
from ..network.snapshot import Snapshot
from ..operators.output_curvature import OutputCurvature
from ..operators.tangent import from_rows
from ..output_sweep import required_factor, terminal_factor
from ..probe.draws import draw
from ..problem import LQRProblem
from ..streamed import StreamedProblem
from .checks import check_current, check_deterministic, tensors_of
from .likelihood import likelihood_of, prior_cost
from .linearised import linearised, output_width
from .posterior import (
    CGPosterior,
    Covariance,
    DualPosterior,
    Posterior,
    data_gram,
    has_gram,
)
from .predictive import Approximation, bernoulli_probabilities, class_probabilities

Method: TypeAlias = Literal["auto", "dual", "cg"]
"""How the posterior's precision is solved with."""

PriorMean: TypeAlias = Literal["zero", "weights"] | Tensor
"""Zero, the trained weights themselves, or flat weights (P,)."""


class Laplace:
    """The posterior N(theta, Lambda^{-1}) of a network linearised at its trained weights theta.

        Lambda = sum_n J_n' H_n J_n + delta I = s (H_mean + (delta / s) I)

    with J_n the outputs' derivative in the weights, H_n the curvature of sample n's negative
    log-likelihood, and s what makes a likelihood of the mean loss (`Likelihood` has the table: N
    for cross-entropy, N D / (2 v) for "mse" with the noise variance v). So the problem's damping R
    stands for the prior precision s R (MacKay 1992; Immer et al. 2021 for the linearised network).
    No per-sample Jacobian is ever formed.

    "dual" works in the space of the data: one Gram matrix (N r, N r) and one Cholesky factor of it,
    then a prediction is products of samples and its variances cost no solve. Exact; the cost does
    not see the number of weights but for the width of the layers. Make the model float64 for it:
    I + G has a condition number of s |K| / delta. "cg" solves with Lambda for every output
    that is asked for. "auto" takes dual where the Gram matrix has a closed form and N r <= 16384,
    or N r <= 1024, and else cg.

    The weights, buffers and data must stay what they were; whatever is asked for after they changed
    raises. The network must be a function of each sample alone: in evaluation mode, where it has
    dropout or BatchNorm.

    At the evidence's prior a classifier with saturated outputs comes out underconfident. That is
    the Gaussian's doing, not the linearisation's: choose the prior precision on held-out data
    there.

    Args:
        problem: At trained weights, of the whole training set, with metric "gauss_newton" or
            the exact "fisher"; a `StreamedProblem` goes with "cg".
        prior_precision: delta. None: s times the problem's damping.
        noise: The variance v of the observations, for "mse" (`choose_prior` finds both).
        method: "auto", "dual" or "cg".
        rtol: Of the solves of "cg".
        max_iterations: Of those.

    Attributes:
        likelihood: What the loss stands for.
        noise: v, or None.
        scale: s.

    Raises:
        ValueError: The problem is not such a one or in half precision, an option does not fit,
            "dual" has no Gram matrix, or outputs are random or depend on the rest of their batch.
        RuntimeError: The weights or the data changed since the problem was made.
    """

    def __init__(
        self,
        problem: LQRProblem | StreamedProblem,
        *,
        prior_precision: float | None = None,
        noise: float | None = None,
        method: Method = "auto",
        rtol: float = 1e-6,
        max_iterations: int | None = None,
    ) -> None:
        if method not in get_args(Method):
            raise ValueError(f"method={method!r}: choose 'auto', 'dual' or 'cg'.")
        self.likelihood = likelihood_of(problem)
        if problem.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the problem is {problem.dtype}: a posterior covariance is a small difference of "
                "kernels, of which that leaves few digits. Convert the model, model.float(), and "
                "the inputs, and make a new problem."
            )
        self.noise = self.likelihood.checked_noise(noise)
        self.scale = float(self.likelihood.scale(self.noise))
        cost = prior_cost(problem, prior_precision, self.scale)
        self._given = problem
        check_deterministic(self._layers[0].program)
        model = self._layers[0].program.model
        self._snapshot = Snapshot(tensors_of(model), model)
        self.check()
        self._options: dict[str, Any] = {"rtol": rtol, "max_iterations": max_iterations}
        damped = problem._with_control_cost(cost)
        if isinstance(problem, StreamedProblem):
            if method == "dual":
                raise ValueError(
                    "method='dual' needs all data in one problem, and a StreamedProblem has "
                    "batches: use method='cg'."
                )
            method = "cg"
        else:
            required_factor(problem, "Laplace posteriors")
            if method == "auto":
                method = "dual" if has_gram(problem) else "cg"
        self.posterior: Posterior
        gram = data_gram(damped) if method == "dual" else None  # type: ignore[arg-type]
        if gram is not None:
            assert isinstance(damped, LQRProblem)
            self.posterior = DualPosterior(damped, self.scale, gram)
        elif method == "dual":
            raise ValueError(
                "method='dual' has no Gram matrix here: samples interact, a parameter is read "
                "twice, or there are too many of them. Use method='cg', or fewer samples."
            )
        else:
            self.posterior = CGPosterior(damped, self.scale, **self._options)

    @property
    def method(self) -> str:
        """The method that was taken: "dual" or "cg"."""
        return self.posterior.method

    @property
    def prior_precision(self) -> float | tuple[float, ...]:
        """Delta; where the problem's damping differs from parameter to parameter, one for each."""
        cost = self.posterior.problem.control_cost
        if cost.uniform is not None:
            return cost.uniform * self.scale
        return tuple(value * self.scale for value in cost.block_values or ())

    def __repr__(self) -> str:
        noise = "" if self.noise is None else f", noise={self.noise:.4g}"
        outputs = self.likelihood.width or "of every length"
        delta = self.prior_precision
        prior = f"{delta:.4g}" if isinstance(delta, float) else "by parameter"
        return (
            f"Laplace(loss='{self.likelihood.loss_name}', outputs={outputs}, "
            f"weights={self.posterior.problem.size}, prior_precision={prior}{noise}, "
            f"method='{self.method}')"
        )

    def with_prior(
        self, prior_precision: float | None = None, noise: float | None = None
    ) -> Laplace:
        """The same posterior with another prior and noise; the Gram matrix is kept.

        Args:
            prior_precision: delta; None keeps it.
            noise: v; None keeps it.

        Raises:
            RuntimeError: The weights or the data changed since.
        """
        self.check()
        noise = self.likelihood.checked_noise(self.noise if noise is None else noise)
        scale, old = float(self.likelihood.scale(noise)), self.posterior
        cost = old.problem.control_cost
        # R over what it was, None where that is no number.
        factor: float | None
        if prior_precision is None:
            factor = self.scale / scale
            kept = ((blocks, value * factor) for blocks, value in cost.groups)
            cost = replace(cost, groups=tuple(kept))
        else:
            factor = None if cost.uniform is None else 1 / cost.uniform
            cost = prior_cost(self._given, prior_precision, scale)
            if factor is not None and cost.uniform is not None:
                factor *= cost.uniform
        other = Laplace.__new__(Laplace)
        other.__dict__.update(self.__dict__)
        other.noise, other.scale = noise, scale
        damped = self._given._with_control_cost(cost)
        if not isinstance(old, DualPosterior):
            other.posterior = CGPosterior(damped, scale, **self._options)
            return other
        assert isinstance(damped, LQRProblem)
        gram = data_gram(damped) if factor is None else old.gram / factor
        assert gram is not None
        other.posterior = DualPosterior(damped, scale, gram)
        return other

    def check(self) -> None:
        """Raises if the weights, buffers or data are no longer those of the posterior.

        Everything that is asked of it does this for itself.

        Raises:
            RuntimeError: With the name of what changed.
        """
        self._snapshot.check(look="all")
        if isinstance(self._given, LQRProblem):
            check_current(self._given)

    @property
    def _layers(self) -> Sequence[Layer]:
        if isinstance(self._given, StreamedProblem):
            return self._given._layers
        assert self._given.origin is not None
        return self._given.origin.layers

    # ---- predictions

    def predict(self, inputs: Any) -> MultivariateNormal:
        """The outputs f(x*) at new inputs, without the noise of observations.

        Args:
            inputs: One batch, samples first; a tuple of tensors for several inputs.

        Returns:
            A gpytorch `MultivariateNormal` over M samples for one output, and for D a
            `MultitaskMultivariateNormal` (M, D); the mean is the network's output, the covariance
            a lazy operator. A likelihood of gpytorch adds the noise.

        Raises:
            RuntimeError: The weights or the data changed since the posterior was made, or before
                the covariance is evaluated.
        """
        problem, covariance = self._predicted(inputs)
        assert problem.origin is not None
        mean = problem.origin.outputs.reshape(len(problem.origin.outputs), -1)
        if mean.shape[1] == 1:
            return MultivariateNormal(mean[:, 0], covariance)
        return MultitaskMultivariateNormal(mean, covariance)

    @torch.no_grad()
    def probabilities(
        self,
        inputs: Any,
        *,
        method: Approximation = "monte_carlo",
        samples: int = 1000,
        seed: int = 0,
    ) -> Tensor:
        """The predictive probabilities of the classes, (M, C), or of each logit for a bce loss.

        Args:
            inputs: As in `predict`.
            method: "monte_carlo" or "probit"; see `class_probabilities`.
            samples: Draws of "monte_carlo".
            seed: Of those.

        Raises:
            ValueError: The loss is "mse" or a function, or outputs have more than one position.
        """
        if self.likelihood.gaussian:
            raise ValueError("the loss is 'mse', which has no classes: use predict(inputs).")
        if self.likelihood.function:
            raise ValueError(
                "the loss is a function, of whose classes nothing is known: use predict(inputs)."
            )
        problem, covariance = self._predicted(inputs)
        assert problem.origin is not None
        mean = problem.origin.outputs
        if not self.likelihood.bernoulli and mean.ndim != 2:
            raise ValueError(
                f"outputs have shape {tuple(mean.shape)}: class probabilities are for (M, C)."
            )
        mean = mean.reshape(len(mean), -1)
        of = bernoulli_probabilities if self.likelihood.bernoulli else class_probabilities
        return of(mean, covariance.blocks(), method=method, samples=samples, seed=seed)

    # ---- the posterior of the weights

    @torch.no_grad()
    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Draws u of the posterior of theta + u, by solving with noise.

        u = Lambda^{-1} (s^{1/2} J'L e_1 + delta^{1/2} e_2) with standard normal e_1, e_2
        (Papandreou and Yuille 2010).

        Args:
            count: How many; draw number i does not depend on it.
            seed: Of the noise.

        Returns:
            Tensor (count, P): a draw is a row, to be added to the flat weights theta
            (`problem.unflatten(row)` has its parts by name).

        Raises:
            ValueError: `count` is no positive whole number.
            RuntimeError: The weights or the data changed since.
        """
        self.check()
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count is {count!r}: give at least 1.")
        problem = self.posterior.problem
        made = problem.hessian._proto.new_empty(count, problem.size)
        values = problem.control_cost.block_values
        assert values is not None
        for start in range(0, count, self.posterior.columns):
            which = range(start, min(start + self.posterior.columns, count))
            noise = draw("gaussian", problem.size, which, seed, made)
            for part, value in zip(
                noise.split(problem.control_cost.sizes, dim=1), values, strict=True
            ):
                part.mul_(value**0.5)
            self._add_data_noise(noise, which, seed)
            made[which.start : which.stop] = self.posterior.solve_rows(noise)
            del noise
        return made.div_(self.scale**0.5)

    def _add_data_noise(self, rows: Tensor, which: range, seed: int) -> None:
        """Adds J'L e for every batch of the data."""
        problem = self.posterior.problem
        if isinstance(problem, LQRProblem):
            _add_noise_of(problem, rows, which, seed, 1)
            return
        for batch, (part, _) in enumerate(problem._problems(check=False)):
            _add_noise_of(part, rows, which, seed, batch + 1)

    def _predicted(self, inputs: Any) -> tuple[LQRProblem, Covariance]:
        self.check()
        try:
            new = linearised(self._layers, inputs, columns=self._given._columns)
        except StaleLayersError as error:
            raise RuntimeError(
                f"the network is no longer that of the posterior: make a new problem. {error}"
            ) from error
        if self.likelihood.width not in (output_width(new), None):
            raise ValueError(
                f"the network has {output_width(new)} outputs per sample at these inputs and had "
                f"{self.likelihood.width} on the data: give inputs of the same shape."
            )
        damped = new._with_control_cost(self.posterior.problem.control_cost)
        with torch.no_grad():
            return damped, self.posterior.covariance(damped)


def _add_noise_of(problem: LQRProblem, rows: Tensor, which: range, seed: int, batch: int) -> None:
    factor = terminal_factor(problem)
    if not isinstance(factor, OutputCurvature) or factor.rank is None:
        raise ValueError(
            "sample needs a curvature with a factor: use metric='gauss_newton' or 'fisher' with a "
            "built-in loss."
        )
    size = factor.rank * factor.samples
    # Seeds of their own for every batch.
    noise = draw("gaussian", size, which, seed + (batch << 64), rows)
    costate = factor.factor(noise.reshape(len(noise), factor.rank, factor.samples))
    system = problem.system
    shapes = system.state_shapes(system.horizon)
    rows.add_(system.output_product_t(from_rows(costate, shapes), len(rows)))
