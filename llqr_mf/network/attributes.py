"""What a model's own code may branch on, to see when it changes where no output does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

PARAMETERS = "the names of the parameters"
"""The key of what is no attribute."""

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_OWN = frozenset(vars(nn.Module()))
_DEEP = 3
"""How far into dictionaries and objects a configuration is read."""


def read_attributes(model: nn.Module) -> dict[str, Any]:
    """Numbers, flags and texts of the model's own modules and configurations, by their path."""
    held: dict[str, Any] = {
        PARAMETERS: [name for name, _ in model.named_parameters(remove_duplicate=False)]
    }
    seen: set[int] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        hooks = len(module._backward_hooks) + len(module._backward_pre_hooks)
        if hooks:
            held[f"{prefix}backward hooks"] = hooks
        if type(module).__module__.startswith("torch."):
            continue
        for cls in reversed(type(module).__mro__):
            if not cls.__module__.startswith(("torch.", "builtins")) and id(cls) not in seen:
                seen.add(id(cls))
                held.update(_leaves(vars(cls).items(), prefix, seen))
        own = ((name, value) for name, value in vars(module).items() if name not in _OWN)
        held.update(_leaves(own, prefix, seen))
    return held


def _leaves(
    items: Iterable[tuple[Any, Any]], prefix: str, seen: set[int], depth: int = 0
) -> Iterator[tuple[str, Any]]:
    for name, value in items:
        key = f"{prefix}{name}"
        if isinstance(value, _PLAIN):
            if not key.rpartition(".")[2].startswith("__"):
                yield key, value if value == value else "nan"
        elif isinstance(value, tuple | list) and len(value) <= 64:
            if all(isinstance(item, _PLAIN) for item in value):
                yield key, tuple(value)
        elif isinstance(value, Tensor | nn.Module | type) or callable(value) or depth == _DEEP:
            continue
        elif id(value) not in seen:
            inner: Any = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
            if len(inner) <= 256:
                seen.add(id(value))
                yield from _leaves(list(inner.items()), f"{key}.", seen, depth + 1)


def is_switch(value: Any) -> bool:
    """Whether a value chooses between ways, and is no counter or measurement."""
    return isinstance(value, bool | str | None)


def same_calls(a: fx.Graph, b: fx.Graph) -> bool:
    """Whether two graphs make the same calls on the same values."""
    return len(a.nodes) == len(b.nodes) and all(
        _told(x) == _told(y) for x, y in zip(a.nodes, b.nodes, strict=True)
    )


def _told(node: fx.Node) -> tuple[Any, ...]:
    target: Any = node.target
    if not isinstance(target, str):
        target = getattr(target, "__module__", ""), getattr(target, "__qualname__", str(target))
    # Addresses are of objects that are made anew in every trace.
    args = re.sub("0x[0-9a-f]+", "", f"{node.args}{node.kwargs}")
    return node.op, target, args, node.meta.get("owner"), node.meta.get("constant")
