"""The tangent kernel of a network as a gpytorch kernel, and the linearised network's prior mean."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from linear_operator import LinearOperator
from torch import Tensor, nn

from ..network import Layer
from ..network.attributes import is_switch, read_attributes
from ..network.checks import ModelRun, check_layers, close
from ..network.kept_layers import KeptLayers
from ..network.snapshot import Snapshot
from ..operators.tangent import Tangent, from_rows, to_rows
from ..problem import LQRProblem
from .checks import check_deterministic, tensors_of
from .kernel_matrix import closed_form_kernel, kernel, kernel_matrix, output_squares
from .linearised import linearised

DENSE_SIZE = 8192
"""Most rows of a kernel matrix that is written out by default."""

KEPT = 6
"""Kernel matrices that are kept, the newest."""


class NeuralTangentKernel(Kernel):  # type: ignore[misc]
    """K(x1, x2) = J(x1) R^{-1} J(x2)', the empirical tangent kernel of a network at its weights.

    The kernel of the linearised network f(x; theta) + J(x) u with the prior u ~ N(0, R^{-1})
    (Jacot et al. 2018; Lee et al. 2019). Put a `ScaleKernel` around it, whose outputscale is then
    the prior variance. It has no hyperparameters of its own: the network's weights are no
    parameters of the kernel, and are not trained with it. Gradients do not pass to x.

    A network of D outputs gives a matrix (N1 D, N2 D) with index n D + c, the output fastest: that
    of a `MultitaskMultivariateNormal` (interleaved=True, its default).

    Matrices are made in closed form where samples are apart, and the last few are kept while the
    weights stay, so that the training of hyperparameters costs one. A matrix of more than
    `dense_size` rows or columns, or a larger one without a closed form, stays a lazy operator.

    The network must be in evaluation mode where it has dropout or BatchNorm. Its weights and modes
    may change between calls. A deep copy shares the network, which `get_fantasy_model` needs.

    Args:
        model: The network, called on x of shape (N, *input_shape).
        input_shape: Shape of one sample; gpytorch's x is (N, d). None: (d,).
        damping: R, as in `LQRProblem.from_network`: 1 is the plain kernel; numbers by layer name
            make other prior variances.
        cuts: As in `split`.
        columns: As in `LQRProblem.from_network`.
        dense_size: See above; 0 keeps everything lazy.
        **kwargs: Of `gpytorch.kernels.Kernel`.
    """

    has_lengthscale = False

    def __init__(
        self,
        model: nn.Module,
        *,
        input_shape: tuple[int, ...] | None = None,
        damping: Any = 1.0,
        cuts: Any = None,
        columns: int | None = None,
        dense_size: int = DENSE_SIZE,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.batch_shape:
            raise ValueError("NeuralTangentKernel is one kernel: leave batch_shape out.")
        self._network = _Network(model, input_shape, damping, cuts, columns)
        self.dense_size = dense_size
        self._kept_of = self._network.changes
        self._kept: list[_Kept] = []

    @property
    def dtype(self) -> torch.dtype:
        """That of the network."""
        return next(self._network.model.parameters()).dtype

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """D."""
        return self._network.width(x1)

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        diag: bool = False,
        last_dim_is_batch: bool = False,
        **params: Any,
    ) -> Tensor | LinearOperator:
        """The matrix (N1 D, N2 D), or its diagonal (N1 D,).

        Args:
            x1: Shape (N1, d).
            x2: Shape (N2, d).
            diag: Whether the diagonal alone is wanted.
            last_dim_is_batch: Not supported.
            **params: Ignored.

        Raises:
            ValueError: x1 or x2 have batch dimensions, or the network's outputs are random or
                depend on the rest of their batch.
        """
        if last_dim_is_batch or x1.ndim != 2 or x2.ndim != 2:
            raise ValueError(
                f"x1 and x2 have shapes {tuple(x1.shape)} and {tuple(x2.shape)}: "
                "NeuralTangentKernel takes (N, d), without batch dimensions."
            )
        with torch.no_grad():
            x1, x2 = x1.detach(), x2.detach()
            same = x1 is x2 or torch.equal(x1, x2)
            if diag:
                return self._diagonal(x1, x2, same)
            return self._matrix(x1, x2, same)

    def _matrix(self, x1: Tensor, x2: Tensor, same: bool) -> Tensor | LinearOperator:
        self._network.refresh()
        if self._kept_of != self._network.changes:
            self._kept, self._kept_of = [], self._network.changes
        for kept in self._kept:
            if kept.is_of(x1, x2) and self._network.agrees(x1, kept.outputs):
                return kept.matrix
        problem1 = self._network.at(x1)
        problem2 = problem1 if same else self._network.at(x2)
        made: Tensor | LinearOperator | None = None
        sizes = problem1.system.output_size, problem2.system.output_size
        if max(sizes) <= self.dense_size:
            made = closed_form_kernel(problem1, problem2)
            if made is None and min(sizes) <= 1024:
                made = kernel_matrix(problem1, problem2)
        if made is None:
            return kernel(problem1, problem2)
        assert isinstance(made, Tensor) and problem1.origin is not None
        # Copies: the user may write to x.
        kept = _Kept(x1.clone(), x2.clone(), problem1.origin.outputs, made)
        self._kept = [kept, *self._kept[: KEPT - 1]]
        return made

    def _diagonal(self, x1: Tensor, x2: Tensor, same: bool) -> Tensor:
        if not same:
            matrix = self._matrix(x1, x2, same)
            return matrix.diagonal(dim1=-1, dim2=-2)
        problem = self._network.at(x1)
        squares = output_squares(problem)
        return problem.tangent_kernel._diagonal() if squares is None else squares


class _Kept(NamedTuple):
    """A kernel matrix with what it was made of: two inputs, and the outputs at the first."""

    x1: Tensor
    x2: Tensor
    outputs: Tensor
    matrix: Tensor

    def is_of(self, x1: Tensor, x2: Tensor) -> bool:
        return _equal(self.x1, x1) and _equal(self.x2, x2)


class NetworkMean(Mean):  # type: ignore[misc]
    """The prior mean of the linearised network, for an `ExactGP` with the tangent kernel.

    With the prior of the weights centred at the trained ones it is f(x); centred at zero it is
    f(x) - J(x) theta. In the second case, at weights that minimise loss and prior together, the
    GP's posterior is that of `Laplace`, mean and all; its covariance is so in either case.

    Args:
        model: The network.
        prior_mean: "weights" or "zero".
        input_shape: As in `NeuralTangentKernel`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        prior_mean: Literal["weights", "zero"] = "weights",
        input_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        if prior_mean not in ("weights", "zero"):
            raise ValueError(f"prior_mean={prior_mean!r}: choose 'weights' or 'zero'.")
        self.prior_mean = prior_mean
        self._network = _Network(model, input_shape, 1.0, None, None)

    def forward(self, x: Tensor) -> Tensor:
        """The mean, (N,) for one output and (N, D) for several."""
        if x.ndim != 2:
            raise ValueError(f"x has shape {tuple(x.shape)}: NetworkMean takes (N, d).")
        with torch.no_grad():
            problem = self._network.at(x.detach())
            assert problem.origin is not None
            mean = problem.origin.outputs.reshape(len(x), -1)
            if self.prior_mean == "zero":
                mean = mean - _moved_by_weights(problem, self._network.model).reshape(mean.shape)
        return mean[:, 0] if mean.shape[1] == 1 else mean


class _Network:
    """A model that is linearised where it is asked, and no submodule of what holds it."""

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...] | None,
        damping: Any,
        cuts: Any,
        columns: int | None,
    ) -> None:
        self.model, self.input_shape, self.damping = model, input_shape, damping
        self.columns = columns
        self.kept = KeptLayers(model, cuts=cuts)
        self.changes = 0
        self._take()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Network:
        """Shares the model, which is linearised at the same weights in both."""
        return copy.copy(self)

    def at(self, x: Tensor) -> LQRProblem:
        """The problem of some inputs."""
        self.refresh()
        inputs = self._shaped(x)
        return self.kept.use(lambda layers: self._linearised(layers, inputs))

    def agrees(self, x: Tensor, outputs: Tensor) -> bool:
        """Whether the model still gives these outputs at some inputs."""
        run = self._run(x)
        return run.succeeded and close(run.outputs(), outputs)

    def width(self, x: Tensor) -> int:
        """D, the outputs of one of some inputs."""
        return int(self._run(x[:1]).outputs().numel())

    def _run(self, x: Tensor) -> ModelRun:
        return ModelRun(self.kept.layers[0].program, (self._shaped(x),))

    def _shaped(self, x: Tensor) -> Tensor:
        return x if self.input_shape is None else x.reshape(len(x), *self.input_shape)

    def _linearised(self, layers: Sequence[Layer], x: Tensor) -> LQRProblem:
        check_layers(layers)
        check_deterministic(layers[0].program)
        return linearised(layers, x, damping=self.damping, columns=self.columns)

    def refresh(self) -> None:
        """Takes in what happened to the model: `changes` moves if anything did."""
        same = self._now() == (self._kind, self._versions)
        same = same and self.kept.layers[0].program.changed_attribute() is None
        if same and self._snapshot.changed(look="all") is None:
            return
        self.changes += 1
        self._take()

    def _take(self) -> None:
        self._kind, self._versions = self._now()
        self._snapshot = Snapshot(tensors_of(self.model))

    def _now(self) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """Modes and what is trained; where the tensors are and how often they were written to."""
        tensors = [tensor for _, tensor in tensors_of(self.model)]
        modes = (module.training for module in self.model.modules())
        # What chooses a way may leave the outputs as they are, which tell of all else.
        switches = (each for each in read_attributes(self.model).items() if is_switch(each[1]))
        kind = (*modes, *(tensor.requires_grad for tensor in tensors), *switches)
        return kind, tuple(v for t in tensors for v in (t.data_ptr(), t._version))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _moved_by_weights(problem: LQRProblem, model: nn.Module) -> Tensor:
    """J theta, one layer's weights at a time."""
    system, held = problem.system, dict(model.named_parameters())
    x: Tangent = tuple(None for _ in system.state_shapes(0))
    for stage, owned in zip(system.stages, system.owned, strict=True):
        weights = [held[problem.names[i]].detach().reshape(1, -1) for i in owned]
        u = from_rows(torch.cat(weights, 1), stage.controls) if weights else ()
        x, _ = stage.forward(x, u)
    return to_rows(x, system.state_shapes(system.horizon), system.proto, 1)[0]
