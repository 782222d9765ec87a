"""What holds while a curvature pass runs a model, and is put back after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


class _BatchStatisticsStay(TorchFunctionMode):
    """Train-mode normalisation without the running statistics, which it would move."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.batch_norm and args[5]:
            args = (*args[:3], None, None, *args[5:])
        elif func is torch.instance_norm and args[5]:
            args = (*args[:3], None, None, *args[5:])
        return func(*args, **(kwargs or {}))


@contextmanager
def curvature_pass(device: torch.device) -> Iterator[None]:
    """Attention by the MATH backend, batch statistics fixed, random state put back.

    The fused attention kernels have neither a forward-mode derivative nor a second backward. The
    random state is the caller's at entry, so dropout draws the masks that the model's own next
    forward would draw, and it is the same again at exit.
    """
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        sdpa_kernel(SDPBackend.MATH),
        _BatchStatisticsStay(),
    ):
        yield
