"""Models that are not what they seem: wrapped, compiled, sharded or not made yet."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

_PARALLEL = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}
"""They spread a batch; torch's own classes, known by name because some need a build with them."""
_GATHER = (
    "only whole tensors are linearized. Gather the weights into a plain copy of the model "
    "(p.full_tensor()), and put the step back with distribute_tensor."
)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what torch.compile returned."""
    return type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")


def check_plain(model: nn.Module) -> None:
    """The model runs its own code on whole tensors.

    Raises:
        ValueError: It does not; the message says what to pass in its place.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("a ScriptModule has no Python code to trace: split the original module.")
    if is_compiled(model):
        raise ValueError(
            "model was compiled, and compiled code has no second backward pass: give the module "
            "that torch.compile got (model._orig_mod). It shares the weights, and the compiled one "
            "can go on being trained."
        )
    for path, module in model.named_modules():
        kinds = {base.__name__ for base in type(module).__mro__}
        where = f"'{path}'" if path else "model"
        if kinds & _PARALLEL:
            raise ValueError(
                f"{where} is a {type(module).__name__}, which spreads a batch over devices or "
                "processes: give the module inside it (.module)."
            )
        if "FSDPModule" in kinds:
            raise ValueError(f"{where} is sharded by fully_shard: {_GATHER}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise ValueError(
                f"'{name}' is not initialized: run the model on a batch once, so that its lazy "
                "modules know their sizes."
            )
        if hasattr(tensor, "placements") and hasattr(tensor, "full_tensor"):
            raise ValueError(
                f"'{name}' is a DTensor, sharded by parallelize_module or fully_shard: {_GATHER}"
            )
        if tensor.is_meta:
            raise ValueError(
                f"'{name}' is on the meta device and holds no numbers: make it with "
                "model.to_empty(device=...) and load the weights."
            )
