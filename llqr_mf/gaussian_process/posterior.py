"""The posterior's precision Lambda = s H, solved with in the output space or by CG."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import factors
from ..gram import closed_form_gram
from ..gram_matrix import GRAM_BY_PRODUCTS, gram_matrix
from ..operators.apply import apply_rows
from ..operators.base import MatrixFreeOperator
from ..operators.output_curvature import OutputCurvature
from ..operators.tangent import from_rows
from ..output_sweep import factor_columns, required_factor, samples_are_apart
from ..problem import LQRProblem
from ..solvers.cg import cg
from ..solvers.dual import Dual
from ..streamed import StreamedProblem
from .kernel_matrix import (
    Side,
    kernel,
    kernel_matrix,
    output_blocks,
    output_squares,
    paired_gram,
)
from .linearised import output_width

DUAL_SIZE = 16384
"""Largest N r whose Gram matrix is made in closed form."""

PASS_ELEMENTS = 2**25
"""Numbers in the right-hand sides of one block CG."""


class Covariance(MatrixFreeOperator):
    """J* Lambda^{-1} J*', the covariance of the outputs at new inputs; shape (M D, M D), symmetric.

    Index n D + c is output c of sample n: the layout of a `MultitaskMultivariateNormal` with
    interleaved=True.
    """

    symmetric = True
    problem: LQRProblem

    @abstractmethod
    def blocks(self) -> Tensor:
        """Every sample's own covariance, (M, D, D)."""

    def _sizes(self) -> tuple[int, int]:
        n = self.problem.system.output_size
        return n, n


class DualCovariance(Covariance):
    """(K** - K*_L (I + G)^{-1} K_L*) / s, with W = C^{-1} K_L* for the Cholesky factor C of I + G.

    The two terms nearly cancel where the data leave little uncertain: in float32 a variance below
    about 1e-6 of the prior's is rounding. (Diagonals are cut at zero.)

    Args:
        proto: Carries dtype and device.
        problem: The network linearised at the new inputs, with the posterior's R.
        seen: W, float64 (r N, M D).
        scale: s.
        columns: Columns per pass.
    """

    def __init__(
        self,
        proto: Tensor,
        *,
        problem: LQRProblem,
        seen: Tensor,
        scale: float,
        columns: int | None = None,
    ) -> None:
        super().__init__(proto, columns=columns, problem=problem, seen=seen, scale=scale)
        self.problem, self.seen, self.scale = problem, seen, scale

    def _rows(self, v: Tensor) -> Tensor:
        prior = self.problem.tangent_kernel.times_rows(v).double()
        known = (v.double() @ self.seen.mT) @ self.seen
        return prior.sub_(known).div_(self.scale).to(v.dtype)

    def to_dense(self) -> Tensor:
        """The matrix, by the closed form of K** where it has one."""
        return self._dense(kernel_matrix(self.problem))

    def blocks(self) -> Tensor:
        """Every sample's own covariance; no solves."""
        width = output_width(self.problem)
        prior = output_blocks(self.problem)
        if prior is None:
            return sample_blocks(self.to_dense(), width)
        parts = self.seen.unflatten(1, (-1, width)).split(64, dim=1)
        moved = (part.permute(1, 2, 0).contiguous() for part in parts)
        known = torch.cat([part @ part.mT for part in moved])
        made = prior.double().sub_(known).div_(self.scale)
        made = (made + made.mT) / 2
        made.diagonal(dim1=1, dim2=2).clamp_(min=0)
        return made.to(self.dtype)

    def _diagonal(self) -> Tensor:
        prior = output_squares(self.problem)
        if prior is None:
            prior = self.problem.tangent_kernel._diagonal()
        known = self.seen.square().sum(0)
        return prior.double().sub_(known).div_(self.scale).clamp_(min=0).to(self.dtype)

    def _dense(self, prior: Tensor) -> Tensor:
        made = prior.double().sub_(self.seen.mT @ self.seen).div_(self.scale)
        made = (made + made.mT) / 2
        made.diagonal().clamp_(min=0)
        return made.to(self.dtype)


class CGCovariance(Covariance):
    """J* H^{-1} J*' / s, one CG solve of size P per column.

    Args:
        proto: Carries dtype and device.
        problem: The network linearised at the new inputs.
        posterior: Solves with H.
        columns: Columns per pass.
    """

    def __init__(
        self,
        proto: Tensor,
        *,
        problem: LQRProblem,
        posterior: CGPosterior,
        columns: int | None = None,
    ) -> None:
        super().__init__(proto, columns=columns, problem=problem, posterior=posterior)
        self.problem, self.posterior = problem, posterior

    def _rows(self, v: Tensor) -> Tensor:
        system = self.problem.system
        costate = from_rows(v, system.state_shapes(system.horizon))
        u = self.posterior.solve_rows(system.output_product_t(costate, len(v)))
        return system.output_product(u).div_(self.posterior.scale)

    def blocks(self) -> Tensor:
        """Every sample's own covariance, by a solve per output of every sample."""
        width, made = output_width(self.problem), []
        start = 0
        for unit in self._unit_rows(self._sizes()[0]):
            rows = self._rows(unit)
            owners = torch.arange(start, start + len(unit), device=rows.device) // width
            made.append(rows.unflatten(1, (-1, width))[torch.arange(len(unit)), owners])
            start += len(unit)
        blocks = torch.cat(made).unflatten(0, (-1, width))
        return (blocks + blocks.mT) / 2


class Posterior(ABC):
    """Lambda = s H, H with the prior's R in it.

    Args:
        problem: With that R as its damping.
        scale: s.
    """

    method: str

    def __init__(self, problem: LQRProblem | StreamedProblem, scale: float) -> None:
        self.problem, self.scale = problem, scale

    @abstractmethod
    def covariance(self, problem: LQRProblem) -> Covariance:
        """That of the outputs of a problem with the same R."""

    @abstractmethod
    def solve_rows(self, v: Tensor) -> Tensor:
        """H^{-1} v for rows (k, P)."""

    @property
    def columns(self) -> int:
        """Rows of size P in one pass."""
        return max(1, min(32, PASS_ELEMENTS // max(1, self.problem.size)))


class DualPosterior(Posterior):
    """By the Gram matrix G = L'J R^{-1} J'L of the data and one Cholesky factor of I + G.

    Args:
        problem: With the prior's R.
        scale: s.
        gram: G, (r N, r N) with index j N + n.
    """

    method = "dual"
    problem: LQRProblem

    def __init__(self, problem: LQRProblem, scale: float, gram: Tensor) -> None:
        super().__init__(problem, scale)
        self.gram = gram
        self.factor = required_factor(problem, "posteriors by the dual")
        self._dual = Dual(problem.system, self.factor, gram)
        cholesky = self._dual._cholesky
        assert cholesky is not None
        self.cholesky = cholesky

    @property
    def log_determinant(self) -> float:
        """Log det(Lambda) - log det(prior precision) = log det(I + G)."""
        return 2 * float(self.cholesky.diagonal().log().sum())

    def covariance(self, problem: LQRProblem) -> DualCovariance:
        """No solve of size P, here or later."""
        cross = cross_factor(self.problem, self.factor, problem)
        seen = torch.linalg.solve_triangular(self.cholesky, cross.double(), upper=False)
        return DualCovariance(
            problem.system.proto,
            problem=problem,
            seen=seen,
            scale=self.scale,
            columns=problem._columns,
        )

    def solve_rows(self, v: Tensor) -> Tensor:
        """As exact as the Gram matrix is."""
        return self._dual.precondition_rows(v)


class CGPosterior(Posterior):
    """By conjugate gradients on H itself.

    Args:
        problem: With the prior's R.
        scale: s.
        rtol: Relative residual of the solves.
        max_iterations: Of each.
    """

    method = "cg"

    def __init__(
        self,
        problem: LQRProblem | StreamedProblem,
        scale: float,
        *,
        rtol: float,
        max_iterations: int | None,
    ) -> None:
        super().__init__(problem, scale)
        self.rtol, self.max_iterations = rtol, max_iterations

    def covariance(self, problem: LQRProblem) -> CGCovariance:
        """A solve for every column of a product."""
        proto = problem.system.proto
        return CGCovariance(proto, problem=problem, posterior=self, columns=self.columns)

    def solve_rows(self, v: Tensor) -> Tensor:
        """To `rtol`; says so in a warning where that was not reached."""
        found = cg(self.problem.hessian, v.mT, rtol=self.rtol, max_iterations=self.max_iterations)
        worst = float(found.residual_norm.max()) if len(v) else 0.0
        if worst > self.rtol:
            warnings.warn(
                f"a solve with the posterior's precision stopped at a residual of {worst:.1e} and "
                f"not rtol={self.rtol:.1e}: raise max_iterations, or use method='dual'.",
                stacklevel=3,
            )
        return found.x.mT.to(v.dtype)


def data_gram(problem: LQRProblem) -> Tensor | None:
    """G of the training data, in closed form up to `DUAL_SIZE` or by products while it is small."""
    factor = required_factor(problem, "posteriors by the dual")
    size = (factor.rank or 0) * factor.samples
    if factors.DUAL_SIZE < size <= DUAL_SIZE:
        return closed_form_gram(problem)
    return gram_matrix(problem, factor)[0]


def has_gram(problem: LQRProblem) -> bool:
    """Whether `data_gram` is likely to find one; costs nothing."""
    factor = required_factor(problem, "posteriors")
    size = (factor.rank or 0) * factor.samples
    apart = samples_are_apart(problem) and problem.system.control_cost.block_values is not None
    return size <= GRAM_BY_PRODUCTS or (apart and size <= DUAL_SIZE)


@torch.no_grad()
def cross_factor(data: LQRProblem, factor: OutputCurvature, new: LQRProblem) -> Tensor:
    """K_L* = L'J R^{-1} J*', (r N, M D), with rows j N + n and columns m D + c."""
    columns = torch.cat(list(factor_columns(factor)))
    assert data.origin is not None
    shape = data.origin.outputs.shape

    def some(start: int, stop: int) -> Tensor:
        return columns[start:stop].reshape(stop - start, *shape)

    total = paired_gram(Side(data, len(columns), some), Side.of_outputs(new))
    if total is not None:
        return total.permute(0, 1, 3, 2).reshape(len(columns) * shape[0], -1)
    made = []
    lazy = kernel(new, data)
    for z in _unit_coordinates(factor, step=64):
        made.append(apply_rows(lazy, factor.factor(z)))
    return torch.cat(made)


def sample_blocks(dense: Tensor, width: int) -> Tensor:
    """The diagonal blocks (M, D, D) of (M D, M D)."""
    parts = dense.unflatten(0, (-1, width)).unflatten(2, (-1, width))
    return parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _unit_coordinates(factor: OutputCurvature, step: int) -> Iterator[Tensor]:
    assert factor.rank is not None
    size = factor.rank * factor.samples
    for start in range(0, size, step):
        k = min(step, size - start)
        z = torch.zeros(k, size, dtype=factor.dtype, device=factor.device)
        z[torch.arange(k), torch.arange(start, start + k)] = 1
        yield z.reshape(k, factor.rank, factor.samples)
