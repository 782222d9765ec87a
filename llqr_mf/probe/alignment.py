"""Where a gradient points among the eigenvectors of the curvature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..solvers.dots import row_dots, row_norms
from .eigenvalues import Eigenpairs


@dataclass(frozen=True, eq=False)
class Alignment:
    """The share of a gradient in each of some eigenvectors.

    Args:
        values: Their eigenvalues, (k,).
        shares: (v_i'g)^2 / |g|^2, float64, (k,).
        uniform: What a random direction has in each, 1 / n.
        norm: |g|.
    """

    values: Tensor
    shares: Tensor
    uniform: float
    norm: float

    @property
    def cumulative(self) -> Tensor:
        """The share in the span of the first 1, 2, ..., k of them."""
        return self.shares.cumsum(0)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "values": self.values.tolist(),
            "shares": self.shares.tolist(),
            "cumulative": self.cumulative.tolist(),
            "uniform": self.uniform,
            "norm": self.norm,
        }

    def __str__(self) -> str:
        lines = [f"|g| = {self.norm:.4g}; a random direction has {self.uniform:.1e} in each"]
        lines.append(f"{'eigenvalue':>14}{'share':>12}{'so far':>12}")
        rows = zip(*(x.tolist() for x in (self.values, self.shares, self.cumulative)), strict=True)
        lines += [f"{value:14.5g}{share:12.2e}{total:12.4f}" for value, share, total in rows]
        return "\n".join(lines)


@torch.no_grad()
def gradient_alignment(gradient: Tensor, pairs: Eigenpairs) -> Alignment:
    """How much of a gradient lies along eigenvectors (Gur-Ari, Roberts and Dyer 2018).

    Args:
        gradient: Flat, (n,); `problem.gradient`, or that of other data.
        pairs: What `eigenvalues` gave.

    Raises:
        ValueError: The gradient has another length, or is zero or not finite.
    """
    n = len(pairs.vectors)
    if gradient.shape != (n,):
        raise ValueError(f"the gradient has shape {tuple(gradient.shape)}, not ({n},).")
    g = gradient.unsqueeze(0)
    norm = float(row_norms(g))
    if not 0 < norm < float("inf"):
        raise ValueError(f"the gradient has the norm {norm}: it has no direction.")
    cosines = [row_dots(v.unsqueeze(0), g.to(v))[0] / norm for v in pairs.vectors.mT]
    return Alignment(pairs.values, torch.stack(cosines).cpu().square(), 1 / n, norm)
