"""From a module to the list of calls it makes, by `torch.fx`."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .lowerings import LOWERINGS, TRACE_FORWARD

_INERT_METHODS = {"size", "dim", "numel", "ndimension", "is_floating_point", "element_size"}

_OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


@dataclass(frozen=True)
class Program:
    """A model's calls, in order.

    Args:
        graph: The traced graph; every node's `meta["owner"]` is the path of the module it is in.
        tensors: Parameters, buffers and constants, by the name the graph uses.
        modules: Modules that are one call each, by path.
        model: The user's model (None for a list of callables).
        modes: Train or evaluation mode of every module when it was traced.
        whole: Modules that had to stay whole, with the reason.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    modules: dict[str, nn.Module]
    model: nn.Module
    modes: dict[str, bool]
    whole: dict[str, str]

    def changed_mode(self) -> str | None:
        """The first module whose train or evaluation mode is no longer the traced one."""
        for name, module in self.model.named_modules():
            if self.modes.get(name, module.training) != module.training:
                return name or "the model"
        return None


class _Tracer(fx.Tracer):
    """Records calls with the module they are in, and which module a failure was in."""

    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module, whole: dict[str, str]) -> None:
        super().__init__()
        self.whole = whole
        self.paths = {id(module): name for name, module in model.named_modules()}
        self.names = {id(p): n for n, p in model.named_parameters()}
        self.names |= {id(b): n for n, b in model.named_buffers()}
        self.tensors: dict[str, Tensor] = {}
        self.modules: dict[str, nn.Module] = {}
        self.stack: list[str] = [""]
        self.failed: tuple[str, str] | None = None

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        path = self.paths.setdefault(id(m), f"{type(m).__name__}@{len(self.paths)}")
        self.stack.append(path)
        try:
            if path in self.whole or not _is_open(m):
                self.modules[path] = m
                return self.create_proxy("call_module", path, args, kwargs)
            lowering = None if _has_hooks(m) else LOWERINGS.get(type(m))
            return forward(*args, **kwargs) if lowering is None else lowering(m, *args, **kwargs)
        except Exception as error:
            if self.failed is None:
                self.failed = (path, f"{type(error).__name__}: {error}")
            raise
        finally:
            self.stack.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["owner"] = self.stack[-1]
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if not isinstance(attr_val, Tensor):
            return attr_val
        name = self._register(attr_val)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self.create_node("get_attr", self._register(a), (), {})
        return super().create_arg(a)

    def _register(self, tensor: Tensor) -> str:
        name = self.names.setdefault(id(tensor), f"_constant{len(self.names)}")
        self.tensors[name] = tensor
        return name


def trace(model: nn.Module, run: Callable[..., Any], inputs: int) -> Program:
    """The calls that `run`, a function of `inputs` tensors over parts of `model`, makes.

    A module whose code cannot be traced becomes one call, and tracing starts again, until the
    rest can be; in the worst case the whole model is one call. The model itself is not run: a
    copy that shares its tensors is, with symbols for inputs.

    Args:
        model: The user's model.
        run: Called with a copy of the model and the inputs' symbols.
        inputs: How many inputs there are.
    """
    twin = shared_copy(model)
    whole: dict[str, str] = {}
    while True:
        tracer = _Tracer(twin, whole)
        try:
            graph = tracer.trace(_with_arity(lambda *args: run(twin, *args), inputs))
        except Exception as error:
            if tracer.failed is None:
                raise
            path, reason = tracer.failed
            if path in whole:
                raise ValueError(
                    f"'{path or type(model).__name__}' cannot be traced even as one call: {reason}"
                ) from error
            whole[path] = reason
            continue
        make_out_of_place(graph)
        return Program(
            graph=graph,
            tensors=tracer.tensors,
            modules=tracer.modules,
            model=model,
            modes={name: module.training for name, module in model.named_modules()},
            whole=whole,
        )


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree with the same tensors, so that tracing leaves no mark on it."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    memo |= {id(b): b for b in model.buffers()}
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # a module may hold what cannot be copied: a lock, a file, a generator
        return model


def required_inputs(model: nn.Module) -> int:
    """How many positional inputs the model's forward asks for."""
    parameters = inspect.signature(model.forward).parameters.values()
    required = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    return max(1, len(required))


def make_out_of_place(graph: fx.Graph) -> None:
    """Turns calls that overwrite their first argument into calls that return it.

    Later readers of the overwritten value read the result instead, as they would have.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not _overwrites(node):
            continue
        target = node.args[0]
        if isinstance(target, fx.Node):
            later = {user for user in target.users if order[user] > order[node]}
            for user in later:
                user.replace_input_with(target, node)
        if node.op == "call_method":
            node.target = node.target[:-1]
        elif node.target in _OUT_OF_PLACE:
            node.target = _OUT_OF_PLACE[node.target]
        elif node.target.__name__.endswith("_"):
            node.target = getattr(torch, node.target.__name__[:-1])
        else:
            _set_argument(node, "inplace", False)


def is_inert(node: fx.Node) -> bool:
    """Whether a call returns a shape, a number or another thing without a derivative."""
    if node.op in ("placeholder", "get_attr"):
        return False
    if node.op == "call_method" and node.target in _INERT_METHODS:
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] not in ("T", "mT", "data")
    above = node.all_input_nodes
    return bool(above) and all(is_inert(n) for n in above)


def _overwrites(node: fx.Node) -> bool:
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__") and hasattr(Tensor, name[:-1])
    if node.op != "call_function":
        return False
    if node.target in _OUT_OF_PLACE:
        return True
    name = getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__") and hasattr(torch, name[:-1]):
        return True
    return bool(_get_argument(node, "inplace"))


def _signature(node: fx.Node) -> inspect.Signature | None:
    try:
        return inspect.signature(node.target)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _get_argument(node: fx.Node, name: str) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    signature = _signature(node)
    if signature is None or name not in signature.parameters:
        return None
    position = list(signature.parameters).index(name)
    return node.args[position] if position < len(node.args) else None


def _set_argument(node: fx.Node, name: str, value: Any) -> None:
    if name in node.kwargs:
        node.update_kwarg(name, value)
    else:
        signature = _signature(node)
        assert signature is not None
        node.update_arg(list(signature.parameters).index(name), value)


def _is_open(module: nn.Module) -> bool:
    """Whether a module's calls are recorded one by one."""
    if _has_hooks(module) or torch.nn.utils.parametrize.is_parametrized(module):
        return False
    if type(module) in LOWERINGS or type(module) in TRACE_FORWARD:
        return True
    home = type(module).__module__
    return not home.startswith(("torch.nn", "torch.ao")) or isinstance(
        module, nn.Sequential | nn.ModuleList
    )


def _has_hooks(module: nn.Module) -> bool:
    hooks: Iterable[Any] = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(len(h) > 0 for h in hooks)


def _with_arity(function: Callable[..., Any], arity: int) -> Callable[..., Any]:
    """The function with exactly `arity` named arguments, as `fx` wants to see them."""
    wrappers: dict[int, Callable[..., Any]] = {
        1: lambda a: function(a),
        2: lambda a, b: function(a, b),
        3: lambda a, b, c: function(a, b, c),
        4: lambda a, b, c, d: function(a, b, c, d),
        5: lambda a, b, c, d, e: function(a, b, c, d, e),
    }
    if arity not in wrappers:
        raise ValueError(f"models with {arity} inputs are not supported: pass at most 5 tensors.")
    return wrappers[arity]
