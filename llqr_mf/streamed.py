"""The quadratic model of a mean over many batches, one batch in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from math import isclose
from typing import Any

import torch
from linear_operator import LinearOperator
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from .damping import control_cost
from .losses import get_loss
from .metrics import get_metric
from .network import Layer
from .operators import ControlCostOperator
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
        batches: A `DataLoader` or sequence of (inputs, targets), or a function that returns a
            fresh iterable of them; the same ones in every pass, which is checked.
        loss: As in `LQRProblem.from_network`.
        metric: Likewise; costs on layers' outputs are means too.
        damping: Likewise.
        columns: Likewise.
        progress: Whether to show a progress bar over the batches.

    Raises:
        ValueError: There are no batches, or a `DataLoader` shuffles.
        RuntimeError: From a product, where the batches are not those of the first pass.
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
        if isinstance(batches, DataLoader) and isinstance(batches.sampler, RandomSampler):
            raise ValueError(
                "batches is a DataLoader that shuffles, and every product needs the same batches: "
                "make it with shuffle=False."
            )
        self._layers, self._batches, self._columns = layers, batches, columns
        self._sums: list[float] = []
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
        self.layout, self.owned = first.layout, first.system.owned
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

    def block(self, names: str | Sequence[str], *, damped: bool = True) -> LinearOperator:
        """The part of H in some parameters, by name, as `LQRProblem.block`; symmetric."""
        chosen = self.layout.select(names)
        block = self._block(chosen, chosen)
        if not damped:
            return block
        cost = self.control_cost.restrict(chosen)
        return block + ControlCostOperator(self.gradient.new_empty(0), cost=cost)

    def _block(self, rows: Sequence[int], columns: Sequence[int]) -> StreamedOperator:
        """H_st without R."""
        sizes = self.layout.sizes
        return StreamedOperator(
            self.gradient.new_empty(0),
            problem=self,
            of=lambda problem: problem._block(rows, columns, damped=False),
            sizes=(sum(sizes[i] for i in rows), sum(sizes[i] for i in columns)),
            columns=self._columns,
        )

    def mean_of_products(
        self, of: Callable[[LQRProblem], MatrixFreeOperator], v: Tensor, *, transposed: bool
    ) -> Tensor:
        """The mean over all batches of an operator of each, without R, times rows (k, n)."""
        total: Tensor | None = None
        for problem, targets in self._problems(check=False):
            outputs = problem.origin.outputs  # type: ignore[union-attr]
            weight = self._metric.mass(self._loss, outputs, targets) / self._mass
            part = of(problem).times_rows(v, transposed=transposed).mul_(weight)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _problems(self, *, check: bool) -> Iterator[tuple[LQRProblem, Tensor]]:
        batches = self._batches() if callable(self._batches) else self._batches
        count = 0
        for inputs, targets in tqdm(batches, disable=not self._progress, leave=False):
            self._recognise(count, inputs, targets, first=check)
            count += 1
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
        if count != len(self._sums):
            raise RuntimeError(f"{count} batches came, and {len(self._sums)} in the first pass.")

    def _recognise(self, place: int, inputs: Any, targets: Tensor, *, first: bool) -> None:
        """Whether a batch is the one that came there in the first pass, by its sum."""
        tensors = [
            x
            for x in (*(inputs if isinstance(inputs, tuple) else (inputs,)), targets)
            if isinstance(x, Tensor)
        ]
        total = sum(float(x.sum(dtype=torch.float64)) for x in tensors)
        if first:
            self._sums.append(total)
        elif place >= len(self._sums) or not isclose(total, self._sums[place]):
            raise RuntimeError(
                f"batch {place} is not that of the first pass, so a product would be of other "
                "data: fix the order (shuffle=False) and the seed of any augmentation."
            )


class StreamedOperator(MatrixFreeOperator):
    """The mean over batches of an operator of each: one pass per block of columns.

    Args:
        proto: Carries dtype and device.
        problem: Whose batches.
        of: The operator of one batch's problem.
        sizes: Its shape.
        columns: Columns per pass.
    """

    def __init__(
        self,
        proto: Tensor,
        *,
        problem: StreamedProblem,
        of: Callable[[LQRProblem], MatrixFreeOperator],
        sizes: tuple[int, int],
        columns: int | None = None,
    ) -> None:
        super().__init__(proto, columns=columns, problem=problem, of=of, sizes=sizes)
        self.problem, self.of, self.sizes = problem, of, sizes

    def _sizes(self) -> tuple[int, int]:
        return self.sizes

    def _rows(self, v: Tensor) -> Tensor:
        with torch.no_grad():
            return self.problem.mean_of_products(self.of, v, transposed=False)

    def _rows_t(self, w: Tensor) -> Tensor:
        with torch.no_grad():
            return self.problem.mean_of_products(self.of, w, transposed=True)


class StreamedHessianOperator(StreamedOperator):
    """H of a `StreamedProblem`, with R.

    Args:
        proto: Carries dtype and device.
        problem: Whose H.
        columns: Columns per pass.
    """

    symmetric = True

    def __init__(
        self, proto: Tensor, *, problem: StreamedProblem, columns: int | None = None
    ) -> None:
        MatrixFreeOperator.__init__(self, proto, columns=columns, problem=problem)
        self.problem, self.of = problem, lambda one: one.hessian
        self.sizes = (problem.size, problem.size)

    def _rows(self, v: Tensor) -> Tensor:
        product = super()._rows(v)
        return self.problem.control_cost.add_product(v, product, in_place=True)
