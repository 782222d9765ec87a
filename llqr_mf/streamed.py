"""The quadratic model of a mean over many batches, one batch in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from linear_operator import LinearOperator
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from .damping import control_cost
from .errors import StaleLayersError
from .from_network import flat_curvature, network_problem, warn_if_flat
from .losses import get_loss
from .losses.base import Totals
from .losses.nothing import Nothing
from .metrics import Metric, get_metric
from .metrics.share import Share
from .network import Layer
from .network.checks import check_layers, check_same_calls
from .network.modes import LOCK, random_states, set_random_states
from .network.snapshot import Snapshot
from .operators import ControlCost, ControlCostOperator
from .operators.base import MatrixFreeOperator
from .operators.output_curvature import at_least_float32
from .problem import LQRProblem
from .seeds import mixed

Batch = tuple[Any, Tensor]

PIECE = 2**16
"""Numbers of a batch that are summed at a time."""


class StreamedProblem:
    """Minimise g'u + 1/2 u'H u with g and H means over batches that are linearised in turn.

    Memory is that of one batch's linearisation and two flat vectors; a product costs a forward
    pass more per batch than one with everything held. The layered operators (A, B, value, gain)
    belong to one batch and are not here; solve with "cg" or "minres". In train mode each batch has
    its own BatchNorm statistics, as in training with such batches, and each product draws the
    same dropout masks. The random state is the same at the start of every pass over the batches,
    and the caller's is left alone. Dropout masks and a Monte-Carlo metric's draws are the batch's
    own, and the same in every pass.

    Every mean is over what it is over in one large batch: the loss and its curvature by positions
    that count, by their class weights, or by elements, as the loss divides; costs on layers'
    outputs by samples. A batch in which no target counts is part of the latter alone. A loss or a
    `Divergence` that is a function is taken for a mean over samples, and a loss is held to it: give
    `CallableLoss(fn, divisor=...)` for another.

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
        ValueError: There are no batches, a `DataLoader` shuffles, no target counts in any batch, or
            a function's values on parts of a batch do not average to that of the whole.
        RuntimeError: From a product, where the batches are not those of the first pass, or the
            weights not those of then.
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
        self._marks: list[tuple[Mark, ...]] = []
        self._parts: list[Totals] = []
        self._passes = 0
        self._loss, self._metric = get_loss(loss), get_metric(metric)
        self._progress = progress
        check_layers(layers)
        model = layers[0].program.model
        self._weights = Snapshot(read_by(model), model)
        self._random = RandomState(next(model.parameters()).device)
        self.totals, value = Totals(), 0.0
        self.output_shapes: set[torch.Size] = set()
        gradient: Tensor | None = None
        doubt: str | None = None
        flat: list[str | None] = []
        for problem, targets in self._problems(check=True):
            assert problem.origin is not None
            outputs = problem.origin.outputs
            if gradient is None:
                dtype = problem.dtype
                gradient = torch.zeros_like(problem.gradient, dtype=at_least_float32(dtype))
                self.layout, self.owned = problem.layout, problem.system.owned
                names = [layer.name for layer in layers]
                self.control_cost = control_cost(damping, problem.system, names)
            part = problem.origin.totals
            gradient.add_(problem.gradient.to(gradient.dtype), alpha=part.mass)
            value += part.mass * float(problem.origin.loss_value)
            self._parts.append(part)
            self.totals += part
            self.output_shapes.add(outputs.shape[1:])
            doubt = doubt or self._loss.not_a_mean(outputs, targets)
            if part.mass:
                flat.append(flat_curvature(problem.system))
        if gradient is None:
            raise ValueError("batches is empty: give at least one (inputs, targets).")
        if not self.totals.mass:
            raise ValueError(
                "no target counts in any of the batches (all are ignored, or of weight zero): "
                "there is nothing to average."
            )
        if doubt is not None and len(self._parts) > 1:
            raise ValueError(doubt)
        if all(flat):
            warn_if_flat(flat[0])
        self.gradient = (gradient / self.totals.mass).to(dtype)
        self.loss_value = value / self.totals.mass

    def __repr__(self) -> str:
        """What it is of, how large, and by which costs."""
        return (
            f"StreamedProblem(network of {len(self._layers)} layers, {len(self._marks)} batches, "
            f"P={self.size}, {self.dtype} on {self.device}, R={self.control_cost}, "
            f"loss={self._loss}, metric={self._metric})"
        )

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
        block = self.curvature_block(chosen, chosen)
        if not damped:
            return block
        cost = self.control_cost.restrict(chosen)
        return block + ControlCostOperator(self.gradient.new_empty(0), cost=cost)

    def curvature_block(self, rows: Sequence[int], columns: Sequence[int]) -> StreamedOperator:
        """H_st without R, of parameters by number."""
        sizes = self.layout.sizes
        return StreamedOperator(
            self.gradient.new_empty(0),
            problem=self,
            of=lambda problem: problem.curvature_block(rows, columns),
            sizes=(sum(sizes[i] for i in rows), sum(sizes[i] for i in columns)),
            columns=self._columns,
        )

    def _with_control_cost(self, cost: ControlCost) -> StreamedProblem:
        """The same batches and gradient with another R."""
        other = StreamedProblem.__new__(StreamedProblem)
        other.__dict__.update(self.__dict__)
        other.__dict__.pop("hessian", None)
        other.control_cost = cost
        return other

    def mean_of_products(
        self, of: Callable[[LQRProblem], MatrixFreeOperator], v: Tensor, *, transposed: bool
    ) -> Tensor:
        """The mean over all batches of an operator of each, without R, times rows (k, n)."""
        total: Tensor | None = None
        for problem, _ in self._problems(check=False):
            part = of(problem).times_rows(v, transposed=transposed)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _problems(self, *, check: bool) -> Iterator[tuple[LQRProblem, Tensor]]:
        """Every batch's problem, without R; in later passes, with its share of the mean."""
        self._weights.check(look="all")
        if not check:
            self._check_trained()
            with self._as_in_first_pass():
                check_same_calls(self._layers[0].program)
        count = 0
        for inputs, targets in self._passed():
            self._recognise(count, inputs, targets, first=check)
            metric = self._metric.of_batch(count)
            if not check:
                metric = Share.of(metric, self._parts[count], self.totals)
            # In a later pass one batch shows whether the model is still the one that was split.
            looks = check or count == self._passes % len(self._marks)
            with self._random.resumed(batch=count):
                problem = self._problem(inputs, targets, metric, check=looks)
            count += 1
            yield problem, targets
        self._passes += 1
        if count != len(self._marks):
            raise RuntimeError(f"{count} batches came, and {len(self._marks)} in the first pass.")

    def _problem(self, inputs: Any, targets: Tensor, metric: Metric, *, check: bool) -> LQRProblem:
        empty = isinstance(targets, Tensor) and self._loss.is_empty(targets)
        with self._as_in_first_pass():
            return network_problem(
                LQRProblem,
                *(self._layers, inputs, targets),
                loss=Nothing() if empty else self._loss,
                metric=metric,
                damping=0.0,
                columns=self._columns,
                check=check,
                checkpoint=False,
                may_be_flat=True,
            )

    def _check_trained(self) -> None:
        """A step has a place for every trained parameter, and for no other."""
        named = self._layers[0].program.model.named_parameters()
        now = [name for name, p in named if p.requires_grad]
        changed = set(now).symmetric_difference(self.layout.names)
        if now != list(self.layout.names):
            raise RuntimeError(
                f"'{min(changed, default=now[0])}' was frozen, freed, tied, added or taken out "
                "after the first pass, so that products would be of other parameters: make the "
                "problem again."
            )

    @contextmanager
    def _as_in_first_pass(self) -> Iterator[None]:
        """Layers that are stale are an error of another kind where there was a first pass."""
        try:
            yield
        except StaleLayersError as error:
            if not self._passes:
                raise
            raise RuntimeError(
                f"the model is no longer that of the first pass: make the problem again. {error}"
            ) from error

    def _passed(self) -> Iterator[Batch]:
        """The batches, with random numbers that go on from one to the next."""
        # A DataLoader draws a number for every pass, and a dataset may draw its augmentations.
        random, end = self._random.copy(), object()
        with random.resumed(keep=True):
            batches = self._batches() if callable(self._batches) else self._batches
            source = iter(tqdm(batches, disable=not self._progress, leave=False))
        while True:
            with torch.enable_grad(), random.resumed(keep=True):
                batch: Any = next(source, end)
            if batch is end:
                return
            yield batch

    def _recognise(self, place: int, inputs: Any, targets: Tensor, *, first: bool) -> None:
        """Whether a batch is the one that came there in the first pass, by its marks."""
        tensors = (*(inputs if isinstance(inputs, tuple) else (inputs,)), targets)
        marks = tuple(Mark.of(x) for x in tensors if isinstance(x, Tensor))
        if first:
            self._marks.append(marks)
            return
        known = self._marks[place] if place < len(self._marks) else ()
        if len(marks) != len(known) or not all(map(Mark.agrees, marks, known)):
            raise RuntimeError(
                f"batch {place} is not that of the first pass, so a product would be of other "
                "data: fix the order (shuffle=False) and the seed of any augmentation."
            )


class Mark(NamedTuple):
    """What a tensor is recognised by.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        total: The sum of its entries, each times a weight of its place.
        norm: The norm of its entries.
    """

    shape: torch.Size
    dtype: torch.dtype
    total: float
    norm: float

    @classmethod
    @torch.no_grad()
    def of(cls, x: Tensor) -> Mark:
        """The mark of a tensor; no copy of all of it is made."""
        flat = torch.view_as_real(x) if x.is_complex() else x
        flat = flat if flat.ndim else flat.reshape(1)
        weights = torch.arange(
            1, 1 + min(PIECE, flat.numel()), dtype=torch.float64, device=x.device
        ).cos_()
        total, square = weights.new_zeros(()), weights.new_zeros(())
        rows = max(1, PIECE // max(1, math.prod(flat.shape[1:])))
        pieces = (piece for part in flat.split(rows) for piece in part.reshape(-1).split(PIECE))
        for i, piece in enumerate(pieces):
            # A mask may be infinite.
            wide = piece.to(torch.float64, copy=True).nan_to_num_(nan=1.5, posinf=2.5, neginf=-3.5)
            total += math.cos(1 + i) * torch.dot(wide, weights[: len(wide)])
            square += torch.dot(wide, wide)
        return cls(x.shape, x.dtype, *torch.stack([total, square.sqrt()]).tolist())

    def agrees(self, other: Mark) -> bool:
        """Whether both are of one tensor, up to rounding of the sums."""
        same = self.shape == other.shape and self.dtype == other.dtype
        return same and abs(self.total - other.total) <= 1e-9 * min(self.norm, other.norm)


def read_by(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a model, and the buffers that it reads and does not write to, by name."""
    yield from model.named_parameters()
    for path, module in model.named_modules():
        if not module.training:
            yield from module.named_buffers(path, recurse=False)


class RandomState:
    """The random state of the CPU and of a model's GPU.

    Args:
        device: Of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gpus = [device] if device.type == "cuda" else []
        self._states = random_states(device)

    def copy(self) -> RandomState:
        """One that goes its own way."""
        other = RandomState.__new__(RandomState)
        other.__dict__.update(self.__dict__)
        return other

    @contextmanager
    def resumed(self, *, keep: bool = False, batch: int = 0) -> Iterator[None]:
        """Random numbers go on from this state inside, and from the caller's after it.

        Args:
            keep: Whether the state at the end is kept, to go on from there the next time.
            batch: Its number; all but the first have numbers of their own.
        """
        with LOCK, torch.random.fork_rng(devices=self._gpus):
            set_random_states(self._states, self._device)
            if batch:
                seed = mixed(int(torch.randint(2**62, ())), batch)
                torch.default_generator.manual_seed(seed)
                for device in self._gpus:
                    with torch.cuda.device(device):
                        torch.cuda.manual_seed(seed)
            yield
            if keep:
                self._states = random_states(self._device)


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
