"""Layer rules: how a call is linearised. Adding one is adding one file here.

A rule is a function of a `Call` that returns a `Node`, registered for the functions it knows.
Whatever has no rule goes through `generic`.
"""

from torch import Tensor

# Importing a rule's file registers it.
from . import (  # noqa: F401
    arithmetic,
    conv,
    dropout,
    elementwise,
    embedding,
    linear,
    norms,
    structural,
)
from .base import RULES, Call, Node, Slot, plain
from .generic import GenericNode, is_active_leaf

__all__ = ["RULES", "Call", "GenericNode", "Node", "Slot", "is_active_leaf", "linearize_call"]


def linearize_call(call: Call) -> Node:
    """The node of a call: by its own rule if there is one, else by autograd."""
    # The rules' transposes are those of real maps.
    rule = None if any(map(_is_complex, call.leaves)) else RULES.get(call.function)
    node = None if rule is None else rule(call)
    return GenericNode(call) if node is None else node


def _is_complex(leaf: object) -> bool:
    value = plain(leaf)
    return isinstance(value, complex) or (isinstance(value, Tensor) and value.is_complex())
