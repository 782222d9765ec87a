"""How long a preconditioned gradient is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Graft = Literal["layer", "kl", "none"]


def graft_to_layers(
    gradients: Mapping[str, Tensor], made: dict[str, Tensor], layers: Sequence[Sequence[str]]
) -> None:
    """Scales the parts of `made`, in place, to the gradient's 2-norm in every layer.

    The base optimizer's learning rate then means what it meant without a preconditioner. (Grafting,
    Agarwal et al. 2020; per layer as in Distributed Shampoo.) Reads no device.
    """
    for names in layers:
        wanted, got = (
            torch.stack(torch._foreach_norm([parts[n] for n in names])).float().norm()
            for parts in (gradients, made)
        )
        factor = torch.where(got > 0, wanted / got, torch.zeros_like(got))
        for name in names:
            made[name].mul_(factor)


def clip_kl(
    gradients: Mapping[str, Tensor],
    made: dict[str, Tensor],
    rates: Mapping[str, float],
    limit: float,
) -> None:
    """Scales `made`, in place, so that sum lr^2 g'M g <= limit.

    That sum is about twice the KL divergence of the step (Ba et al. 2017, as in K-FAC).
    """
    parts = [rates[n] ** 2 * (gradients[n].float() * made[n].float()).sum() for n in made]
    size = torch.stack(parts).sum()
    factor = (limit / size.clamp(min=torch.finfo(size.dtype).tiny)).sqrt().clamp(max=1)
    for part in made.values():
        part.mul_(factor)
