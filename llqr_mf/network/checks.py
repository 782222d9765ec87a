"""What is wrong with a batch or a model, said before anything is computed from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NotFiniteError
from ..layout import check_real
from .copies import shared_copy
from .modes import curvature_pass
from .split import Layer
from .tracing import Program


def check_layers(layers: Sequence[Layer]) -> None:
    """All layers of one split, in the mode they were traced in.

    Raises:
        ValueError: They are not, or the model has no trainable parameter.
    """
    if not layers:
        raise ValueError("layers is empty: pass what split(model) returned.")
    for layer in layers:
        if not isinstance(layer, Layer):
            raise ValueError(f"layers holds a {type(layer).__name__}: pass what split() returned.")
    program = layers[0].program
    calls = {node for node in program.graph.nodes if node.op.startswith("call")}
    held = {node for layer in layers for node in layer.nodes}
    in_order = [layer.index for layer in layers] == list(range(len(layers)))
    if not in_order or held != calls or any(layer.program is not program for layer in layers):
        raise ValueError(
            "layers must be the whole list that one split() returned, in order: for coarser or "
            "finer layers use its `cuts`."
        )
    changed = program.changed_mode()
    if changed is not None:
        raise ValueError(
            f"'{changed}' was switched between train() and eval() after split(): call split() "
            "again."
        )
    trained = [(n, p) for n, p in program.model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("the model has no parameter with requires_grad=True: nothing to step.")
    check_real(trained)


def check_batch(program: Program, inputs: tuple[Any, ...], targets: Any) -> None:
    """As many inputs as the model takes, of one dtype and device, not empty, and finite.

    Raises:
        ValueError: With the argument's or parameter's name, and the remedy.
    """
    named = [(n, p) for n, p in program.model.named_parameters() if p.requires_grad]
    if len(inputs) != program.inputs:
        raise ValueError(
            f"inputs holds {len(inputs)} tensors and split() saw a model that takes "
            f"{program.inputs}: pass a tuple of as many, or give split() the same as "
            "example_inputs."
        )
    first_name, first = named[0]
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode() forbids derivatives: make the problem outside it.")
    if torch.is_autocast_enabled(first.device.type):
        raise ValueError(
            "torch.autocast would lower the precision of the linearisation: make the problem "
            "outside of it, or convert the model."
        )
    for name, parameter in named:
        if parameter.dtype != first.dtype or parameter.device != first.device:
            raise ValueError(
                f"parameter '{name}' is {parameter.dtype} on {parameter.device} and '{first_name}' "
                f"is {first.dtype} on {first.device}: move the model to one dtype and device."
            )
    tensors = [(f"inputs[{i}]", x) for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    if not tensors:
        raise ValueError("inputs holds no tensor: pass one tensor, or a tuple of them.")
    if not isinstance(targets, Tensor):
        raise ValueError(f"targets is a {type(targets).__name__}: pass a tensor.")
    tensors.append(("targets", targets))
    for name, tensor in tensors:
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device} and the parameters on {first.device}: move it with "
                f".to('{first.device}')."
            )
        if tensor.ndim == 0 or tensor.numel() == 0:
            raise ValueError(f"{name} is empty, of shape {tuple(tensor.shape)}: give samples.")
        if tensor.is_floating_point():
            finite = torch.isfinite(tensor)
            if name not in ("inputs[0]", "targets"):
                finite |= torch.isneginf(tensor)  # an additive attention mask
            if not bool(finite.all()):
                raise NotFiniteError(f"{name} has entries that are NaN or infinite.")
            if name.startswith("inputs") and tensor.dtype != first.dtype:
                raise ValueError(
                    f"{name} is {tensor.dtype} and the parameters are {first.dtype}: convert it "
                    f"with .to({first.dtype})."
                )


def check_finite(model: nn.Module, outputs: Tensor) -> None:
    """Real, and no NaN, and no infinity but the -inf that masks a class.

    Raises:
        ValueError: The outputs are complex.
        NotFiniteError: With the parameter that causes it, if one does.
    """
    if outputs.is_complex():
        raise ValueError(
            f"the model's outputs are {outputs.dtype}, and curvature is of real ones: let it "
            "return torch.view_as_real(outputs), and give such targets."
        )
    if bool((outputs.isnan() | outputs.isposinf()).any()):
        bad = [n for n, p in model.named_parameters() if not bool(p.isfinite().all())]
        cause = f"parameter '{bad[0]}' is not finite" if bad else "the forward pass overflows"
        raise NotFiniteError(f"the model's outputs are NaN or infinite: {cause}.")


def check_same_function(program: Program, inputs: tuple[Any, ...], outputs: Tensor) -> None:
    """The layers compute what the model does, and the model does it again the same.

    Raises:
        ValueError: The outputs differ between two runs from the same random state, or differ from
            those of the layers.
    """
    twin = shared_copy(program.model)
    first = _run(twin, inputs, outputs.device)
    if _close(first, outputs):
        return
    if not _close(first, _run(twin, inputs, outputs.device)):
        raise ValueError(
            "the model is not deterministic: two runs on the same batch from the same random state "
            "differ. Take out whatever changes between calls (a counter, random numbers that do "
            "not come from torch)."
        )
    raise ValueError(
        "the layers compute something else than the model does: its code depends on more than its "
        "inputs and parameters (branches on values, constants made while it was traced). Pass "
        "such a module as one layer, in a list of layers, or give split() its `cuts`."
    )


def _run(model: nn.Module, inputs: tuple[Any, ...], device: torch.device) -> Any:
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with torch.no_grad(), curvature_pass(device):
        return torch.func.functional_call(model, buffers, inputs)


def _close(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or a.shape != b.shape:
        return False
    # Fused and unfused kernels round differently, layer after layer.
    tolerance = 1e3 * torch.finfo(b.dtype).eps if b.dtype != torch.bfloat16 else 0.1
    difference = (a - b).abs().masked_fill(a == b, 0)  # -inf - (-inf) is NaN
    size = b.abs().masked_fill(b.isinf(), 0)
    return bool(difference.max() <= tolerance * (1 + size.max()))
