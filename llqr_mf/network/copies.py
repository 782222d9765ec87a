"""Copies of a module tree that share its tensors, so that running them leaves no mark on it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree with the same tensors."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        memo.update({id(value): value for value in held if isinstance(value, Tensor)})
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # a module may hold what cannot be copied: a lock, a file, a generator
        return _shallow(model, {})


def _shallow(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """New modules with the attributes of the old ones; containers one level deep are new too."""
    if isinstance(module, torch.jit.ScriptModule):
        return module
    if id(module) not in made:
        twin = made[id(module)] = type(module).__new__(type(module))
        for name, value in vars(module).items():
            plain = type(value).__name__ in ("dict", "list", "set", "OrderedDict")
            vars(twin)[name] = copy.copy(value) if plain else value
        vars(twin)["_modules"] = {
            name: None if child is None else _shallow(child, made)
            for name, child in module._modules.items()
        }
    return made[id(module)]
