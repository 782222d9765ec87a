"""How long a preconditioned gradient is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Graft = Literal["layer", "kl", "none"]


def graft_to_layers(parts: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> None:
    """Scales `made`, in place, to the 2-norm of `parts` in every layer; NaN or 0 becomes 0.

    A layer is a module that owns parameters. The base optimizer's learning rate then means what it
    meant without a preconditioner. (Grafting, Agarwal et al. 2020; per layer as in Distributed
    Shampoo.) Reads no device.
    """
    names = list(made)
    owners = [name.rpartition(".")[0] for name in names]
    places = {owner: i for i, owner in enumerate(dict.fromkeys(owners))}
    device = made[names[0]].device
    index = torch.tensor([places[owner] for owner in owners], device=device)

    def squared(tensors: Mapping[str, Tensor]) -> Tensor:
        """The squared norms of the layers."""
        norms = torch._foreach_norm([tensors[n] for n in names], 2, dtype=_wide(made))
        by_name = torch.stack(norms).square()
        return by_name.new_zeros(len(places)).index_add_(0, index, by_name)

    wanted, got = squared(parts), squared(made)
    factors = torch.where(got > 0, (wanted / got).sqrt(), torch.zeros_like(got))
    for name, factor in zip(names, factors[index].unbind(), strict=True):
        made[name].mul_(factor)


def clip_kl(
    parts: Mapping[str, Tensor],
    made: Mapping[str, Tensor],
    rates: Mapping[str, float],
    limit: float,
) -> None:
    """Scales `made` = M g, in place, so that sum lr^2 g'M g <= limit.

    That sum is about twice the KL divergence of the step (Ba et al. 2017, as in K-FAC).

    Args:
        parts: g, by name.
        made: M g, by name.
        rates: lr, by name.
        limit: See above.
    """
    wide = _wide(made)
    terms = [
        rates[n] ** 2 * (parts[n].to(wide) * m.to(wide)).sum(dtype=torch.float64)
        for n, m in made.items()
    ]
    size = torch.stack(terms).sum()
    factor = (limit / size.clamp(min=torch.finfo(size.dtype).tiny)).sqrt().clamp(max=1)
    for part in made.values():
        part.mul_(factor)


def _wide(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The widest dtype, float32 at least."""
    wide = torch.float32
    for dtype in {t.dtype for t in tensors.values()}:
        wide = torch.promote_types(wide, dtype)
    return wide
