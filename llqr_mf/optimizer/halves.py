"""One batch in two, for a fit that needs one to fit and one to hold out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..network.checks import close, copies

Batch: TypeAlias = tuple[Any, Tensor]

_GIVE = "give the micro-batches yourself: refresh(None, batches=[(x1, y1), (x2, y2)])."


def at_least_two(batches: Sequence[Batch], model: nn.Module | None = None) -> Sequence[Batch]:
    """The batches; a single one in two halves, one to fit and one to hold out.

    Args:
        batches: One or more.
        model: Tells which of several inputs carry the samples: those of which the halves give the
            halves of the outputs. Without it they are all that are as long as the targets.

    Raises:
        ValueError: It has one sample only, or cannot be cut.
    """
    if len(batches) > 1:
        return batches
    inputs, targets = batches[0]
    samples = len(targets)
    if samples < 2:
        raise ValueError(
            "a fit holds out half of its batch: give two samples or more, or use "
            "Recipe(learn='closed_form')."
        )
    leaves, tree = tree_flatten(inputs)
    long = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.shape[:1] == (samples,)]
    if not long:
        raise ValueError(
            f"a fit holds out half of its batch, and no input has the {samples} samples of the "
            f"targets first: {_GIVE}"
        )

    def part(rows: slice, cut: Sequence[int]) -> Any:
        return tree_unflatten([x[rows] if i in cut else x for i, x in enumerate(leaves)], tree)

    sides = slice(samples // 2), slice(samples // 2, None)
    cut: Sequence[int] = long
    if model is not None and sum(isinstance(x, Tensor) for x in leaves) > 1:
        found = _that_carry(model, inputs, long, part, sides)
        if found is None:
            raise ValueError(
                "a fit holds out half of its batch, and no choice of inputs to cut in half gives "
                f"the halves of the outputs: {_GIVE}"
            )
        cut = found
    return [(part(rows, cut), targets[rows]) for rows in sides]


def _that_carry(
    model: nn.Module,
    inputs: Any,
    long: Sequence[int],
    part: Any,
    sides: tuple[slice, slice],
) -> Sequence[int] | None:
    """Which inputs, most of them first; None if no choice does. Modes do as in evaluation."""
    with _evaluating(model):
        whole = _run(model, inputs)
        if not isinstance(whole, Tensor) or not bool(whole.isfinite().all()):
            return long  # the problem made of it says what is wrong
        for count in range(len(long), 0, -1):
            for chosen in combinations(long, count):
                try:
                    halves = [_run(model, part(rows, chosen)) for rows in sides]
                except Exception:  # whatever a model raises for shapes that do not go together
                    continue
                if all(isinstance(half, Tensor) and half.ndim for half in halves) and close(
                    torch.cat(halves), whole
                ):
                    return chosen
    return None


def _run(model: nn.Module, inputs: Any) -> Any:
    """The outputs; the batch, buffers and gradients are not written to."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    batch = inputs if isinstance(inputs, tuple) else (inputs,)
    # A model may take gradients inside.
    with torch.enable_grad():
        made = torch.func.functional_call(model, buffers, copies(batch))
    return made.detach() if isinstance(made, Tensor) else made


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no batch statistics, by which halves would differ; random state put back."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    for module, _ in modes:
        module.training = False
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, training in modes:
            module.training = training
