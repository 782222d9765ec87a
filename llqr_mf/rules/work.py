"""What a pass through an autograd graph takes, by the shapes that its nodes tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .base import Work

NODE = 0.25
"""Time of a node of the graph, in traced calls."""


def work_of(outputs: Sequence[Tensor]) -> Work:
    """Work of a column that is pulled back from the outputs; nothing is run.

    A product of matrices has two of its size in its backward, one for each factor: its flops are
    counted once, like those of a rule, which has as many for each input.
    """
    flops, elements, seen = 0.0, 0.0, set[Any]()
    waiting: list[Any] = [y.grad_fn for y in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
        sizes = [math.prod(made.shape) for made in getattr(node, "_input_metadata", ())]
        elements += sum(sizes)
        flops += 2.0 * (sizes[0] if sizes else 0) * _inner(node)
    return Work(flops, NODE * len(seen), elements)


def _inner(node: Any) -> float:
    """The length of the sums that made each number, 0 where it was no product of matrices."""
    name = node.name()
    try:
        if name.startswith("AddmmBackward"):
            return float(node._saved_mat2_sym_sizes[0])
        if name.startswith("MmBackward"):
            return float(node._saved_mat2_sym_sizes[0])
        if name.startswith("BmmBackward"):
            return float(node._saved_mat2.shape[1])
        if name.startswith("ConvolutionBackward"):
            return float(node._saved_weight[0].numel())
    except (AttributeError, RuntimeError):  # a release of torch with other names, or let go
        pass
    return 0.0
