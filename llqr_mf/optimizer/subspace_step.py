"""A subspace step on a model: the proposal, its taking, and its taking back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import FailedCallError
from ..losses import Loss
from ..preconditioners.base import Structure
from ..problem import LQRProblem
from .own_pass import OwnPass
from .subspace import Subspace, SubspaceState, accept, predicted_decrease, propose
from .weights import GroupTerms, LossAt


class SubspaceStep:
    """Minimises the LQR objective of a batch over a few directions and moves the weights.

    Args:
        model: Whose weights.
        base: Names the parameters, their weight decay and the schedule's factor.
        structure: M.
        loss: Which loss.
        options: None for the defaults.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        structure: Structure,
        loss: Loss,
        options: Subspace | None,
    ) -> None:
        self.model, self.base, self.structure, self.loss = model, base, structure, loss
        self.options = options or Subspace()
        self.state = SubspaceState.start(self.options)
        self._own_pass = OwnPass(model)

    def run(self, inputs: Any, make: Callable[[bool], LQRProblem]) -> LQRProblem:
        """The problem of a batch, whose layers are the model's, and the pass that training has.

        Args:
            inputs: The batch.
            make: Makes the problem; its argument says whether the layers are to be checked.
        """
        try:
            problem = make(False)
        except FailedCallError:  # of layers of another width, say
            problem = make(True)
        if not self._agrees(inputs, problem):
            self._own_pass.undo()
            problem = make(True)
            self._agrees(inputs, problem)
        return problem

    def undo_pass(self) -> None:
        """Puts back what the model's own pass left behind: there is no step."""
        self._own_pass.undo()

    def _agrees(self, inputs: Any, problem: LQRProblem) -> bool:
        assert problem.origin is not None
        return self._own_pass(inputs, problem.origin.outputs)

    @torch.no_grad()
    def __call__(self, problem: LQRProblem, inputs: Any, targets: Tensor) -> tuple[bool, str]:
        """One step; whether it was kept, and why it was skipped if it was."""
        state, options = self.state, self.options
        origin = problem.origin
        assert origin is not None
        stateful = origin.layers[0].program.stateful
        at = LossAt(self.model, self.loss, inputs, targets, problem.layout, stateful=stateful)
        weights = at.weights()
        terms = GroupTerms.of(at.named, self.base.param_groups, problem.layout)
        gradient = terms.gradient(problem.gradient.to(self.structure.dtype), weights)

        def before() -> Tensor:
            old = (weights - state.steps[0]).to(weights)
            return terms.gradient(at.gradient(old).to(gradient), old)

        proposal = propose(
            *(problem, self.structure, state, options),
            gradient=gradient,
            terms=terms,
            before=before,
        )
        if proposal is None or not bool((step := terms.scaled(proposal.step)).isfinite().all()):
            state.forget()
            self._own_pass.undo()
            return False, "the subspace step is NaN or infinite"
        predicted = None
        if state.count % options.check_every == 0:
            predicted = proposal.decrease
            if terms.factor is not None:
                predicted = predicted_decrease(problem, step, gradient, terms)
        # The problem shares the weights' memory: nothing is asked of it from here on.
        at.write(weights + step)
        measured = None
        if predicted is not None:
            fall = float(origin.loss_value) - at.value()
            measured = fall - terms.penalty_change(weights, step), predicted
        # What rounding has left of the step is what the weights have moved by.
        taken = at.weights().to(step) - weights
        kept = accept(state, options, taken, proposal.mean, measured)
        if not kept:
            at.write(weights)
        return kept, ""
