"""What holds while a curvature pass runs a model, and is put back after."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

LOCK = threading.RLock()
"""Held by whatever changes a state of the whole process for a moment: the random state, torch's
choice of an attention kernel, the classes that `torch.fx` patches."""

_BATCH_FLAGS: dict[Any, str] = {F.batch_norm: "training", F.instance_norm: "use_input_stats"}
STATEFUL = {*_BATCH_FLAGS, torch.batch_norm, torch.instance_norm, torch._weight_norm}
"""Functions that a curvature pass must run in another way."""

FAST_PATHS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""Modules with a way of their own where nothing is differentiated: it zeroes what is padded, which
training does not. They leave it while any `TorchFunctionMode` is on."""

_SIGNATURES = {f: inspect.signature(f) for f in _BATCH_FLAGS}


class _Differentiable(TorchFunctionMode):
    """Train-mode norms without the running statistics, and weight norm without its fused kernel.

    A train-mode norm would move the statistics. The fused kernel's second backward is silently
    wrong on torch 2.13 (found against finite differences; test_split.py holds the case).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _BATCH_FLAGS:
            bound = _SIGNATURES[func].bind(*args, **kwargs)
            bound.apply_defaults()
            if bound.arguments[_BATCH_FLAGS[func]]:
                bound.arguments.update(running_mean=None, running_var=None)
            return func(*bound.args, **bound.kwargs)
        if func in (torch.batch_norm, torch.instance_norm) and args[5]:
            args = (*args[:3], None, None, *args[5:])
        elif func is torch._weight_norm:
            return _weight_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Attention by the MATH backend: fused kernels have no second backward.

    Torch keeps the choice for the whole process: attention that another thread runs meanwhile is
    rounded otherwise. The lock makes sure that what it was is put back.
    """
    with LOCK, sdpa_kernel(SDPBackend.MATH):
        yield


def random_states(device: torch.device) -> list[torch.Tensor]:
    """The random state of the CPU, and of a model's GPU."""
    on_gpu = device.type == "cuda"
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_gpu else [])]


def set_random_states(states: list[torch.Tensor], device: torch.device) -> None:
    """Puts `random_states` back."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


@contextmanager
def curvature_pass(device: torch.device, *, stateful: bool = True) -> Iterator[None]:
    """Attention by the MATH backend, batch statistics fixed, random state put back.

    The random state is the caller's at entry, so dropout draws the masks that the model's own next
    forward would draw, and it is the same again at exit. It is one for all threads, as torch has
    it: what another thread draws meanwhile is drawn again after.

    Args:
        device: Whose random state.
        stateful: Whether the model may call any of `STATEFUL`, or has any of `FAST_PATHS`.
            Watching for them costs some microseconds a call, which small networks feel.
    """
    devices = [device] if device.type == "cuda" else []
    with (
        differentiable_attention(),
        torch.random.fork_rng(devices=devices),
        _Differentiable() if stateful else nullcontext(),
    ):
        yield
