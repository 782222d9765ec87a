"""`LLQR`: any torch optimizer, preconditioned by what the LQR objective teaches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.optim import Optimizer

from ..errors import FactorizationError, NotFiniteError
from ..fitting import FitReport
from ..network.kept_layers import KeptLayers
from ..preconditioners.base import Structure
from ..preconditioners.direct_sum import Rules
from ..preconditioners.identity import Identity
from ..problem import LQRProblem
from . import hooks
from .arguments import ASK, batches_of, check_alone, check_closure, check_options
from .bookkeeping import Counts, Timings, bytes_of, tensors_in
from .by_parameter import SeenState, asked_by_torch, only_asks_for_state
from .checkpoint import KEY, load, save, save_by_parameter
from .coverage import coverage
from .curvature import check_learnable, loss_and_metric
from .graft import Graft
from .halves import Batch
from .made_for import made_for
from .recipe import Recipe
from .refresh import Refresher
from .running_mean import RefusedError
from .schedule import RefreshEvery, Schedule, annealed
from .subspace import Subspace
from .subspace_step import SubspaceStep
from .wrapped import Precondition, WrappedStep

_REFUSED = (NotFiniteError, RefusedError, FactorizationError, LinAlgError)
"""What a refresh survives: M stays as it was."""

_PERIOD = annealed(first=200, last=1000, steps=10_000)


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
    a scheduler's factor lr / initial_lr multiplies the step, and weight decay enters the model. A
    model that has running statistics in train mode, or draws random numbers, also runs forward once
    as it does in training, so that these move as they would.

    A step or refresh that meets NaN or infinity, in the batch too, changes nothing but `counts`.

    Args:
        model: The model that is trained.
        base: An optimizer over its parameters.
        loss: What the backward passes differentiate, as in `LQRProblem.from_network`: a mean.
        structure: M: a name ("ekronecker", "kronecker", "diagonal", "scalar", "identity", ...),
            pairs (pattern, name or None) for the parameters' names, or a `Structure` for the model.
        metric: Whose curvature M follows, as in `LQRProblem.from_network`. None: "fisher", and
            "gauss_newton" where the loss is a function, which names no output distribution.
        recipe: How M is learned at a refresh.
        refresh_every: Steps between refreshes, a number or a function of the step (`annealed`,
            `burn_in`). By default 200 at first, and 1000 from step 10,000 on.
        spread: Over how many consecutive steps a refresh is spread, one batch at each.
        graft: "layer": every layer's preconditioned gradient gets the gradient's norm, so the base
            learning rate carries over. "kl": one factor for all, so that sum lr^2 g'Mg <= kl_limit.
            "none": as it comes.
        kl_limit: For graft="kl".
        precondition: "gradient": M acts on what the base optimizer reads; "update": on what it
            would add to the weights (its weight decay, taken as decoupled, left out). Should M
            times that overflow, the weights stay, and the base optimizer remembers its own step.
        step: "base" or "subspace".
        subspace: Options of the latter.
        strict: Whether a trained parameter without a preconditioner is an error.
        cuts: For `split`.
        example_inputs: For `split`.
        seed: Of all random signs.
        process_group: None says that other processes of `torch.distributed`, if there are any,
            train models of their own. Without it LLQR raises where there are: it does not average
            over replicas yet.
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
        metric: Any = None,
        recipe: Recipe | None = None,
        refresh_every: RefreshEvery = _PERIOD,
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
        process_group: Any = ASK,
        **options: Any,
    ) -> None:
        check_options(
            *(model, base),
            process_group=process_group,
            recipe=recipe,
            subspace=subspace,
            refresh_every=refresh_every,
            spread=spread,
            kl_limit=kl_limit,
            seed=seed,
            graft=graft,
            precondition=precondition,
            step=step,
        )
        self.model, self.base, self._process_group = model, base, process_group
        self._loss, self._metric = loss_and_metric(loss, metric)
        self.structure = made_for(model, structure, options)
        self.coverage = coverage(model, base, self.structure)
        self.coverage.check(strict)
        self.generator = torch.Generator(device=self.structure.device).manual_seed(seed)
        self._plain = isinstance(self.structure, Identity)
        if not self._plain:
            check_learnable(self._metric, self.structure, recipe or Recipe())
        self._refresher = Refresher(self.structure, recipe or Recipe(), self.generator, model)
        self._schedule = Schedule(refresh_every, spread)
        self._mode = step
        if not self._plain or step == "subspace":
            self._kept = KeptLayers(model, cuts=cuts, example_inputs=example_inputs)
        self.counts = Counts()
        self.timings = Timings("apply", "base", "refresh", "subspace")
        """Seconds by phase, by the host's clock: a GPU may lag behind."""
        self._wrapped = WrappedStep(
            *(dict(model.named_parameters()), base, self.structure, self.timings),
            graft=graft,
            kl_limit=kl_limit,
            precondition=precondition,
        )
        self._subspace = SubspaceStep(model, base, self.structure, self._loss, subspace)
        # What unpickling an Optimizer does: hooks and the profiled step, no groups of its own.
        super().__setstate__({"defaults": dict(base.defaults)})

    # ---- the base optimizer's, by reference

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's."""
        return SeenState(self, KEY) if asked_by_torch() else self.base.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds it to the base optimizer; parameters that M has no place for pass through."""
        self.base.add_param_group(param_group)
        self.coverage = coverage(self.model, self.base, self.structure)

    # ---- learning M

    @property
    def refresh_due(self) -> bool:
        """Whether `refresh` should be called before this step; first at step 0.

        With step="subspace" the step calls it itself.
        """
        return not self._plain and self.counts.steps >= self._schedule.due

    @property
    def last_fit(self) -> FitReport | None:
        """What the last fit did, where the recipe has one."""
        return self._refresher.last_fit

    @torch.no_grad()
    def refresh(
        self, inputs: Any, targets: Tensor | None = None, *, batches: Iterable[Batch] | None = None
    ) -> bool:
        """Learns M from the curvature on a batch; weights, gradients and the base do not change.

        With `spread`, this is one of that many turns of a refresh. A fit holds out the last of
        several batches, or half of one.

        Args:
            inputs: One batch, samples first; a tuple for several inputs.
            targets: Its targets.
            batches: Instead: several micro-batches (inputs, targets), which count alike; any
                iterable, read to its end. One is linearised at a time, all of them where the
                recipe has a fit. (Then `inputs` is None.)

        Returns:
            Whether M changed; `counts.reason` says why not.

        Raises:
            ValueError: Something about the batch or the model is wrong; nothing has changed.
            RuntimeError: There are other processes (see `process_group`).
        """
        check_alone(self._process_group)
        given = batches_of(inputs, targets, batches)
        return not self._plain and self._learn(given)

    def _learn(self, batches: Sequence[Batch], ready: LQRProblem | None = None) -> bool:
        """One turn of a refresh; M is what it was, bit for bit, where anything is not finite."""
        recipe, step = self._refresher.recipe, self.counts.steps
        period = self._schedule.period(step)
        with self.timings.of("refresh"), self._full_precision():
            try:
                # Attributes do not change between the batches of one call.
                checks = chain([True], repeat(False))
                report = self._refresher.learn(
                    batches,
                    lambda x, y: self._problem(x, y, recipe.damping, check=next(checks)),
                    self._schedule.share(recipe.ema),
                    ready,
                )
            except _REFUSED as error:
                self._schedule.retry(step)
                self._count(refused=1, reason=f"the refresh: {error}")
                return False
        self._schedule.advance(step, period)
        self._count(refreshes=1)
        if report is not None and not report.accepted:
            self._count(kept=1, reason=f"the fit: {report.reason}")
        return True

    def _problem(self, inputs: Any, targets: Any, damping: float, *, check: bool) -> LQRProblem:
        """The problem of a batch; `check` sees that the layers still are the model's."""
        problem = self._kept.use(
            lambda layers: LQRProblem.from_network(
                *(layers, inputs, targets),
                loss=self._loss,
                metric=self._metric,
                damping=damping,
                check=check,
            )
        )
        M = self.structure
        wide = torch.promote_types(problem.dtype, M.dtype)
        if (problem.layout, problem.device, wide) != (M.layout, M.device, M.dtype):
            raise ValueError(
                "the model's trainable parameters, their dtype or their device changed since the "
                "optimizer was made: make it again."
            )
        return problem

    # ---- stepping

    def step(self, closure: Any = None, targets: Tensor | None = None) -> Any:
        """One step.

        Args:
            closure: As for any torch optimizer; it runs once. With step="subspace": the inputs.
            targets: With step="subspace" only: the targets.

        Returns:
            The closure's loss if there is one; with step="subspace" the loss before the step, or
            None where the model overflows.

        Raises:
            ValueError: The arguments are not those of this kind of step, or something about the
                batch is wrong; nothing has changed.
            RuntimeError: There are other processes (see `process_group`).
        """
        if closure is None and targets is None and only_asks_for_state(self.base):
            if self._mode == "base":
                hooks.step_of_base(self.base)
            return None
        check_alone(self._process_group)
        # What the base's own step would have told schedulers that were made for the base.
        self.base._opt_called = True  # type: ignore[attr-defined]
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
            check_closure(closure)
            with torch.enable_grad():
                loss = closure()
        if loss is not None and not bool(torch.as_tensor(loss).isfinite().all()):
            reason = "the loss is NaN or infinite"
        else:
            with self._full_precision():
                reason = self._wrapped()
        self._count(steps=1, skipped=int(bool(reason)), reason=reason)
        return loss

    @torch.no_grad()
    def _subspace_step(self, inputs: Any, targets: Tensor) -> Tensor | None:
        loss, reason, taken = None, "", False
        try:
            with self.timings.of("subspace"), self._full_precision():
                problem = self._subspace.run(
                    inputs, lambda check: self._problem(inputs, targets, 0.0, check=check)
                )
        except NotFiniteError as error:
            reason = str(error)
        else:
            assert problem.origin is not None
            loss = problem.origin.loss_value.clone()
            if not bool(loss.isfinite()):
                reason = "the loss is NaN or infinite"
                self._subspace.undo_pass()
        if not reason:
            if self.refresh_due:
                damping = self._refresher.recipe.damping
                self._learn([(inputs, targets)], ready=problem.with_damping(damping))
            with self.timings.of("subspace"), self._full_precision():
                taken, reason = self._subspace(problem, inputs, targets)
        back = not reason and not taken
        self._count(steps=1, skipped=int(bool(reason)), taken_back=int(back), reason=reason)
        return loss

    # ---- bookkeeping

    def memory_usage(self) -> dict[str, int]:
        """Bytes held between steps: M, what refreshes and subspace steps remember, the base."""
        held = self._subspace.state
        return {
            "preconditioner": self.structure.memory_bytes,
            "factors": bytes_of(self._refresher.mean.factors.values()),
            "subspace": bytes_of(tensors_in([held.steps, held.mean])),
            "base": bytes_of(tensors_in(list(self.base.state.values()))),
        }

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state_dict as it is, and "llqr": plain tensors and numbers.

        For `torch.distributed.checkpoint.state_dict` that is in the first parameter's state.
        """
        hooks.before_state_dict(self)
        if asked_by_torch():
            made = save_by_parameter(self)
        else:
            made = {**self.base.state_dict(), KEY: save(self)}
        return hooks.after_state_dict(self, made)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores `state_dict`, bit for bit; statistics keep float32 under bfloat16 weights.

        Raises:
            ValueError: It is of other parameters, another structure or another base optimizer, or
                a tensor, which is named, would make M wrong; nothing has been changed then.
        """
        load(self, hooks.before_load(self, state_dict))
        hooks.after_load(self)

    def __getstate__(self) -> NoReturn:
        """Refused: a copy would act on another model's parameters, or on this one's twice.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "an LLQR optimizer cannot be copied or pickled: it belongs to its model. Make another "
            "for the copied model and load this one's state_dict()."
        )

    def __repr__(self) -> str:
        """M, its metric and the base optimizer."""
        learned = f"structure: {self.structure.kind}, metric: {self._metric!r}"
        return f"LLQR(\n{learned}, step: {self._mode}\n{self.base!r}\n)"

    def _full_precision(self) -> torch.autocast:
        """The parameters' precision, in whatever autocast the caller is."""
        return torch.autocast(self.structure.device.type, enabled=False)

    def _count(self, reason: str = "", **added: int) -> None:
        """Adds to `counts`."""
        sums = {name: getattr(self.counts, name) + n for name, n in added.items()}
        self.counts = replace(self.counts, reason=reason or self.counts.reason, **sums)
