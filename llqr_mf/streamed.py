"""The quadratic model of a mean over many batches, one batch in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .damping import control_cost
from .losses import get_loss
from .metrics import get_metric
from .network import Layer
from .operators.base import MatrixFreeOperator
from .problem import LQRProblem

Batch = tuple[Any, Tensor]


class StreamedProblem:
    """Minimise g'u + 1/2 u'H u with g and H means over batches that are linearised in turn.

    Memory is that of one batch's linearisation and two flat vectors; a product costs a forward
    pass more per batch than one with everything held. The layered operators (A, B, value, gain)
    belong to one batch and are not here; solve with "cg" or "minres". In train mode each batch has
    its own BatchNorm statistics, as in training with such batches, and each product draws the
    same dropout masks.

    Args:
        layers: All layers of `split(model)`.
        batches: A sequence of (inputs, targets), or a function that returns a fresh iterable of
            them, always the same ones.
        loss: As in `LQRProblem.from_network`.
        metric: Likewise; costs on layers' outputs are means too.
        damping: Likewise.
        columns: Likewise.
        progress: Whether to show a progress bar over the batches.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        batches: Sequence[Batch] | Callable[[], Iterable[Batch]],
        *,
        loss: Any,
        metric: Any = "gauss_newton",
        damping: Any = 1e-3,
        columns: int | None = None,
        progress: bool = False,
    ) -> None:
        self._layers, self._batches, self._columns = layers, batches, columns
        self._loss, self._metric = get_loss(loss), get_metric(metric)
        self._progress = progress
        self._rng = torch.get_rng_state()
        gradient: Tensor | None = None
        value = mass = curvature_mass = 0.0
        first: LQRProblem | None = None
        for problem, targets in self._problems(check=True):
            outputs = problem.origin.outputs  # type: ignore[union-attr]
            weight = self._loss.mass(outputs, targets)
            part = problem.gradient * weight
            gradient = part if gradient is None else gradient.add_(part)
            value += weight * float(problem.origin.loss_value)  # type: ignore[union-attr]
            mass += weight
            curvature_mass += self._metric.mass(self._loss, outputs, targets)
            first = first or problem
        if gradient is None or first is None:
            raise ValueError("batches is empty: give at least one (inputs, targets).")
        self.gradient = gradient / mass
        self.loss_value = value / mass
        self._mass = curvature_mass
        self.layout = first.layout
        self.control_cost = control_cost(damping, first.system, [layer.name for layer in layers])

    @staticmethod
    def chunks(inputs: Any, targets: Tensor, size: int) -> list[Batch]:
        """One batch cut into batches of at most `size` samples."""
        if isinstance(inputs, tuple):
            parts = zip(*(x.split(size) for x in inputs), strict=True)
            return list(zip(parts, targets.split(size), strict=True))
        return list(zip(inputs.split(size), targets.split(size), strict=True))

    @property
    def size(self) -> int:
        """P."""
        return len(self.gradient)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of steps and products."""
        return self.gradient.dtype

    @property
    def device(self) -> torch.device:
        """Device of steps and products."""
        return self.gradient.device

    @cached_property
    def hessian(self) -> MatrixFreeOperator:
        """H with R included; shape (P, P)."""
        return StreamedHessianOperator(
            self.gradient.new_empty(0), problem=self, columns=self._columns
        )

    def objective(self, u: Tensor) -> Tensor:
        """The model's value at a flat step (P,), or at columns (P, k)."""
        linear = self.gradient if u.ndim == 1 else self.gradient.unsqueeze(1)
        return (u * (self.hessian @ u / 2 + linear)).sum(0)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a flat step (P,) by parameter name."""
        return self.layout.unflatten(flat)

    def product_rows(self, u: Tensor) -> Tensor:
        """H u for rows (k, P)."""
        total = torch.zeros_like(u)
        for problem, targets in self._problems(check=False):
            outputs = problem.origin.outputs  # type: ignore[union-attr]
            weight = self._metric.mass(self._loss, outputs, targets) / self._mass
            total.add_(problem.hessian._rows(u), alpha=weight)
        return self.control_cost.add_product(u, total, in_place=True)

    def _problems(self, *, check: bool) -> Iterator[tuple[LQRProblem, Tensor]]:
        batches = self._batches() if callable(self._batches) else self._batches
        for inputs, targets in tqdm(batches, disable=not self._progress, leave=False):
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self._rng)
                problem = LQRProblem.from_network(
                    self._layers,
                    *(inputs, targets),
                    loss=self._loss,
                    metric=self._metric,
                    damping=0.0,
                    columns=self._columns,
                    check=check,
                )
            yield problem, targets


class StreamedHessianOperator(MatrixFreeOperator):
    """H of a `StreamedProblem`: one pass over its batches per block of columns.

    Args:
        proto: Carries dtype and device.
        problem: Whose H.
        columns: Columns per pass.
    """

    symmetric = True

    def __init__(
        self, proto: Tensor, *, problem: StreamedProblem, columns: int | None = None
    ) -> None:
        super().__init__(proto, columns=columns, problem=problem)
        self.problem = problem

    def _sizes(self) -> tuple[int, int]:
        return self.problem.size, self.problem.size

    def _rows(self, v: Tensor) -> Tensor:
        with torch.no_grad():
            return self.problem.product_rows(v)
