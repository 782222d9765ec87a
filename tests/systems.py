"""A split network as a bare system, without losses or metrics."""

from __future__ import annotations

import math
from typing import Any

import torch
from llqr_mf.operators import ControlCost, System
from networks import as_tuple
from torch import Tensor, nn

from llqr_mf.network import Layer, Linearization, build_stages, linearize, split, with_curvature


def system_of(
    model: nn.Module | list[Any],
    inputs: Any,
    costate: Tensor | None = None,
    layers: list[Layer] | None = None,
) -> tuple[System, Linearization]:
    """The system without costs, or with the curvature of <costate, network> alone."""
    layers = split(model) if layers is None else layers
    linearization = linearize(layers, as_tuple(inputs), second_order=costate is not None)
    proto = linearization.outputs.new_empty(0)
    stages = build_stages(linearization, proto)
    if costate is not None:
        with torch.no_grad():
            stages = with_curvature(stages, costate)
    blocks = tuple(linearization.shapes[i] for i in range(len(linearization.parameters)))
    system = System(
        stages=tuple(stages),
        state_costs=((),) * (len(stages) + 1),
        control_cost=ControlCost.scalar(0.0, [math.prod(shape) for shape in blocks]),
        blocks=blocks,
        owned=tuple(stage.control_ids for stage in stages),
        proto=proto,
    )
    return system, linearization
