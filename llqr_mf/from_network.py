"""A problem from a network: checks, one linearisation, costs from the metric."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from linear_operator import LinearOperator
from linear_operator.operators import ConstantDiagLinearOperator
from torch import Tensor

from .damping import control_cost
from .errors import FailedCallError, StaleLayersError
from .losses import get_loss
from .metrics import get_metric
from .network import Layer, Linearization, NetworkStage, build_stages, linearize, with_curvature
from .network.checks import (
    ModelRun,
    check_batch,
    check_finite,
    check_layers,
    check_same_function,
)
from .operators import ControlCost, StateCost, System
from .operators.apply import checked_operator
from .operators.output_curvature import OutputCurvature
from .operators.tangent import Tangent
from .origin import NetworkOrigin

if TYPE_CHECKING:
    from .problem import LQRProblem


def network_problem(
    cls: type[LQRProblem],
    layers: Sequence[Layer],
    inputs: Any,
    targets: Tensor,
    *,
    loss: Any,
    metric: Any,
    damping: Any,
    columns: int | None,
    check: bool,
    checkpoint: bool,
    may_be_flat: bool = False,
) -> LQRProblem:
    """Builds the problem; see `LQRProblem.from_network`.

    With `may_be_flat`, curvature that is zero goes without a warning.
    """
    if columns is not None and columns < 1:
        raise ValueError(f"columns is {columns}: give at least 1 per pass, or None.")
    the_loss, the_metric = get_loss(loss), get_metric(metric)
    check_layers(layers)
    batch = inputs if isinstance(inputs, tuple) else (inputs,)
    check_batch(layers[0].program, batch, targets)
    if checkpoint and the_metric.may_curve:
        raise ValueError(
            "checkpoint=True goes with Gauss-Newton and Fisher metrics only: the second "
            "derivatives of this one hold every activation. Leave it out, or use a "
            "StreamedProblem of smaller batches."
        )
    # Before the layers run: its activations are gone when theirs are held.
    run = ModelRun(layers[0].program, batch) if check else None
    try:
        linearization = linearize(
            layers, batch, second_order=the_metric.may_curve, checkpoint=checkpoint
        )
    except FailedCallError as error:
        if run is not None and run.succeeded:
            raise StaleLayersError(
                f"{error} The model itself takes it: if anything about the model has changed since "
                "split(), call split() again."
            ) from error
        raise
    outputs = linearization.outputs
    check_finite(layers[0].program.model, outputs)
    the_loss.check(outputs, targets)
    if run is not None:
        check_same_function(layers[0].program, batch, outputs, run)
    model = the_metric.cost_model(the_loss, outputs, targets)
    tensors = layers[0].program.read()
    proto = outputs.new_empty(0, dtype=tensors[linearization.parameters[0]].dtype)
    tensors |= {f"inputs[{i}]": x for i, x in enumerate(batch) if isinstance(x, Tensor)}
    stages = build_stages(linearization, proto, tensors)
    if model.costate is not None:
        with torch.no_grad():
            stages = with_curvature(stages, model.costate)
    system = _system(linearization, stages, proto)
    system = _with_costs(system, layers, model, len(outputs))
    if not may_be_flat:
        warn_if_flat(flat_curvature(system))
    names = [layer.name for layer in layers]
    system = replace(system, control_cost=control_cost(damping, system, names))
    linear: list[Tangent] = [
        tuple(None for _ in system.state_shapes(t)) for t in range(system.horizon)
    ]
    linear.append((the_loss.gradient(outputs, targets),))
    origin = NetworkOrigin(
        layers=tuple(layers),
        loss=the_loss,
        metric=the_metric,
        outputs=outputs,
        loss_value=the_loss.value(outputs, targets).detach(),
        totals=the_loss.totals(outputs, targets),
        linearization=linearization,
    )
    return cls.__new__(cls)._assemble(
        system, linearization.parameters, linear, None, None, origin, columns
    )


def flat_curvature(system: System) -> str | None:
    """What is zero, if a system has no curvature and that is known."""
    costs = system.state_costs[-1]
    if system.curved or len(costs) != 1 or not isinstance(costs[0].operator, OutputCurvature):
        return None
    return costs[0].operator.flat


def warn_if_flat(what: str | None) -> None:
    """Warns of curvature that is zero."""
    if what is not None:
        warnings.warn(
            f"{what} is zero, as of a loss that is linear in them, so that a step is the "
            "gradient divided by the damping: use metric='newton' or 'empirical_fisher', or a "
            "model that returns logits with a named loss.",
            UserWarning,
            stacklevel=4,
        )


def _system(linearization: Linearization, stages: Sequence[NetworkStage], proto: Tensor) -> System:
    blocks = tuple(linearization.shapes[i] for i in range(len(linearization.parameters)))
    return System(
        stages=tuple(stages),
        state_costs=((),) * (len(stages) + 1),
        control_cost=ControlCost((), ()),
        blocks=blocks,
        owned=tuple(stage.control_ids for stage in stages),
        proto=proto,
    )


def _with_costs(system: System, layers: Sequence[Layer], model: Any, samples: int) -> System:
    costs: list[tuple[StateCost, ...]] = list(system.state_costs)
    names = [layer.name for layer in layers]
    for key, value in model.state_costs.items():
        if isinstance(key, int) and key < len(layers):
            t = key
        elif key in names:
            t = names.index(key)
        else:
            raise ValueError(f"the metric puts a cost on '{key}', which is no layer of {names}.")
        stage = system.stages[t]
        assert isinstance(stage, NetworkStage)
        component = stage.own_output()
        if component is None:
            raise ValueError(
                f"the metric puts a cost on layer '{names[t]}', whose output no later layer reads."
            )
        size = int(torch.Size(stage.next_state[component]).numel())
        costs[t + 1] = (
            *costs[t + 1],
            StateCost(_state_cost(value, size, samples, system, key), component),
        )
    if model.terminal is not None:
        costs[-1] = (*costs[-1], StateCost(model.terminal))
    return replace(system, state_costs=tuple(costs))


def _state_cost(
    value: float | LinearOperator | Tensor, size: int, samples: int, system: System, key: Any
) -> LinearOperator:
    if isinstance(value, int | float):
        weight = system.proto.new_full((1,), value / samples)
        return ConstantDiagLinearOperator(weight, diag_shape=size)
    what = f"the cost on layer '{key}'"
    return checked_operator(value, (size, size), what, system.proto, symmetric=True)
