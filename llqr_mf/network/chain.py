"""Chains that `torch.fx` is told of: lists of callables, and modules that only hooks can see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from .copies import shared_copy
from .modes import curvature_pass

LayerSpec = nn.Module | Callable[..., Any] | tuple[Callable[..., Any], Mapping[str, Tensor]]


class Chain(nn.Sequential):
    """The items of a user's list, one after another; the first may take several inputs."""

    @classmethod
    def of(cls, items: Iterable[LayerSpec]) -> Chain:
        """The chain of modules, functions f(x) and pairs (f, parameters).

        Raises:
            ValueError: The list is empty or an item is none of these.
        """
        modules = [_module(item, f"layer {i}") for i, item in enumerate(items)]
        if not modules:
            raise ValueError("the list of layers is empty: give at least one module or callable.")
        return cls(*modules)

    def forward(self, *args: Any) -> Any:
        """The last item's output."""
        return self.run(*args)

    def run(self, *args: Any, sizes: list[int] | None = None) -> Any:
        """The same; while it is traced, `sizes` gets the graph's size after every item."""
        traced = [leaf.node.graph for leaf in tree_leaves(args) if isinstance(leaf, fx.Proxy)]
        if sizes is not None:
            sizes.clear()
        for item in self:
            args = (item(*args),)
            if sizes is not None:
                sizes.append(len(traced[0].nodes))
        return args[0]


class _FunctionLayer(nn.Module):
    """A user's function f(x) or f(parameters, x) as a module."""

    def __init__(self, function: Callable[..., Any], parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._function, self._names = function, list(parameters)
        for name, tensor in parameters.items():
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor.detach())
            self.register_parameter(name, tensor)

    def forward(self, *args: Any) -> Any:
        if not self._names:
            return self._function(*args)
        return self._function({name: getattr(self, name) for name in self._names}, *args)


def _module(item: Any, place: str) -> nn.Module:
    if isinstance(item, nn.Module):
        return item
    function: Any = item
    parameters: Any = {}
    if isinstance(item, tuple) and len(item) == 2:
        function, parameters = item
    if not callable(function) or not isinstance(parameters, Mapping):
        raise ValueError(
            f"{place} is a {type(item).__name__}: give a module, a function f(x), or a pair "
            "(f, parameters) of a function f(parameters, x) and a dictionary of tensors."
        )
    try:
        return _FunctionLayer(function, parameters)
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{place} has parameters that cannot be registered ({error}): give a dictionary of "
            "floating-point tensors, its keys without dots and unlike the attributes of a module."
        ) from error


def run_chain(names: list[str]) -> Callable[..., Any]:
    """A function that calls these modules one after another."""

    def run(twin: nn.Module, x: Any) -> Any:
        for name in names:
            x = twin.get_submodule(name)(x)
        return x

    return run


def chain_by_hooks(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> list[str] | None:
    """Names of the modules that the model calls one after another, if that is all it does."""
    inputs = example if isinstance(example, tuple) else (example,)
    if len(inputs) != 1:
        return None
    twin = shared_copy(model)
    calls: list[tuple[str, bool, Any]] = []
    depth = 0
    # One tensor in, the one that the module before gave out.
    current: Any = inputs[0]

    def before(module: nn.Module, args: Any) -> None:
        nonlocal depth
        depth += 1

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal depth, current
            depth -= 1
            if depth == 0:
                calls.append((name, len(args) == 1 and args[0] is current and not kwargs, output))
                current = output

        return hook

    for name, module in twin.named_modules():
        if name:
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after(name), with_kwargs=True)
    buffers = {name: b.clone() for name, b in twin.named_buffers()}
    with torch.enable_grad(), curvature_pass(inputs[0].device):
        output = torch.func.functional_call(twin, buffers, inputs)
    in_a_row = all(follows for _, follows, _ in calls)
    return [name for name, _, _ in calls] if calls and in_a_row and current is output else None
