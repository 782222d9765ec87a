"""`LLQR`: any torch optimizer, preconditioned by what the LQR objective teaches."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..losses import get_loss
from ..metrics import get_metric
from ..network import split
from ..network.checks import NotFiniteError
from ..preconditioners.base import Structure
from ..preconditioners.direct_sum import Rules
from ..preconditioners.direct_sum import structure as build_structure
from ..preconditioners.identity import Identity
from ..problem import LQRProblem
from .checkpoint import load, save
from .coverage import coverage
from .graft import Graft
from .refresh import Recipe, Refresher
from .schedule import RefreshEvery, period_at
from .subspace import Subspace
from .subspace_step import SubspaceStep
from .wrapped import Precondition, WrappedStep

Batch: TypeAlias = tuple[Any, Tensor]
_DEFAULTS: dict[str, Any] = {"max_state": 3.0, "kernels": "tensor"}


@dataclass(frozen=True)
class Counts:
    """What has happened so far.

    Args:
        steps: Calls of `step`, skipped ones included.
        skipped: Steps not taken, because a loss, gradient or step was NaN or infinite.
        taken_back: Subspace steps undone because they raised their own batch's loss.
        refreshes: Refreshes that changed M.
        refused: Refreshes that did not: something was not finite.
        kept: Fits that the held-out batch refused; M then is what it was before the fit.
        reason: Why the last step was skipped or the last refresh refused.
    """

    steps: int = 0
    skipped: int = 0
    taken_back: int = 0
    refreshes: int = 0
    refused: int = 0
    kept: int = 0
    reason: str = ""


class LLQR(Optimizer):
    """Wraps a torch optimizer and gives it preconditioned gradients.

        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = lq.LLQR(model, base, loss="cross_entropy")
        for x, y in loader:
            if optimizer.refresh_due:
                optimizer.refresh(x, y)
            optimizer.zero_grad()
            loss_function(model(x), y).backward()
            optimizer.step()

    `param_groups` and `state` are the base optimizer's own, so learning-rate schedulers, gradient
    scalers and clipping work as on the base. Its weight decay acts on the weights as it always
    does and is not preconditioned.

    With `step="subspace"` there is no backward pass of one's own: `optimizer.step(x, y)` linearises
    the model on the batch, refreshes M when that is due, and minimises the LQR objective over the
    preconditioned gradient and the last step. The base optimizer then only names the parameters;
    a scheduler's factor lr / initial_lr multiplies the step, and weight decay enters the model.

    A step or refresh that meets NaN or infinity changes nothing but `counts`.

    Args:
        model: The model that is trained.
        base: An optimizer over its parameters.
        loss: What the backward passes differentiate, as in `LQRProblem.from_network`: a mean.
        structure: M: a name ("ekronecker", "kronecker", "diagonal", "scalar", "identity", ...),
            pairs (pattern, name or None) for the parameters' names, or a `Structure` for the model.
        metric: Whose curvature M follows, as in `LQRProblem.from_network`.
        recipe: How M is learned at a refresh.
        refresh_every: Steps between refreshes, a number or a function of the step (`annealed`,
            `burn_in`).
        spread: Over how many consecutive steps a refresh is spread, one batch at each.
        graft: "layer": every layer's preconditioned gradient gets the gradient's norm, so the base
            learning rate carries over. "kl": one factor for all, so that sum lr^2 g'Mg <= kl_limit.
            "none": as it comes.
        kl_limit: For graft="kl".
        precondition: "gradient": M acts on what the base optimizer reads; "update": on what it
            would add to the weights (its weight decay, taken as decoupled, left out).
        step: "base" or "subspace".
        subspace: Options of the latter.
        strict: Whether a trained parameter without a preconditioner is an error.
        cuts: For `split`.
        example_inputs: For `split`.
        seed: Of all random signs.
        **options: Of the structure, when it is given by name or rules.

    Raises:
        ValueError: An argument does not fit, with its name and the remedy.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        *,
        loss: Any,
        structure: Rules | Structure = "ekronecker",
        metric: Any = "fisher",
        recipe: Recipe | None = None,
        refresh_every: RefreshEvery = 100,
        spread: int = 1,
        graft: Graft = "layer",
        kl_limit: float = 1e-3,
        precondition: Precondition = "gradient",
        step: Literal["base", "subspace"] = "base",
        subspace: Subspace | None = None,
        strict: bool = False,
        cuts: Sequence[str] | None = None,
        example_inputs: Any = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if not isinstance(base, Optimizer) or isinstance(base, LLQR):
            raise ValueError(f"base is a {type(base).__name__}: give a torch optimizer.")
        for name, value, known in (
            ("graft", graft, ("layer", "kl", "none")),
            ("precondition", precondition, ("gradient", "update")),
            ("step", step, ("base", "subspace")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: choose one of {known}.")
        if spread < 1 or not kl_limit > 0:
            raise ValueError("need spread >= 1 and kl_limit > 0.")
        period_at(refresh_every, 0)
        self.model, self.base = model, base
        self._loss, self._metric = get_loss(loss), get_metric(metric)
        if isinstance(structure, Structure):
            if options:
                raise ValueError(f"{sorted(options)} are options of a structure given by name.")
            self.structure = structure
        else:
            self.structure = _named(model, structure, options)
        self.coverage = coverage(model, base, self.structure)
        if strict and (left := self.coverage.passed_through):
            raise ValueError(
                f"strict: '{left[0].name}' has no preconditioner ({left[0].reason}); give it a "
                "structure, or use strict=False."
            )
        self._parameters = {
            name: p for name, p in model.named_parameters() if name in self.structure.layout.names
        }
        if self.structure.device != next(iter(self._parameters.values())).device:
            raise ValueError("the structure is on another device than the model: make it again.")
        self._plain = isinstance(self.structure, Identity)
        self._layers = (
            []
            if self._plain and step == "base"
            else split(model, cuts=cuts, example_inputs=example_inputs)
        )
        self.generator = torch.Generator(device=self.structure.device).manual_seed(seed)
        self.refresher = Refresher(self.structure, recipe or Recipe(), self.generator)
        self._refresh_every, self._spread = refresh_every, spread
        self._mode = step
        self._wrapped = WrappedStep(
            *(self._parameters, base, self.structure, self._clock),
            graft=graft,
            kl_limit=kl_limit,
            precondition=precondition,
        )
        self._subspace = SubspaceStep(model, base, self.structure, self._loss, subspace)
        self.counts = Counts()
        self.timings = {"apply": 0.0, "base": 0.0, "refresh": 0.0, "subspace": 0.0}
        """Seconds spent in each phase (the host's clock: a GPU may lag behind)."""
        self._next_refresh, self._spread_done = 0, 0
        # What unpickling an Optimizer does: hooks and the profiled step, no groups of its own.
        self.__setstate__({"defaults": base.defaults})

    # ---- the base optimizer's, by reference

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's."""
        return self.base.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds it to the base optimizer; parameters that M has no place for pass through."""
        self.base.add_param_group(param_group)
        self.coverage = coverage(self.model, self.base, self.structure)

    # ---- learning M

    @property
    def refresh_due(self) -> bool:
        """Whether `refresh` should be called before this step; first at step 0."""
        if self._plain:
            return False
        return self._spread_done > 0 or self.counts.steps >= self._next_refresh

    @torch.no_grad()
    def refresh(
        self, inputs: Any, targets: Tensor | None = None, *, batches: Sequence[Batch] | None = None
    ) -> bool:
        """Learns M from the curvature on a batch; weights, gradients and the base do not change.

        Args:
            inputs: One batch, samples first; a tuple for several inputs.
            targets: Its targets.
            batches: Instead: several micro-batches (inputs, targets), one in memory at a time,
                which count alike. (Then `inputs` is None.)

        Returns:
            Whether M changed; `counts.reason` says why not.
        """
        given = [(inputs, targets)] if batches is None else list(batches)
        if not given or any(y is None for _, y in given):
            raise ValueError("give inputs and targets, or batches=[(inputs, targets), ...].")
        if self._plain:
            return False
        damping = self.refresher.recipe.damping
        with self._clock("refresh"):
            problems = (self._problem(x, y, damping) for x, y in given)
            return self._learn_from(problems, batches=None if batches is None else len(given))

    def _learn_from(self, problems: Iterable[LQRProblem], batches: int | None = None) -> bool:
        """One turn of a refresh, or all of it where the number of batches is given."""
        turns = self._spread if batches is None else batches
        shares = self.refresher.shares(turns)[0 if batches else self._spread_done :]
        made = self._learn(problems, shares)
        self._spread_done += 1
        if batches is not None or self._spread_done >= self._spread:
            self._spread_done = 0
            self.refresher.count += 1
            period = period_at(self._refresh_every, self._next_refresh)
            self._next_refresh = max(self._next_refresh, self.counts.steps - 1) + period
        return made

    def _learn(self, problems: Iterable[LQRProblem], shares: Sequence[float]) -> bool:
        """M from problems; what it was, bit for bit, where anything is not finite."""
        old, factors = self.structure.clone(), dict(self.refresher.factors)
        reason = ""
        try:
            held: list[LQRProblem] = []
            for problem, share in zip(problems, shares, strict=False):
                self.refresher.update(problem, share)
                held = [*held, problem] if self.refresher.recipe.learn != "closed_form" else []
            report = self.refresher.fit(held)
            if report is not None and not report.accepted:
                self.counts = replace(self.counts, kept=self.counts.kept + 1, reason=report.reason)
            if not all(bool(t.isfinite().all()) for t in self.structure.tensors.values()):
                reason = "the refresh: the curvature is NaN or infinite"
        except NotFiniteError as error:
            reason = f"the refresh: {error}"
        except torch.linalg.LinAlgError as error:
            reason = f"the refresh: {error}"
        except BaseException:
            self.structure.assign_(old)
            self.refresher.factors = factors
            raise
        if reason:
            self.structure.assign_(old)
            self.refresher.factors = factors
            self.counts = replace(self.counts, refused=self.counts.refused + 1, reason=reason)
            return False
        self.counts = replace(self.counts, refreshes=self.counts.refreshes + 1)
        return True

    def _problem(self, inputs: Any, targets: Any, damping: float) -> LQRProblem:
        return LQRProblem.from_network(
            self._layers,
            *(inputs, targets),
            loss=self._loss,
            metric=self._metric,
            damping=damping,
            check=self.counts.refreshes == 0,
        )

    # ---- stepping

    def step(self, closure: Any = None, targets: Tensor | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: As for any torch optimizer; it runs once. With step="subspace": the inputs.
            targets: With step="subspace" only: the targets.

        Returns:
            The closure's loss if there is one; with step="subspace" the loss before the step.
        """
        if self._mode == "subspace":
            if closure is None or targets is None:
                raise ValueError(
                    "step='subspace' takes the batch: optimizer.step(inputs, targets)."
                )
            return self._subspace_step(closure, targets)
        if targets is not None:
            raise ValueError("step(inputs, targets) needs LLQR(..., step='subspace').")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.counts = replace(self.counts, steps=self.counts.steps + 1)
        if self._plain:
            with self._clock("base"):
                self.base.step()
        elif loss is not None and not bool(torch.as_tensor(loss).isfinite().all()):
            self._skip("the loss is NaN or infinite")
        else:
            reason = self._wrapped()
            if reason:
                self._skip(reason)
        return loss

    def _subspace_step(self, inputs: Any, targets: Tensor) -> Tensor | None:
        self.counts = replace(self.counts, steps=self.counts.steps + 1)
        try:
            with self._clock("subspace"):
                problem = self._problem(inputs, targets, 0.0)
        except NotFiniteError as error:
            self._skip(str(error))
            return None
        loss = problem.origin.loss_value.clone()  # type: ignore[union-attr]
        if not bool(loss.isfinite()):
            self._skip("the loss is NaN or infinite")
            return loss
        if self._next_refresh < self.counts.steps or self._spread_done > 0:
            with self._clock("refresh"):
                self._learn_from([problem.with_damping(self.refresher.recipe.damping)])
        with self._clock("subspace"):
            taken, reason = self._subspace(problem, inputs, targets)
        if reason:
            self._skip(reason)
        elif not taken:
            self.counts = replace(self.counts, taken_back=self.counts.taken_back + 1)
        return loss

    # ---- bookkeeping

    def memory_usage(self) -> dict[str, int]:
        """Bytes held between steps: M, what refreshes and subspace steps remember, the base."""
        held = self._subspace.state
        kept = [*held.steps, *([] if held.mean is None else [held.mean])]
        base = [t for state in self.base.state.values() for t in _tensors(state)]
        return {
            "preconditioner": self.structure.memory_bytes,
            "factors": _bytes(self.refresher.factors.values()),
            "subspace": _bytes(kept),
            "base": _bytes(base),
        }

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state_dict as it is, and "llqr": plain tensors and numbers."""
        return {**self.base.state_dict(), "llqr": save(self)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores `state_dict`, bit for bit; statistics keep float32 under bfloat16 weights.

        Raises:
            ValueError: It is of other parameters, another structure or another base optimizer.
        """
        if "llqr" not in state_dict:
            raise ValueError("this is no state of an LLQR optimizer: load it into its `base`.")
        base = {key: value for key, value in state_dict.items() if key != "llqr"}
        load(self, state_dict["llqr"], base)

    def __repr__(self) -> str:
        """M and the base optimizer."""
        return f"LLQR(\nstructure: {self.structure.kind}, step: {self._mode}\n{self.base!r}\n)"

    def _skip(self, reason: str) -> None:
        self.counts = replace(self.counts, skipped=self.counts.skipped + 1, reason=reason)

    @contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[phase] += time.perf_counter() - start


def _named(model: nn.Module, rules: Rules, options: Mapping[str, Any]) -> Structure:
    """By name or rules; E-Kronecker within three times the weights unless told otherwise."""
    names = {rules} if isinstance(rules, str) else {name for _, name in rules}
    defaults = _DEFAULTS if names & {"ekron", "ekronecker"} else {}
    return build_structure(model, rules, **{**defaults, **options})


def _tensors(held: Any) -> list[Tensor]:
    if isinstance(held, Tensor):
        return [held]
    if isinstance(held, Mapping):
        return [t for value in held.values() for t in _tensors(value)]
    if isinstance(held, list | tuple):
        return [t for value in held for t in _tensors(value)]
    return []


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
