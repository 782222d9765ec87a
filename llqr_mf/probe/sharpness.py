"""The largest eigenvalue of the loss along a training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..network import Layer
from ..network.kept_layers import KeptLayers
from ..problem import LQRProblem
from ..streamed import Batch, StreamedProblem
from .eigenvalues import eigenvalues


@dataclass(frozen=True)
class SharpnessPoint:
    """One measurement.

    Args:
        step: The step it was made at.
        loss: The mean loss on the measured data.
        values: The largest eigenvalues, descending.
        residual: How far the first may be from an eigenvalue.
        gradient_norm: |g| there.
        products: Vectors multiplied.
    """

    step: int
    loss: float
    values: tuple[float, ...]
    residual: float
    gradient_norm: float
    products: int

    @property
    def sharpness(self) -> float:
        """The largest eigenvalue."""
        return self.values[0]


class Sharpness:
    """Measures the sharpness of a model's loss now and then: a callback for a training loop.

    The eigenvectors of a measurement start the next, which then takes a few products. Nothing
    about the model or its gradients moves.

        watch = Sharpness(model, x, y, loss="mse", every=10)
        for step in range(1000):
            watch(step)
            ...

    Gradient descent with step size h is stable up to a sharpness of 2 / h, and trains at that edge
    (Cohen et al. 2021).

    Args:
        model: Which model.
        inputs: The data it is measured on, samples first; or None with `batches`.
        targets: What the loss compares with.
        loss: As in `LQRProblem.from_network`.
        metric: "newton" for the Hessian of the loss, "gauss_newton", or another.
        every: Steps between measurements.
        k: Eigenvalues to follow.
        rtol: Of the eigenvalues' residuals.
        batches: Data as for `StreamedProblem`, in place of inputs and targets.
        layers: Those of `split(model)`, if they are known or the model needs options.
        seed: Of the first random vectors.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any = None,
        targets: Tensor | None = None,
        *,
        loss: Any,
        metric: Any = "newton",
        every: int = 1,
        k: int = 1,
        rtol: float = 1e-3,
        batches: Sequence[Batch] | None = None,
        layers: Sequence[Layer] | None = None,
        seed: int = 0,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}: give at least 1.")
        given = [name for name, x in (("inputs", inputs), ("targets", targets)) if x is not None]
        if len(given) != (2 if batches is None else 0):
            has = " and ".join(given if batches is None else [*given, "batches"]) or "no data"
            raise ValueError(f"there is {has}: give either inputs and targets, or batches.")
        self._kept = KeptLayers(model, layers=layers)
        self._data = (inputs, targets, batches)
        self._options = {"loss": loss, "metric": metric, "damping": 0.0}
        self.every, self.k, self.rtol, self.seed = every, k, rtol, seed
        self.history: list[SharpnessPoint] = []
        self._vectors: Tensor | None = None

    def __call__(self, step: int) -> SharpnessPoint | None:
        """Measures if the step is a multiple of `every`; None otherwise."""
        return None if step % self.every else self.measure(step)

    def measure(self, step: int) -> SharpnessPoint:
        """Measures now.

        Raises:
            ValueError: As `LQRProblem.from_network`, say where the model has diverged.
        """
        problem = self._problem()
        pairs = eigenvalues(problem, self.k, rtol=self.rtol, initial=self._vectors, seed=self.seed)
        self._vectors = pairs.vectors
        loss = (
            problem.loss_value
            if isinstance(problem, StreamedProblem)
            else problem.origin.loss_value  # type: ignore[union-attr]
        )
        point = SharpnessPoint(
            step=step,
            loss=float(loss),
            values=tuple(pairs.values.tolist()),
            residual=float(pairs.residual_norm[0]),
            gradient_norm=float(torch.linalg.vector_norm(problem.gradient)),
            products=pairs.products,
        )
        self.history.append(point)
        return point

    def to_dict(self) -> list[dict[str, Any]]:
        """The history as plain numbers, for JSON."""
        return [asdict(point) for point in self.history]

    def _problem(self) -> LQRProblem | StreamedProblem:
        inputs, targets, batches = self._data
        if batches is not None:
            return self._kept.use(lambda it: StreamedProblem(it, batches, **self._options))
        assert targets is not None
        return self._kept.use(
            lambda it: LQRProblem.from_network(it, inputs, targets, **self._options)
        )
