"""`split`: a model as the chain x_{t+1} = f_t(x_t, theta_t)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .tracing import Program, is_inert, required_inputs, shared_copy, trace

LayerSpec = nn.Module | Callable[..., Any] | tuple[Callable[..., Any], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Layer:
    """One time step of the chain.

    Its input state is every tensor that this layer or a later one still reads: one tensor in a
    plain chain, two across a residual connection (the skip is carried), and a tied weight from
    its first use to its last.

    Args:
        name: Path of the module, or the name of the call where the model's own code makes it.
        index: t.
        parameters: Trainable parameters that enter here (the controls), by their name in
            `model.named_parameters()`.
        calls: Names of the calls it makes, in order.
        program: The traced model, shared by all its layers.
        nodes: The graph nodes of this layer.
    """

    name: str
    index: int
    parameters: Mapping[str, nn.Parameter]
    calls: tuple[str, ...]
    program: Program = field(repr=False)
    nodes: tuple[fx.Node, ...] = field(repr=False)

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.parameters.values())
        return f"Layer({self.index}, '{self.name}', {'+'.join(self.calls)}, parameters={size})"


def split(
    model: nn.Module | Sequence[LayerSpec],
    *,
    cuts: Sequence[str] | None = None,
    example_inputs: Tensor | tuple[Tensor, ...] | None = None,
) -> list[Layer]:
    """Turns a model into the chain of layers x_{t+1} = f_t(x_t, theta_t).

    The model's calls are recorded by `torch.fx` on a copy that shares its tensors; the model is
    not run and nothing about it changes. A layer is one module, or one parametrised call of the
    model's own code with the calls that follow it. A module whose code cannot be traced is one
    layer. Only arguments without a default are inputs; others keep their default, unless
    `example_inputs` gives them.

    Args:
        model: A module, or a list of layers: modules, functions f(x), or pairs (f, parameters)
            of a function f(parameters, x) and a dictionary of tensors. In a list each item is
            one layer.
        cuts: Names of modules; each ends a layer, and there are no other cuts.
        example_inputs: A batch, needed only for a model whose own code cannot be traced: hooks
            then show which modules it calls in a chain.

    Returns:
        The layers, in order. Pass all of them to `LQRProblem.from_network`.

    Raises:
        ValueError: A cut names no module, the list is empty, or the model cannot be traced.
    """
    if isinstance(model, nn.Module):
        root, ends = model, cuts
    else:
        root = _chain(model)
        ends = [str(i) for i in range(len(model))]
        if cuts is not None:
            raise ValueError("cuts go with a module; in a list every item is one layer already.")
    count = required_inputs(root)
    if example_inputs is not None:
        count = len(example_inputs) if isinstance(example_inputs, tuple) else 1
    program = trace(root, lambda twin, *args: twin(*args), count)
    if "" in program.whole and example_inputs is not None:
        names = _chain_by_hooks(root, example_inputs)
        if names is not None:
            program = trace(root, _run_chain(names), count)
    groups = _automatic(program) if ends is None else _at_cuts(program, ends)
    return _layers(program, groups)


def _layers(program: Program, groups: list[list[fx.Node]]) -> list[Layer]:
    canonical = {id(p): name for name, p in program.model.named_parameters()}
    seen: set[str] = set()
    used: dict[str, int] = {}
    layers = []
    for index, nodes in enumerate(groups):
        parameters = {}
        for parameter in (p for node in nodes for p in _parameters(program, node)):
            name = canonical.get(id(parameter))
            if name is not None and name not in seen and parameter.requires_grad:
                seen.add(name)
                parameters[name] = parameter
        calls = tuple(_call_name(node) for node in nodes if not is_inert(node))
        name = _group_name(nodes)
        used[name] = used.get(name, 0) + 1
        label = name if used[name] == 1 else f"{name}#{used[name]}"
        layers.append(Layer(label, index, parameters, calls, program, tuple(nodes)))
    return layers


def _calls(program: Program) -> Iterator[fx.Node]:
    return (n for n in program.graph.nodes if n.op.startswith("call"))


def _automatic(program: Program) -> list[list[fx.Node]]:
    """A new layer where the module changes, or at a second parametrised call in one module."""
    groups: list[list[fx.Node]] = []
    waiting: list[fx.Node] = []
    owner, parametrised = None, False
    for node in _calls(program):
        if is_inert(node):
            waiting.append(node)
            continue
        has_parameters = any(True for _ in _parameters(program, node))
        if node.meta["owner"] != owner or (has_parameters and parametrised):
            groups.append([])
            owner, parametrised = node.meta["owner"], False
        parametrised = parametrised or has_parameters
        groups[-1].extend([*waiting, node])
        waiting = []
    if waiting and groups:
        groups[-1].extend(waiting)
    if not groups:
        raise ValueError("the model makes no call that could be a layer: it returns its input.")
    return groups


def _at_cuts(program: Program, ends: Sequence[str]) -> list[list[fx.Node]]:
    nodes = list(_calls(program))
    last: dict[str, int] = {}
    for i, node in enumerate(nodes):
        owner = node.meta["owner"]
        for end in ends:
            if owner == end or owner.startswith(end + "."):
                last[end] = i
    missing = [end for end in ends if end not in last]
    if missing:
        known = sorted({n.meta["owner"] for n in nodes if n.meta["owner"]})
        raise ValueError(
            f"cut '{missing[0]}' names no module that is called; the modules are {known}."
        )
    bounds = sorted({*last.values(), len(nodes) - 1})
    starts = [0, *(b + 1 for b in bounds[:-1])]
    return [nodes[a : b + 1] for a, b in zip(starts, bounds, strict=True)]


def _parameters(program: Program, node: fx.Node) -> Iterator[nn.Parameter]:
    if node.op == "call_module":
        yield from program.modules[str(node.target)].parameters()
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            tensor = program.tensors[str(source.target)]
            if isinstance(tensor, nn.Parameter):
                yield tensor


def _call_name(node: fx.Node) -> str:
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target)


def _group_name(nodes: list[fx.Node]) -> str:
    """The innermost module that holds all of the layer's calls, or its first call's name."""
    active = [node for node in nodes if not is_inert(node)] or nodes
    paths = [node.meta["owner"].split(".") for node in active]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or _call_name(active[0])


# ---- lists of callables, and chains that only hooks can see


class _FunctionLayer(nn.Module):
    """A user's function f(x) or f(parameters, x) as a module."""

    def __init__(self, function: Callable[..., Any], parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        self.names = list(parameters)
        for name, tensor in parameters.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor.detach()))

    def forward(self, x: Any) -> Any:
        if not self.names:
            return self.function(x)
        return self.function({name: getattr(self, name) for name in self.names}, x)


def _chain(items: Sequence[LayerSpec]) -> nn.Module:
    if isinstance(items, nn.ModuleList):
        items = list(items)
    if not items:
        raise ValueError("the list of layers is empty: give at least one module or callable.")
    modules = []
    for i, item in enumerate(items):
        if isinstance(item, nn.Module):
            modules.append(item)
        elif isinstance(item, tuple) and len(item) == 2 and callable(item[0]):
            modules.append(_FunctionLayer(item[0], item[1]))
        elif callable(item):
            modules.append(_FunctionLayer(item, {}))
        else:
            raise ValueError(
                f"layer {i} is a {type(item).__name__}: give a module, a function f(x), or a "
                "pair (f, parameters) of a function f(parameters, x) and a dictionary."
            )
    return nn.Sequential(*modules)


def _run_chain(names: list[str]) -> Callable[..., Any]:
    def run(twin: nn.Module, x: Any) -> Any:
        for name in names:
            x = twin.get_submodule(name)(x)
        return x

    return run


def _chain_by_hooks(
    model: nn.Module, example: Tensor | tuple[Tensor, ...]
) -> list[str] | None:
    """Names of the children that the model calls one after another, if that is all it does."""
    inputs = example if isinstance(example, tuple) else (example,)
    twin = shared_copy(model)
    if twin is model or len(inputs) != 1:
        return None
    calls: list[tuple[str, Any, Any]] = []
    depth = 0

    def before(module: nn.Module, args: Any) -> None:
        nonlocal depth
        depth += 1

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:
                calls.append((name, args, output))

        return hook

    for name, module in twin.named_modules():
        if name:
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after(name))
    buffers = {name: b.clone() for name, b in twin.named_buffers()}
    with torch.no_grad(), torch.random.fork_rng():
        output = torch.func.functional_call(twin, buffers, inputs)
    current: Any = inputs[0]
    for _, args, result in calls:
        if len(args) != 1 or args[0] is not current:
            return None
        current = result
    return [name for name, _, _ in calls] if calls and current is output else None
