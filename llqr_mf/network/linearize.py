"""One forward pass of a traced model that leaves a linearised node per call."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ..errors import FailedCallError
from ..rules import Call, Node, Slot, is_active_leaf, linearize_call
from .copies import shared_copy
from .modes import (
    curvature_pass,
    differentiable_attention,
    random_states,
    set_random_states,
)
from .split import Layer
from .tracing import Program, is_foreign, is_inert


@dataclass(frozen=True)
class BoundNode:
    """A linearised call in its place.

    Args:
        node: The linearised call.
        outputs: Ids of the values it makes.
        name: For messages: the call and its module.
    """

    node: Node
    outputs: tuple[int, ...]
    name: str

    @property
    def inputs(self) -> tuple[int, ...]:
        """Ids of the values it reads."""
        return self.node.inputs


class Forgotten(Node):
    """The place of a node that is made again when it is needed."""

    def __init__(self, node: Node) -> None:
        super().__init__(None, ())
        self.inputs = node.inputs
        self.flops = node.flops

    def push(self, tangents: Any) -> Tensor:
        """Refused."""
        raise self.error()

    def pull(self, cotangent: Tensor, needed: Any, out: Any) -> list[Tensor | None]:
        """Refused."""
        raise self.error()

    @staticmethod
    def error() -> ValueError:
        """What to say of it."""
        return ValueError(
            "this problem was made with checkpoint=True and keeps no layer's linearisation: make "
            "it without, or use method='cg'."
        )


Remake: TypeAlias = Callable[[], tuple[BoundNode, ...]]
"""Makes a layer's nodes again."""


@dataclass(frozen=True)
class Linearization:
    """A network linearised at one batch.

    Values are numbered: the trainable parameters first, in the order of `named_parameters`, then
    the floating-point inputs, then whatever the calls make.

    Args:
        layers: The nodes of each layer.
        shapes: Shape of every value.
        parameters: Names of the trainable parameters.
        inputs: Ids of the network's inputs.
        output: Id of the network's output.
        complex_values: Ids of the values that are complex.
        outputs: The network's output.
        remakes: With checkpoints, what makes each layer's nodes again; those in `layers` then know
            their places only.
    """

    layers: tuple[tuple[BoundNode, ...], ...]
    shapes: dict[int, tuple[int, ...]]
    parameters: tuple[str, ...]
    inputs: tuple[int, ...]
    output: int
    outputs: Tensor
    complex_values: frozenset[int] = frozenset()
    remakes: tuple[Remake, ...] = ()


def linearize(
    layers: Sequence[Layer],
    inputs: tuple[Any, ...],
    *,
    second_order: bool = False,
    checkpoint: bool = False,
) -> Linearization:
    """Runs the network once on a batch and linearises every call.

    Args:
        layers: All layers of a split.
        inputs: The batch.
        second_order: Whether the nodes' curvature will be asked for (keeps more).
        checkpoint: Whether only what enters each layer is kept, and its nodes are made again for
            every sweep.

    Raises:
        ValueError: The output is no tensor, or depends on no trainable parameter.
    """
    program = layers[0].program
    device = next((x.device for x in inputs if isinstance(x, Tensor)), torch.device("cpu"))
    with torch.no_grad(), curvature_pass(device, stateful=program.stateful):
        return _Run(program, second_order, device if checkpoint else None).over(layers, inputs)


class _Run:
    def __init__(
        self, program: Program, second_order: bool, checkpoints_on: torch.device | None
    ) -> None:
        self.program, self.second_order = program, second_order
        self.device, self.remakes = checkpoints_on, dict[int, Remake]()
        trainable = [(n, p) for n, p in program.model.named_parameters() if p.requires_grad]
        self.names = tuple(name for name, _ in trainable)
        self.controls = {
            id(p): Slot(i, p.detach(), is_parameter=True) for i, (_, p) in enumerate(trainable)
        }
        self.shapes = {slot.id: tuple(slot.value.shape) for slot in self.controls.values()}
        self.next_id = len(trainable)
        self.complex_values: set[int] = set()
        self.twin: nn.Module | None = None
        """A copy of the model as it is now, on which modules that are one call may leave marks."""
        self.env: dict[fx.Node, Any] = {}
        # The model's tensors of now: a forward may have put new buffers in place of the traced.
        model = program.model
        self.tensors: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
        self.tensors |= dict(model.named_parameters(remove_duplicate=False))

    def over(self, layers: Sequence[Layer], inputs: tuple[Any, ...]) -> Linearization:
        placed = {node: layer.index for layer in layers for node in layer.nodes}
        readers = {node: len(node.users) for node in self.program.graph.nodes}
        bound: list[list[BoundNode]] = [[] for _ in layers]
        expected = self.program.inputs
        if expected != len(inputs):
            raise ValueError(
                f"inputs holds {len(inputs)} tensors and the layers were made for {expected}: for "
                "arguments with a default, give split() the same tuple as example_inputs."
            )
        given = iter(inputs)
        input_ids: list[int] = []
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = self._input(next(given), input_ids)
            elif node.op == "get_attr":
                name = str(node.target)
                self.env[node] = self._tensor(name, self.program.tensors[name])
            elif node.op == "output":
                return self._finish(node, bound, input_ids)
            else:
                t = placed[node]
                if self.device is not None and t not in self.remakes:
                    self.remakes[t] = self._checkpoint(layers[t].nodes)
                    self._forget(bound[:t])
                try:
                    self.env[node] = self._evaluate(node, self._call(node), bound[t])
                except RuntimeError as error:
                    if isinstance(error, NotImplementedError):
                        raise
                    raise FailedCallError(
                        f"{_label(node)} failed on this batch: {error}"
                    ) from error
            for source in node.all_input_nodes:
                readers[source] -= 1
                if readers[source] == 0:
                    del self.env[source]
        raise AssertionError("a graph ends with an output node")

    def _finish(
        self, node: fx.Node, bound: list[list[BoundNode]], input_ids: list[int]
    ) -> Linearization:
        output = self._resolve(node.args[0])
        if not isinstance(output, Slot):
            kind = "depends on no trainable parameter"
            if not isinstance(output, Tensor):
                kind = f"is a {type(output).__name__.removeprefix('immutable_')}, not one tensor"
            raise ValueError(
                f"the model's output {kind}: give a model that returns the tensor the loss reads, "
                "and at least one parameter with requires_grad=True."
            )
        remakes: tuple[Remake, ...] = ()
        if self.device is not None:
            self._forget(bound)
            remakes = tuple(self.remakes.get(t, lambda: ()) for t in range(len(bound)))
        return Linearization(
            remakes=remakes,
            layers=tuple(tuple(nodes) for nodes in bound),
            shapes=self.shapes,
            parameters=self.names,
            inputs=tuple(input_ids),
            output=output.id,
            outputs=output.value,
            complex_values=frozenset(self.complex_values),
        )

    def _checkpoint(self, nodes: Sequence[fx.Node]) -> Remake:
        """What linearises a layer again from what enters it now, random state included."""
        assert self.device is not None
        device, inside, next_id = self.device, set(nodes), self.next_id
        read = {source for node in nodes for source in node.all_input_nodes if source not in inside}
        kept = {source: self.env[source] for source in read if source in self.env}
        random = random_states(device)
        twin = copy.copy(self)

        def remake() -> tuple[BoundNode, ...]:
            run, bound = copy.copy(twin), list[BoundNode]()
            run.env, run.shapes, run.next_id = dict(kept), {}, next_id
            with torch.no_grad(), curvature_pass(device, stateful=run.program.stateful):
                set_random_states(random, device)
                for source in read - set(kept):
                    name = str(source.target)
                    run.env[source] = run._tensor(name, run.program.tensors[name])
                for node in nodes:
                    run.env[node] = run._evaluate(node, run._call(node), bound)
            return tuple(bound)

        return remake

    @staticmethod
    def _forget(layers: Sequence[list[BoundNode]]) -> None:
        """Leaves the places of the nodes, not what they hold."""
        for nodes in layers:
            nodes[:] = [replace(bound, node=Forgotten(bound.node)) for bound in nodes]

    def _input(self, value: Any, ids: list[int]) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        # Autograd saves no inference tensor.
        slot = self._slot(value.clone() if value.is_inference() else value.detach())
        ids.append(slot.id)
        return slot

    def _tensor(self, name: str, traced: Tensor) -> Any:
        tensor = self.tensors.get(name, traced)
        return self.controls.get(id(tensor), tensor.detach())

    def _slot(self, value: Tensor) -> Slot:
        slot = Slot(self.next_id, value)
        self.shapes[slot.id] = tuple(value.shape)
        self.next_id += 1
        if value.is_complex():
            self.complex_values.add(slot.id)
        return slot

    def _resolve(self, args: Any) -> Any:
        return fx.node.map_arg(args, lambda n: self.env[n])

    def _call(self, node: fx.Node) -> Call:
        args, kwargs = self._resolve(node.args), dict(self._resolve(node.kwargs))
        owner, within = node.meta["owner"], None
        if is_foreign(node):
            # What was run under no_grad() in training is no call of its own to differentiate in.
            within = None if node.meta["constant"] else differentiable_attention
        if node.op == "call_module":
            function, slots = self._module_call(str(node.target))
            args = (slots, *args)
        elif node.op == "call_method":
            name = "reshape" if node.target == "view" and _sizes_only(args[1:]) else node.target
            function = getattr(torch.Tensor, str(name))
        else:
            function = _on_copies(node.target) if is_foreign(node) else node.target
        return Call(function, tuple(args), kwargs, owner, self.second_order, within)

    def _module_call(self, path: str) -> tuple[Any, list[Any]]:
        """A whole module as a function of its parameters; its buffers are never written to."""
        if self.twin is None:
            self.twin = shared_copy(self.program.model)
        module = self.program.module_now(path, self.twin)
        prefix = f"{path}." if path else ""
        names = [name for name, _ in module.named_parameters()]
        slots = [self._tensor(prefix + name, p) for name, p in module.named_parameters()]
        overwrites = any(map(_may_overwrite, module.modules()))

        def call_of(module: nn.Module) -> Callable[..., Any]:
            def call(parameters: list[Tensor], *args: Any, **kwargs: Any) -> Any:
                state: dict[str, Tensor] = dict(zip(names, parameters, strict=True))
                for name, traced in module.named_buffers():
                    state[name] = self.tensors.get(prefix + name, traced).clone()
                if overwrites:
                    args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
                return torch.func.functional_call(module, state, args, kwargs)

            return call

        call = call_of(module)
        # For who calls it again, and may not leave a trace.
        vars(call)["on_a_copy"] = lambda: call_of(shared_copy(module))
        return call, slots

    def _evaluate(self, node: fx.Node, call: Call, bound: list[BoundNode]) -> Any:
        if call.function is operator.getitem and not isinstance(call.args[0], Slot | Tensor):
            return call.args[0][call.args[1]]
        if not call.slots or is_inert(node) or node.meta["constant"]:
            return call.evaluate()
        linearized = linearize_call(call)
        leaves, spec = tree_flatten(linearized.result)
        _refuse_opaque(leaves, node, call.owner)
        moves = iter(linearized.moves or ())
        slots = [
            self._slot(leaf) if is_active_leaf(leaf) and next(moves, True) else leaf
            for leaf in leaves
        ]
        ids = tuple(slot.id for slot in slots if isinstance(slot, Slot))
        if node.op == "call_module" and linearized.moves and not any(linearized.moves):
            warnings.warn(
                f"the outputs of module '{call.owner}' do not depend differentiably on its inputs: "
                "nothing before it gets a step through it.",
                stacklevel=2,
            )
        if not ids:
            return linearized.result
        linearized.result = None
        bound.append(BoundNode(linearized, ids, _label(node)))
        return tree_unflatten(slots, spec)


def _on_copies(function: Any) -> Any:
    """The function on copies of its tensors, which a user's function may write to."""
    if getattr(function, "keeps_inputs", False):
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        return function(*args, **kwargs)

    return call


def _label(node: fx.Node) -> str:
    """The call and its module, for messages."""
    target = getattr(node.target, "__name__", str(node.target))
    return f"{target} in '{node.meta['owner'] or 'the model'}'"


def _may_overwrite(module: nn.Module) -> bool:
    """Whether a module may write to its inputs: user code, or an activation told to."""
    return not type(module).__module__.startswith("torch.nn") or bool(
        getattr(module, "inplace", False)
    )


def _refuse_opaque(leaves: Sequence[Any], node: fx.Node, owner: str) -> None:
    """A derivative would be lost in an object that cannot be looked into."""
    for leaf in leaves:
        if node.op == "call_module" and hasattr(leaf, "__dict__") and not isinstance(leaf, Tensor):
            raise ValueError(
                f"module '{owner}' returns a {type(leaf).__name__}: let it return tensors, or "
                "tuples, lists or dictionaries of them."
            )


def _sizes_only(args: tuple[Any, ...]) -> bool:
    return all(not isinstance(leaf, torch.dtype) for leaf in tree_leaves(args))
