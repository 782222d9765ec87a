"""Whether a network can be predicted with: unchanged, not random, one sample at a time."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..network.tracing import Program
from ..problem import LQRProblem

_DROPOUTS = {
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
    *(F.alpha_dropout, F.feature_alpha_dropout),
}
_RANDOM = {
    *(torch.bernoulli, torch.normal, torch.poisson, torch.rand, torch.randn, torch.rand_like),
    *(torch.randn_like, torch.randint_like, F.gumbel_softmax, "bernoulli", "bernoulli_", "normal_"),
}

_REMEDY = (
    "call model.eval(), split it again and make a new problem (a tangent kernel does so itself)"
)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def check_current(problem: LQRProblem) -> None:
    """Raises if the weights or the batch of a problem are not what was linearised.

    Sees a replaced `.data` too, as a posterior puts old and new linearisations together.

    Raises:
        RuntimeError: With the name of what changed.
    """
    for stage in problem.system.stages:
        snapshot = getattr(stage, "snapshot", None)
        if snapshot is not None:
            snapshot.check(look="all")


def check_deterministic(program: Program) -> None:
    """Raises if the network's outputs are random or depend on the other samples of a batch.

    Dropout would give another network for the data than for the predictions, and a BatchNorm of the
    batch's own statistics another one for every choice of samples.

    Raises:
        ValueError: With the call, and the remedy.
    """
    for node in program.graph.nodes:
        owner = node.meta.get("owner") or "the model"
        found = _offence(node) if node.op != "call_module" else _module_offence(program, node)
        if found == "random":
            raise ValueError(
                f"'{owner}' draws random numbers (dropout in train mode?), so that every "
                f"prediction would be of another network: {_REMEDY}."
            )
        if found == "batch":
            raise ValueError(
                f"'{owner}' takes its statistics from the batch, so that a prediction would depend "
                f"on the samples beside it: {_REMEDY}; a BatchNorm without running "
                "statistics has no such mode."
            )


def _offence(node: fx.Node) -> str | None:
    target = node.target
    if target in _RANDOM:
        return "random"
    if target in _DROPOUTS:
        drops = _argument(node, "p") != 0 and _argument(node, "training")
        return "random" if drops else None
    if target is F.rrelu and _argument(node, "training"):
        return "random"
    if target is F.scaled_dot_product_attention:
        p = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0)
        return "random" if p != 0 else None
    if target is F.batch_norm and _argument(node, "training"):
        return "batch"
    if target is torch.batch_norm and (len(node.args) < 6 or node.args[5]):
        return "batch"
    return None


def _module_offence(program: Program, node: fx.Node) -> str | None:
    """Of a module that is one call, by the mode it was traced in."""
    path = str(node.target)
    for name, module in program.module_now(path).named_modules(prefix=path):
        trains = program.modes.get(name, module.training)
        rate: Any = getattr(module, "dropout", 0)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rate = module.p
        if trains and isinstance(rate, int | float) and rate > 0:
            return "random"
        if trains and isinstance(module, nn.RReLU):
            return "random"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            trains or module.running_mean is None
        ):
            return "batch"
    return None


def _argument(node: fx.Node, name: str) -> Any:
    """The value of an argument, which is a node where it is computed."""
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    bound.apply_defaults()
    return bound.arguments[name]
