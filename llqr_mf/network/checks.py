"""What is wrong with a batch or a model, said before anything is computed from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import NotFiniteError, StaleLayersError
from ..layout import check_real
from .copies import shared_copy
from .modes import curvature_pass
from .split import Layer
from .tracing import Program


def check_layers(layers: Sequence[Layer]) -> None:
    """All layers of one split, in the mode they were traced in.

    Raises:
        ValueError: They are not, or the model has no trainable parameter.
        StaleLayersError: A mode is another one.
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
        raise StaleLayersError(
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


def check_same_function(
    program: Program, inputs: tuple[Any, ...], outputs: Tensor, found: ModelRun | None = None
) -> None:
    """The layers compute what the model does, by the same calls, and it does it again the same.

    Args:
        program: The model that was split.
        inputs: A batch.
        outputs: The layers' outputs on it.
        found: A run of the model on it, if there was one.

    Raises:
        ValueError: The outputs differ between two runs from the same random state.
        StaleLayersError: They differ from those of the layers, or the calls do.
    """
    run = found or ModelRun(program, inputs)
    first = run.outputs()
    if close(first, outputs):
        check_same_calls(program)
        return
    if not close(first, run.again()):
        raise ValueError(
            "the model is not deterministic: two runs on the same batch from the same random state "
            "differ. Take out whatever changes between calls (a counter, random numbers that do "
            "not come from torch)."
        )
    raise StaleLayersError(
        "the layers compute something else than the model does: an attribute of the model has "
        "changed since split(), so call split() again; or its code depends on more than its inputs "
        "and parameters (branches on values, constants made while it was traced), so pass such a "
        "module as one layer, in a list of layers, or give split() its `cuts`."
    )


def check_same_calls(program: Program) -> None:
    """The model makes the calls that were traced, as far as its attributes tell.

    Raises:
        StaleLayersError: It does not.
    """
    changed = program.changed_attribute()
    if changed is not None:
        raise StaleLayersError(
            f"'{changed}' of the model has changed since split(), and its calls with it, so that "
            "derivatives would be of others: call split() again."
        )


class ModelRun:
    """A forward pass of a copy of the model, as in training but for what it would leave behind.

    An error of the model's own is kept until the outputs are asked for: the layers may say more
    about it.

    Args:
        program: The model that was split.
        inputs: A batch, which is not written to.
    """

    def __init__(self, program: Program, inputs: tuple[Any, ...]) -> None:
        self._program, self._inputs = program, inputs
        self._twin = shared_copy(program.model)
        self._error: Exception | None = None
        try:
            self._outputs = self.again()
        except Exception as error:
            self._error = error

    @property
    def succeeded(self) -> bool:
        """Whether the model takes the batch."""
        return self._error is None

    def outputs(self) -> Any:
        """What the model gave.

        Raises:
            Exception: What the model raised.
        """
        if self._error is not None:
            raise self._error
        return self._outputs

    def again(self) -> Any:
        """What the same copy gives now."""
        tensors = [x for x in self._inputs if isinstance(x, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        buffers = {name: b.clone() for name, b in self._twin.named_buffers()}
        with torch.enable_grad(), curvature_pass(device, stateful=self._program.stateful):
            made = torch.func.functional_call(self._twin, buffers, copies(self._inputs))
        return made.detach() if isinstance(made, Tensor) else made


def copies(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A batch for code that may write to it."""
    return tuple(tree_map_only(Tensor, torch.clone, inputs))


def close(a: Any, b: Tensor) -> bool:
    """Whether outputs are the same but for rounding: of fused and unfused kernels, many deep."""
    if not isinstance(a, Tensor) or a.shape != b.shape:
        return False
    eps = torch.finfo(b.dtype).eps
    # Half precisions have few digits to lose, float64 more than any change has that is meant.
    tolerance = {torch.float64: 1e5, torch.float32: 1e3}.get(b.dtype, 16.0) * eps
    difference = (a - b).abs().masked_fill(a == b, 0)  # -inf - (-inf) is NaN
    size = b.abs().masked_fill(b.isinf(), 0)
    top = size.max()
    # A number that stands for -inf (-1e9, finfo.min) would hide the others.
    others = size < top / 2
    largest = (size * others).max()
    apart = others & (top >= 1e3) & (largest > 0) & (largest <= top / 1e3)
    return bool((difference <= tolerance * torch.where(apart, largest, top)).all())
