"""From a module to the list of calls it makes, by `torch.fx`."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ..errors import Unsaved
from .attributes import PARAMETERS, is_switch, read_attributes, same_calls
from .copies import shared_copy
from .inplace import make_out_of_place
from .lowerings import LOWERINGS, TRACE_FORWARD
from .modes import FAST_PATHS, LOCK, STATEFUL
from .plain import is_compiled

_SHARED_MEMORY = "it overwrites memory that a value read later shares"

_GRAPH_CALLS = {
    *["requires_grad_", "retain_grad", "backward", "register_hook"],
    *["register_post_accumulate_grad_hook", torch.autograd.grad, torch.autograd.backward],
}
"""Calls that act on autograd's graph, which a recorded call does not have."""

_INERT_METHODS = {"size", "dim", "numel", "ndimension", "is_floating_point", "element_size"}
_INERT_ATTRIBUTES = {
    *["shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad", "itemsize"],
    *["nbytes", "is_leaf", "is_sparse", "is_quantized", "names"],
}


@dataclass(frozen=True, repr=False)
class Program(Unsaved):
    """A model's calls, in order.

    Args:
        graph: The traced graph; every node's `meta["owner"]` is the path of the module it is in.
        tensors: Parameters, buffers and constants, by the name the graph uses.
        modules: Modules that are one call each, by path; `module_now` has them as they are now.
        model: The user's model (None for a list of callables).
        modes: Train or evaluation mode of every module when it was traced.
        whole: Modules that had to stay whole, with the reason.
        again: Traces the model as it is now.
        attributes: What its code could branch on.
        idle: Names of numbers among these that move without a change of the calls: counters.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    modules: dict[str, nn.Module]
    model: nn.Module
    modes: dict[str, bool]
    whole: dict[str, str]
    again: Callable[[], Program]
    attributes: dict[str, Any]
    idle: set[str] = field(default_factory=set)

    _remedy = (
        "layers cannot be pickled or deep-copied: they belong to the model that was split. Call "
        "split() on the copied or loaded model."
    )

    def module_now(self, path: str, model: nn.Module | None = None) -> nn.Module:
        """A module that is one call, of the model or of a copy of it.

        A module that the model does not name is the one that was traced.
        """
        known = dict((model or self.model).named_modules(remove_duplicate=False))
        return known.get(path, self.modules[path])

    @property
    def inputs(self) -> int:
        """How many inputs the model was traced with."""
        return sum(node.op == "placeholder" for node in self.graph.nodes)

    def __repr__(self) -> str:
        """The model, how many calls there are, and which modules stayed whole."""
        calls = sum(node.op.startswith("call") for node in self.graph.nodes)
        whole = "".join(f", '{path or 'all'}' whole: {why}" for path, why in self.whole.items())
        return f"Program({type(self.model).__name__}, {calls} calls{whole})"

    def read(self) -> dict[str, Tensor]:
        """The trainable parameters, and whatever else of the model the calls read, by name.

        Modules that are one call run on copies of their buffers, which are not here.
        """
        now = dict(self.model.named_buffers(remove_duplicate=False))
        now |= dict(self.model.named_parameters(remove_duplicate=False))
        held: dict[str, Tensor] = {}
        held |= {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        known = {id(tensor) for tensor in held.values()}
        names = [str(node.target) for node in self.graph.nodes if node.op == "get_attr"]
        for path, module in self.modules.items():
            names += [f"{path}.{name}" if path else name for name, _ in module.named_parameters()]
        for name in names:
            tensor = now.get(name, self.tensors.get(name))
            if tensor is not None and id(tensor) not in known:
                known.add(id(tensor))
                held[name] = tensor
        return held

    @cached_property
    def stateful(self) -> bool:
        """Whether a call may be, or hide, one that `modes.curvature_pass` has to watch for."""
        fast = any(isinstance(module, FAST_PATHS) for module in self.model.modules())
        return fast or any(map(_may_be_stateful, self.graph.nodes))

    def changed_mode(self) -> str | None:
        """The first module whose train or evaluation mode is no longer the traced one."""
        for name, module in self.model.named_modules():
            if self.modes.get(name, module.training) != module.training:
                return name or "the model"
        return None

    def changed_attribute(self) -> str | None:
        """The first attribute by which the model makes other calls than it did.

        A flag that detaches a value changes no output, so that a run beside the layers does not
        show it. What moves by itself, as counters do, costs one trace.
        """
        now, before = read_attributes(self.model), self.attributes
        if now == before:
            return None
        missing = object()
        changed = {
            key
            for key in now.keys() | before.keys()
            if key not in self.idle and now.get(key, missing) != before.get(key, missing)
        }
        # A module that is one call runs as it is now.
        outside = {key for key in changed if not self._is_inside(key)}
        if outside and not same_calls(self.graph, self.again().graph):
            return min(outside)
        self.attributes.clear()
        self.attributes.update(now)
        self.idle.update(key for key in changed if not is_switch(now.get(key)))
        self.idle.discard(PARAMETERS)
        return None

    def _is_inside(self, key: str) -> bool:
        return any(not path or key.startswith(f"{path}.") for path in self.modules)


class _Tracer(fx.Tracer):
    """Records calls with the module they are in, and which module a failure was in.

    `torch.fx` patches `nn.Module` itself while it traces; modules that another thread calls
    meanwhile run as ever.
    """

    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module, whole: dict[str, str]) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.whole = whole
        self.paths = {id(module): name for name, module in model.named_modules()}
        self.names = {id(p): n for n, p in model.named_parameters()}
        self.names |= {id(b): n for n, b in model.named_buffers()}
        self.tensors: dict[str, Tensor] = {}
        self.modules: dict[str, nn.Module] = {}
        self.stack: list[str] = [""]
        self.called: set[str] = {""}
        self.failed: tuple[str, str] | None = None

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if is_compiled(m):
            return m.get_submodule("_orig_mod")(*args, **kwargs)
        path = self.paths.setdefault(id(m), f"{type(m).__name__}@{len(self.paths)}")
        self.stack.append(path)
        self.called.add(path)
        try:
            if path in self.whole or not _is_open(m):
                self.modules[path] = m
                return self.create_proxy("call_module", path, args, kwargs)
            lowering, random = LOWERINGS.get(type(m)), torch.get_rng_state()
            made = forward(*args, **kwargs) if lowering is None else lowering(m, *args, **kwargs)
            if not torch.equal(torch.get_rng_state(), random):
                # Layers left out at random, say: a graph would leave out the same for good.
                raise NotImplementedError("it draws random numbers beside its calls")
            return made
        except Exception as error:
            if self.failed is None:
                self.failed = (path, f"{type(error).__name__}: {error}")
            raise
        finally:
            self.stack.pop()

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if kind.startswith("call") and target in _GRAPH_CALLS:
            raise NotImplementedError(f"{target} acts on autograd's graph")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise NotImplementedError("autocast is not recorded")
        node = super().create_node(kind, target, *args, **kwargs)
        node.meta["owner"] = self.stack[-1]
        # torch.no_grad() leaves no call in the graph.
        node.meta["constant"] = not torch.is_grad_enabled()
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if not isinstance(attr_val, Tensor) or threading.get_ident() != self.thread:
            return attr_val
        name = self._register(attr_val)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self.create_node("get_attr", self._register(a), (), {})
        return super().create_arg(a)

    def common_module(self, owners: Iterable[str]) -> str:
        """The innermost module that was called and holds all of these."""
        parts = [owner.split(".") for owner in owners]
        common = list(parts[0])
        for other in parts[1:]:
            agree = [a == b for a, b in zip(common, other, strict=False)]
            common = common[: agree.index(False) if False in agree else len(agree)]
        while common and ".".join(common) not in self.called:
            common.pop()
        return ".".join(common)

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
    whole: dict[str, str] = {}
    while True:
        # A new copy each time: what a traced forward stores on its module are symbols.
        twin = shared_copy(model)
        tracer = _Tracer(twin, whole)
        try:
            with (
                LOCK,
                torch.random.fork_rng(devices=[]),
                torch.enable_grad(),
                _autocast_off(),
                _functions_recorded(),
            ):
                graph = tracer.trace(_with_arity(partial(run, twin), inputs))
            entangled = make_out_of_place(graph)
            if entangled is not None:
                tracer.failed = (tracer.common_module(entangled), _SHARED_MEMORY)
                raise ValueError(_SHARED_MEMORY)
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
        for node in graph.nodes:
            node.meta["inert"] = _is_inert(node)
        return Program(
            graph=graph,
            tensors=tracer.tensors,
            modules=tracer.modules,
            model=model,
            modes={name: module.training for name, module in model.named_modules()},
            whole=whole,
            again=partial(trace, model, run, inputs),
            attributes=read_attributes(model),
        )


@contextmanager
def _functions_recorded() -> Iterator[None]:
    """Custom functions as calls: `fx` would look through `apply`, past the custom backward."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        symbols = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)]
        if not symbols:
            return original.__get__(None, cls)(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            return cls.apply(*args, **kwargs)

        call.__name__, call.__module__ = cls.__name__, cls.__module__
        call.__dict__["keeps_inputs"] = True  # or says so by mark_dirty, which leaves refuse
        return symbols[0].tracer.create_proxy("call_function", call, args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


@contextmanager
def _autocast_off() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def required_inputs(model: nn.Module) -> int:
    """How many positional inputs the model's forward asks for."""
    parameters = inspect.signature(model.forward).parameters.values()
    required = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    return max(1, len(required))


def _may_be_stateful(node: fx.Node) -> bool:
    return is_foreign(node) or (node.op == "call_function" and node.target in STATEFUL)


def is_foreign(node: fx.Node) -> bool:
    """Whether a call runs code that is not torch's own function: a module, a user's function."""
    if node.op != "call_function":
        return node.op == "call_module"
    home = getattr(node.target, "__module__", None) or ""
    return home.split(".")[0] not in ("torch", "_operator", "builtins", "math", "llqr_mf")


def is_inert(node: fx.Node) -> bool:
    """Whether a call returns a shape, a number or another thing without a derivative."""
    return bool(node.meta["inert"])


def _is_inert(node: fx.Node) -> bool:
    """The same, once it is known of the nodes before it."""
    if node.op in ("placeholder", "get_attr"):
        return False
    if node.op == "call_method" and node.target in _INERT_METHODS:
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _INERT_ATTRIBUTES
    above = node.all_input_nodes
    return bool(above) and all(map(is_inert, above))


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
    names = ", ".join(f"x{i}" for i in range(arity))
    return eval(f"lambda {names}: function({names})", {"function": function})
