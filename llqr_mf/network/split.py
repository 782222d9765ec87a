"""`split`: a model as the chain x_{t+1} = f_t(x_t, theta_t)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from .chain import Chain, LayerSpec, chain_by_hooks, run_chain
from .plain import check_plain
from .tracing import Program, is_inert, required_inputs, trace


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
    cuts: Sequence[str] | str | None = None,
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
            of a function f(parameters, x) and a dictionary of tensors, all of them trained. In a
            list each item is one layer.
        cuts: Names of modules; each ends a layer, and there are no other cuts.
        example_inputs: A batch, needed only for a model whose own code cannot be traced: hooks
            then show which modules it calls in a chain.

    Returns:
        The layers, in order. Pass all of them to `LQRProblem.from_network`.

    Raises:
        ValueError: A cut names no module, the list is empty, or the model cannot be traced.
    """
    if not isinstance(model, nn.Module) or isinstance(model, nn.ModuleList):
        if cuts is not None:
            raise ValueError("cuts go with a module; in a list every item is one layer already.")
        if not isinstance(model, Iterable):
            raise ValueError(
                f"model is a {type(model).__name__}: give a module, or a list of layers."
            )
        return _split_list(list(model), example_inputs)
    check_plain(model)
    cuts = [cuts] if isinstance(cuts, str) else cuts
    count = _count(example_inputs) or required_inputs(model)
    program = trace(model, lambda twin, *args: twin(*args), count)
    if "" in program.whole and example_inputs is not None:
        names = chain_by_hooks(model, example_inputs)
        if names is not None:
            program = trace(model, run_chain(names), count)
    groups = _automatic(program) if cuts is None else _at_cuts(program, cuts)
    passive = _passive(program)
    names = [_group_name(group, passive) or type(model).__name__ for group in groups]
    return _layers(program, groups, names)


def _split_list(
    items: Sequence[LayerSpec], example_inputs: Tensor | tuple[Tensor, ...] | None
) -> list[Layer]:
    chain = Chain.of(items)
    for module in chain:
        check_plain(module)
    count = _count(example_inputs) or required_inputs(chain[0])
    sizes: list[int] = []
    program = trace(chain, lambda twin, *args: twin.run(*args, sizes=sizes), count)
    groups: list[list[fx.Node]] = [[] for _ in sizes]
    for place, node in enumerate(program.graph.nodes):
        if node.op.startswith("call"):
            item = min(bisect_right(sizes, place), len(sizes) - 1)
            groups[item].append(node)
    return _layers(program, groups, [str(i) for i in range(len(groups))])


def _count(example_inputs: Tensor | tuple[Tensor, ...] | None) -> int:
    return len(example_inputs) if isinstance(example_inputs, tuple) else example_inputs is not None


def _layers(program: Program, groups: list[list[fx.Node]], names: Sequence[str]) -> list[Layer]:
    canonical = {id(p): name for name, p in program.model.named_parameters()}
    seen: set[str] = set()
    used: dict[str, int] = {}
    layers = []
    passive = _passive(program)
    for index, (nodes, path) in enumerate(zip(groups, names, strict=True)):
        parameters = {}
        for parameter in (p for node in nodes for p in _parameters(program, node)):
            name = canonical.get(id(parameter))
            if name is not None and name not in seen and parameter.requires_grad:
                seen.add(name)
                parameters[name] = parameter
        calls = tuple(_call_name(node) for node in nodes if node not in passive)
        used[path] = used.get(path, 0) + 1
        label = path if used[path] == 1 else f"{path}#{used[path]}"
        layers.append(Layer(label, index, parameters, calls, program, tuple(nodes)))
    return layers


def _calls(program: Program) -> Iterator[fx.Node]:
    return (n for n in program.graph.nodes if n.op.startswith("call"))


def _automatic(program: Program) -> list[list[fx.Node]]:
    """A new layer where the module changes, or at a second parametrised call in one module."""
    groups: list[list[fx.Node]] = []
    waiting: list[fx.Node] = []
    owner, parametrised = None, False
    passive = _passive(program)
    for node in _calls(program):
        if node in passive:
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


def _passive(program: Program) -> set[fx.Node]:
    """Calls that no control or input can move: shapes, masks, positions."""
    passive: set[fx.Node] = set()
    for node in program.graph.nodes:
        fixed = node.op == "get_attr" and not program.tensors[str(node.target)].requires_grad
        called = node.op in ("call_function", "call_method")
        if fixed or is_inert(node) or (called and passive.issuperset(node.all_input_nodes)):
            passive.add(node)
    return passive


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
    if len(bounds) > 1 and _passive(program).issuperset(nodes[bounds[-2] + 1 :]):
        del bounds[-2]
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


def _group_name(nodes: list[fx.Node], passive: set[fx.Node]) -> str:
    """The innermost module that holds all of the layer's calls, or its first call's name."""
    active = [node for node in nodes if node not in passive] or nodes
    paths = [node.meta["owner"].split(".") for node in active]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or _call_name(active[0])
