"""A step added to the weights in place, formed or not."""

from __future__ import annotations

import torch
from torch import Tensor

from .output_sweep import add_controls
from .problem import LQRProblem
from .solution import Solution


@torch.no_grad()
def apply_step_(problem: LQRProblem, solution: Solution, *, scale: float = 1.0) -> None:
    """Adds scale * step to the parameters of the problem's network, in place.

    A step that was left unformed is never formed: its costate is pulled back, and every layer's
    share, -scale R^{-1} B_t' p_{t+1}, goes straight into the weights. That is one GEMM per Linear
    layer, and memory for the activations' cotangents alone. The problem is that of the old weights
    and refuses further products afterwards.

    Args:
        problem: From a network.
        solution: What `solve` returned for it.
        scale: Times the step.

    Raises:
        ValueError: The problem is not a network's, or the step is not finite. Nothing has been
            changed by then.
        RuntimeError: The step is unformed and the weights have changed since the problem was made.
    """
    if problem.origin is None:
        raise ValueError("apply_step_ needs a problem made from a network: use solution.step.")
    model = problem.origin.layers[0].program.model
    targets = dict(model.named_parameters())
    if solution.formed is not None:
        _check(solution.formed)
        for name, part in problem.unflatten(solution.formed).items():
            targets[name].add_(part, alpha=scale)
        return
    assert solution.costate is not None and solution.damping is not None
    problem.system.check()
    add_controls(
        problem,
        solution.costate.unsqueeze(0),
        [targets[name] for name in problem.names],
        [-scale / value for value in solution.damping],
    )


def _check(tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError("the step has entries that are NaN or infinite: it was not applied.")
