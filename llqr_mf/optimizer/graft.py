"""How long a preconditioned gradient is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..solvers.dots import row_dots

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

    def layers(tensors: Mapping[str, Tensor]) -> Tensor:
        """The norms of the layers."""
        by_name = _norms([tensors[n] for n in names])
        largest = by_name.new_zeros(len(places)).scatter_reduce_(0, index, by_name, "amax")
        shares = (by_name / _nonzero(largest)[index]).square()
        return largest * torch.zeros_like(largest).index_add_(0, index, shares).sqrt()

    wanted, got = layers(parts), layers(made)
    factors = torch.where(got > 0, wanted / got, torch.zeros_like(got))
    for name, factor in zip(names, factors[index].unbind(), strict=True):
        _stretch(made[name], factor)


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
    terms = [
        rates[n] ** 2 * row_dots(parts[n].reshape(1, -1), m.reshape(1, -1)).squeeze()
        for n, m in made.items()
    ]
    size = torch.stack(terms).sum()
    factor = (limit / size.clamp(min=torch.finfo(size.dtype).tiny)).sqrt().clamp(max=1)
    # A sum that overflows is no reason for a step of zero: the caller skips what is NaN.
    factor = torch.where(size.isfinite(), factor, torch.full_like(factor, torch.nan))
    for part in made.values():
        _stretch(part, factor)


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """2-norms, float64, none of which over- or underflows."""
    if all(t.dtype != torch.float64 for t in tensors):
        # The squares of any narrower dtype fit into float64.
        return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float64))
    largest = torch.stack(torch._foreach_norm(list(tensors), torch.inf, dtype=torch.float64))
    units = torch._foreach_div(list(tensors), list(_nonzero(largest).unbind()))
    return largest * torch.stack(torch._foreach_norm(units, 2, dtype=torch.float64))


def _nonzero(x: Tensor) -> Tensor:
    """One for zero."""
    return torch.where(x == 0, torch.ones_like(x), x)


def _stretch(part: Tensor, factor: Tensor) -> None:
    """Multiplies by a float64 number, in two steps: it may lie beyond the part's own range."""
    root = factor.sqrt()
    part.mul_(root).mul_(root)
