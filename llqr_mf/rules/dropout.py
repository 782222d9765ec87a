"""Dropout: one mask, drawn with the forward pass, the same in every product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .arithmetic import AffineNode
from .base import Call, Node, register


class DropoutNode(AffineNode):
    """y = mask x."""

    couples_batch = False

    def __init__(self, call: Call) -> None:
        (slot,) = call.slots
        # Ones draw the same mask as the input would, in the same order.
        mask: Tensor = call.with_values([torch.ones_like(slot.value)])
        fixed = Call(torch.mul, (slot, mask), {}, call.owner, call.second_order)
        super().__init__(fixed, [(slot, mask)])


@register(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
def dropout(call: Call) -> Node | None:
    """Rule of `F.dropout(input, p, training)` and its channel-wise forms."""
    if not call.argument(2, "training", True):
        return AffineNode(call, [(call.slots[0], 1)])
    return DropoutNode(call)
