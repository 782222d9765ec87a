"""A step whose length and momentum minimise the LQR objective on the current batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real

import torch
from torch import Tensor

from ..levenberg_marquardt import LevenbergMarquardt
from ..operators.apply import apply_rows
from ..preconditioners.base import Structure
from ..problem import LQRProblem
from ..solvers.dots import row_dots
from .weights import GroupTerms


@dataclass(frozen=True, kw_only=True)
class Subspace:
    """Options of `step="subspace"`.

    Args:
        memory: How many last steps are in the span beside M g. More fit the batch better and the
            data worse.
        damping: Added to the model's curvature, in units of the loss; the least that the
            reduction-ratio rule goes down to.
        shrink: Added to the curvature relative to it, along every direction of the span. It takes
            back what the batch's own noise has put into the step.
        averaging: Share of the past in the running mean of gradients, in [0, 1). Each past gradient
            is carried to the current weights by the change of the current batch's gradient over the
            last step, which costs one more gradient (STORM, Cutkosky and Orabona 2019). 0: none.
        check_every: Steps between two measurements of the reduction ratio, a forward pass each.
            A step that is found to raise the loss of its own batch is taken back.
    """

    memory: int = 1
    damping: float = 1e-2
    shrink: float = 0.7
    averaging: float = 0.7
    check_every: int = 5

    @property
    def remembered(self) -> int:
        """How many last steps are kept: carrying the mean of gradients takes one."""
        return max(self.memory, 1 if self.averaging > 0 else 0)

    def __post_init__(self) -> None:
        for name, count, least in (
            ("memory", self.memory, 0),
            ("check_every", self.check_every, 1),
        ):
            if not (isinstance(count, Integral) and count >= least):
                raise ValueError(f"{name} is {count!r}: give a whole number >= {least}.")
        if not (isinstance(self.damping, Real) and 0 < self.damping < math.inf):
            raise ValueError(f"damping is {self.damping!r}: give a finite number > 0.")
        if not (isinstance(self.shrink, Real) and 0 <= self.shrink < math.inf):
            raise ValueError(f"shrink is {self.shrink!r}: give a finite number >= 0.")
        if not (isinstance(self.averaging, Real) and 0 <= self.averaging < 1):
            raise ValueError(f"averaging is {self.averaging!r}: it is a share, from 0 to below 1.")


@dataclass
class SubspaceState:
    """What a subspace step remembers.

    Args:
        rule: Damping and its rule.
        steps: The last steps, flat (P,), the latest first; float32 at least, as is the mean.
        mean: The running mean of gradients (P,), or None.
        count: Steps taken.
    """

    rule: LevenbergMarquardt
    steps: list[Tensor] = field(default_factory=list)
    mean: Tensor | None = None
    count: int = 0

    def forget(self) -> None:
        """Drops the last steps and the mean gradient."""
        self.mean, self.steps = None, []

    @staticmethod
    def start(options: Subspace) -> SubspaceState:
        """Before the first step."""
        rule = LevenbergMarquardt(damping=options.damping, minimum=options.damping)
        return SubspaceState(rule)


@dataclass(frozen=True, eq=False)
class Proposal:
    """A step and what the model says of it.

    Args:
        step: u, flat (P,).
        decrease: -(g'u + 1/2 u'Hu) with the batch's own gradient, damping left out.
        coefficients: Of the unit directions -M g and the last steps.
        mean: The running mean of gradients that the step was made from.
    """

    step: Tensor
    decrease: float
    coefficients: tuple[float, ...]
    mean: Tensor


@torch.no_grad()
def propose(
    problem: LQRProblem,
    structure: Structure,
    state: SubspaceState,
    options: Subspace,
    *,
    gradient: Tensor,
    terms: GroupTerms,
    before: Callable[[], Tensor],
) -> Proposal | None:
    """The minimiser of the damped model over span{M g, last steps}; None where it is not finite.

    With S the unit directions, c solves (S'HS + damping S'S + shrink diag(S'HS + damping S'S)) c =
    -S'g: an LQR problem in two or three variables. S'HS takes one rollout of S in one block
    and no adjoint where the only cost is at the output. (Section 7 of Martens and Grosse 2015 has
    this without the mean of gradients and with all of the batch's noise.)

    Args:
        problem: The batch, without damping.
        structure: M.
        state: Read, not written.
        options: See there.
        gradient: g of the batch, weight decay included, flat, in the dtype of M.
        terms: Which weights move, and the weight decay: one more diagonal of the curvature.
        before: The same at the last weights.
    """
    mean, direction = _direction(structure, state, options, gradient, before)
    rows = torch.stack([-terms.masked(direction), *state.steps[: options.memory]])
    rows = _units(rows)
    curvature = _curvature(problem, rows, terms)
    slopes = rows @ torch.stack([mean, gradient], dim=1)
    table = torch.cat([curvature, (rows @ rows.mT).double(), slopes.double()], dim=1).cpu()
    if not bool(table.isfinite().all()):
        return None
    k = len(rows)
    H, gram, slope, own = table[:, :k], table[:, k : 2 * k], table[:, 2 * k], table[:, 2 * k + 1]
    damped = H + state.rule.damping * gram
    damped = damped + options.shrink * damped.diagonal().abs().diag()
    c = _minimiser(damped, slope, torch.finfo(rows.dtype).eps)
    step = c.to(rows) @ rows
    decrease = -float(own @ c + c @ H @ c / 2)
    return Proposal(step, decrease, tuple(c.tolist()), mean)


def _direction(
    structure: Structure,
    state: SubspaceState,
    options: Subspace,
    gradient: Tensor,
    before: Callable[[], Tensor],
) -> tuple[Tensor, Tensor]:
    """The running mean of gradients, this batch's included, and M times it."""
    if state.mean is None or options.averaging == 0:
        return gradient, structure._rows(gradient.unsqueeze(0))[0]
    share = min(options.averaging, 1 - 1 / (state.count + 1))
    carried = state.mean + (gradient - before())
    mean = carried.mul_(share).add_(gradient, alpha=1 - share)
    both = structure._rows(torch.stack([mean, gradient]))
    # A mean that has grown longer than the gradient it is to smooth has gone astray.
    kept = row_dots(both, torch.stack([mean, gradient]))
    astray = kept[0] > kept[1]
    return torch.where(astray, gradient, mean), torch.where(astray, both[1], both[0])


def _units(rows: Tensor) -> Tensor:
    """Rows of norm one, or zero; neither their squares nor a quotient over- or underflows."""
    largest = rows.abs().amax(1, keepdim=True)
    scaled = rows / torch.where(largest > 0, largest, torch.ones_like(largest))
    return scaled / scaled.norm(dim=1, keepdim=True).clamp(min=1)


def _minimiser(damped: Tensor, slope: Tensor, eps: float) -> Tensor:
    """The c of damped c = -slope; with |damped| for damped where that is indefinite.

    The model then has no minimum, and the step goes down along negative curvature as far as
    positive curvature of that size would let it (Dauphin et al. 2014).
    """
    values, vectors = torch.linalg.eigh((damped + damped.mT) / 2)
    sizes = values.abs()
    if bool(values.min() < -10 * len(values) * eps * sizes.max()):
        sizes = sizes.clamp(min=eps * float(sizes.max()))
        return -vectors @ ((vectors.mT @ slope) / sizes)
    return torch.linalg.lstsq(damped, -slope.unsqueeze(1), driver="gelsd").solution[:, 0]


def accept(
    state: SubspaceState,
    options: Subspace,
    step: Tensor,
    mean: Tensor,
    measured: tuple[float, float] | None,
) -> bool:
    """Takes a step into the state; whether it is to be kept.

    Args:
        state: Written.
        options: See there.
        step: What was added to the weights.
        mean: The running mean of gradients that it was made from.
        measured: The actual and the predicted decrease, if they were measured.
    """
    if measured is not None:
        state.rule = state.rule.updated(actual=measured[0], predicted=measured[1])
        if not state.rule.accepted:
            state.forget()
            return False
    state.count += 1
    state.mean = mean if options.averaging > 0 else None
    state.steps = [step, *state.steps][: options.remembered]
    return True


def predicted_decrease(
    problem: LQRProblem, step: Tensor, gradient: Tensor, terms: GroupTerms
) -> float:
    """-(g'u + 1/2 u'Hu) of a step u that is not the proposal's."""
    rows = step.unsqueeze(0)
    slope = row_dots(gradient.unsqueeze(0), rows)[0]
    return -float(slope + _curvature(problem, rows, terms)[0, 0] / 2)


def _curvature(problem: LQRProblem, rows: Tensor, terms: GroupTerms) -> Tensor:
    """S'HS with weight decay and without damping, float64 (k, k)."""
    system, narrow = problem.system, rows.to(problem.dtype)
    if system.curved or not system.state_costs[-1]:
        made = rows @ problem.hessian._rows(narrow).mT.to(rows)
    else:
        flat = system.output_product(narrow)
        made = flat.to(rows) @ apply_rows(problem._state_hessian(problem.horizon), flat).mT.to(rows)
    decay = terms.curvature(rows)
    symmetric = ((made + made.mT) / 2).double()
    return symmetric if decay is None else symmetric + decay
