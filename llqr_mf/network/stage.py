"""A layer of a linearised network as a stage of the linear-quadratic system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..operators.control_cost import ControlCost
from ..operators.stage import Look
from ..operators.tangent import Shape, Tangent, add
from ..rules.base import Curvature
from .feedback import control_squares, keep_costates, respond
from .linearize import BoundNode, Linearization, Remake
from .snapshot import Snapshot


@dataclass(frozen=True)
class NetworkStage:
    """A layer's products, node by node: tangents forward, cotangents backward.

    Args:
        nodes: The layer's linearised calls, in order.
        state_ids: Values that make up the input state.
        next_ids: Values that make up the output state.
        control_ids: Parameters that enter here.
        state: Shapes of the input state.
        next_state: Shapes of the output state.
        controls: Shapes of the controls.
        proto: Carries dtype and device.
        curvatures: For Newton-like metrics, each node's second derivative at its costate.
        snapshot: The parameters that enter here, to notice if they are written to.
        remake: Makes the nodes again, where those in `nodes` know their places only.
    """

    nodes: tuple[BoundNode, ...]
    state_ids: tuple[int, ...]
    next_ids: tuple[int, ...]
    control_ids: tuple[int, ...]
    state: tuple[Shape, ...]
    next_state: tuple[Shape, ...]
    controls: tuple[Shape, ...]
    proto: Tensor
    curvatures: tuple[Curvature | None, ...] = ()
    snapshot: Snapshot | None = None
    remake: Remake | None = None

    def linearized(self) -> tuple[BoundNode, ...]:
        """The nodes, with what their products need."""
        return self.nodes if self.remake is None else self.remake()

    @property
    def curved(self) -> bool:
        """Whether any node has second-order terms."""
        return any(curvature is not None for curvature in self.curvatures)

    def forward(self, x: Tangent, u: Tangent) -> tuple[Tangent, Any]:
        """A x + B u; the record is the tangents, kept only where curvature will read them."""
        self._check()
        moved: dict[int, Tensor] = {
            i: v
            for i, v in zip((*self.state_ids, *self.control_ids), (*x, *u), strict=True)
            if v is not None
        }
        for bound in self.linearized():
            tangents = [moved.get(i) for i in bound.inputs]
            if all(t is None for t in tangents):
                continue
            for i, y in zip(bound.outputs, bound.node.push_all(tangents), strict=True):
                if y is not None:
                    moved[i] = y
        return tuple(moved.get(i) for i in self.next_ids), moved if self.curved else None

    def backward(
        self,
        costate: Tangent,
        record: Any,
        *,
        need_state: bool = True,
        need_control: bool = True,
        out: Sequence[Tensor] | None = None,
    ) -> tuple[Tangent, Tangent]:
        """A' p + Q x + S' u and B' p + S x + R u."""
        self._check()
        sums: dict[int, Tensor] = {}
        for i, p in zip(self.next_ids, costate, strict=True):
            if p is not None:
                sums[i] = p
        buffers = {} if out is None else dict(zip(self.control_ids, out, strict=True))
        wanted = self._wanted(need_state, need_control)
        nodes = self.linearized()
        for place in range(len(nodes) - 1, -1, -1):
            bound = nodes[place]
            cotangents = [sums.pop(i, None) for i in bound.outputs]
            needed = [i in wanted for i in bound.inputs]
            if not any(needed):
                continue
            if record is not None and self.curvatures[place] is not None:
                tangents = [record.get(i) for i in bound.inputs]
                if any(t is not None for t in tangents):
                    curved = self.curvatures[place](tangents)  # type: ignore[misc]
                    _accumulate(sums, bound.inputs, curved, wanted)
            if any(c is not None for c in cotangents):
                free = [None if i in sums else buffers.get(i) for i in bound.inputs]
                pulled = bound.node.pull_all(cotangents, needed, free)
                _accumulate(sums, bound.inputs, pulled, wanted)
        state = tuple(sums.get(i) for i in self.state_ids) if need_state else self._no_state()
        controls = tuple(sums.get(i) for i in self.control_ids)
        for buffer, part in zip(out or (), controls, strict=False):
            if part is None:
                buffer.zero_()
            elif part is not buffer:
                buffer.copy_(part)
        return state, controls

    def costate(
        self, costate: Tangent, inverse: ControlCost, *, need_state: bool
    ) -> tuple[Tangent, Any]:
        """A' p, and a record from which `respond` can take B' p."""
        self._check()
        return keep_costates(self, costate, inverse, need_state=need_state)

    def respond(self, x: Tangent, record: Any, inverse: ControlCost) -> Tangent:
        """A x + B R^{-1} B' p, p being that of the record."""
        return respond(self, x, record, inverse)

    def control_squares(self, record: Any, inverse: ControlCost, k: int) -> Tensor:
        """|B' p|^2 and p'B R^{-1} B' p of the record's k columns, in float64, (2, k)."""
        return control_squares(self, record, inverse, k)

    def _check(self) -> None:
        # A compiler could only bake the answer in: whoever calls compiled code checks before it.
        if not torch.compiler.is_compiling():
            self.check()

    def check(self, *, look: Look = "count") -> None:
        """Products are of the weights that were linearised, in the precision they have.

        Args:
            look: See `Snapshot.changed`.

        Raises:
            RuntimeError: A tensor was written to since, or autocast is on.
        """
        if self.snapshot is not None:
            self.snapshot.check(look=look)
        if torch.is_autocast_enabled(self.proto.device.type):
            raise RuntimeError(
                "torch.autocast would lower the precision of the products: solve outside of it, or "
                "convert the model for products in another precision."
            )

    def own_output(self) -> int | None:
        """Which component of the next state this layer made last; None if all are carried."""
        made = {i for bound in self.nodes for i in bound.outputs}
        places = [place for place, i in enumerate(self.next_ids) if i in made]
        return places[-1] if places else None

    def _no_state(self) -> Tangent:
        return tuple(None for _ in self.state_ids)

    def _wanted(self, need_state: bool, need_control: bool) -> set[int]:
        """Values whose cotangents lead to a wanted result."""
        wanted = set(self.state_ids if need_state else ())
        wanted |= set(self.control_ids if need_control else ())
        for bound in self.nodes:
            if any(i in wanted for i in bound.inputs):
                wanted.update(bound.outputs)
        return wanted


def _accumulate(
    sums: dict[int, Tensor],
    ids: Sequence[int],
    parts: Sequence[Tensor | None],
    wanted: set[int],
) -> None:
    for i, part in zip(ids, parts, strict=True):
        if part is not None and i in wanted:
            total = add(sums.get(i), part)
            assert total is not None
            sums[i] = total


def build_stages(
    linearization: Linearization, proto: Tensor, tensors: Mapping[str, Tensor] | None = None
) -> list[NetworkStage]:
    """One stage per layer, the states cut where the layers meet.

    A value is in the state between two layers when it moves with the controls or the input, was
    made before the cut and is read after it. A parameter read by several layers is the control
    of the first and part of the state from there to the last.

    Args:
        linearization: The whole network's.
        proto: Carries dtype and device.
        tensors: The parameters by name, and the batch's tensors under other names, for the stages
            to notice if they are written to.
    """
    T = len(linearization.layers)
    parameters = len(linearization.parameters)
    first = dict.fromkeys(linearization.inputs, -1)
    last: dict[int, int] = {linearization.output: T}
    for t, nodes in enumerate(linearization.layers):
        for bound in nodes:
            for i in bound.inputs:
                first.setdefault(i, t)
                last[i] = max(last.get(i, -1), t)
            for i in bound.outputs:
                first[i] = t
    first.setdefault(linearization.output, 0)
    controls: list[list[int]] = [[] for _ in range(T)]
    for i in range(parameters):
        # A parameter that nothing reads is a control without effect: a zero column of B_0.
        controls[first.get(i, 0)].append(i)
    states = _carried(first, last, T)
    states[0] = linearization.inputs
    states.append((linearization.output,))
    for t, state in enumerate(states):
        if linearization.complex_values.intersection(state):
            raise ValueError(
                f"the state between layers {t - 1} and {t} is complex: let one module (or one item "
                "of a list) hold the code from the first complex value to the last, or give "
                "split() `cuts` that keep it together."
            )
    shapes = linearization.shapes
    return [
        NetworkStage(
            nodes=nodes,
            state_ids=states[t],
            next_ids=states[t + 1],
            control_ids=tuple(controls[t]),
            state=tuple(shapes[i] for i in states[t]),
            next_state=tuple(shapes[i] for i in states[t + 1]),
            controls=tuple(shapes[i] for i in controls[t]),
            proto=proto,
            snapshot=_snapshot(linearization, controls[t], t == 0, tensors or {}),
            remake=linearization.remakes[t] if linearization.remakes else None,
        )
        for t, nodes in enumerate(linearization.layers)
    ]


def _carried(first: Mapping[int, int], last: Mapping[int, int], T: int) -> list[tuple[int, ...]]:
    """The values that are made before layer t and read in it or later, for every t < T."""
    enter: list[list[int]] = [[] for _ in range(T + 2)]
    for i in last:
        enter[first[i] + 1].append(i)
    states, live = [], set[int]()
    for t in range(T):
        live.update(enter[t])
        live = {i for i in live if last[i] >= t}
        states.append(tuple(sorted(live)))
    return states


def _snapshot(
    linearization: Linearization, controls: list[int], is_first: bool, tensors: Mapping[str, Tensor]
) -> Snapshot:
    mine = [linearization.parameters[i] for i in controls]
    others = set(tensors) - set(linearization.parameters) if is_first else ()
    return Snapshot((name, tensors[name]) for name in (*mine, *others) if name in tensors)


def with_curvature(stages: Sequence[NetworkStage], costate: Tensor) -> list[NetworkStage]:
    """The stages with the second derivatives of <p_{t+1}, f_t>; p is pulled back from the output.

    Args:
        stages: All stages of the network.
        costate: p_T, the gradient at the output of the loss or divergence.
    """
    p: Tangent = (costate.unsqueeze(0),)
    # Parameters and inputs have no layer before them: their cotangents would be thrown away.
    made = {i for stage in stages for bound in stage.nodes for i in bound.outputs}
    curved: list[NetworkStage] = []
    for stage in reversed(stages):
        sums = {i: c for i, c in zip(stage.next_ids, p, strict=True) if c is not None}
        curvatures: list[Curvature | None] = []
        for bound in reversed(stage.nodes):
            cotangents = [sums.pop(i, None) for i in bound.outputs]
            if all(c is None for c in cotangents):
                curvatures.append(None)
                continue
            costates = [None if c is None else c[0] for c in cotangents]
            curvatures.append(bound.node.curvature_all(costates))
            needed = [i in made for i in bound.inputs]
            pulled = bound.node.pull_all(cotangents, needed, [None] * len(needed))
            _accumulate(sums, bound.inputs, pulled, made)
        p = tuple(sums.get(i) for i in stage.state_ids)
        curved.append(replace(stage, curvatures=tuple(reversed(curvatures))))
    return curved[::-1]
