"""How a structure is learned from a batch."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

Learn = Literal["closed_form", "cg", "momentum"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How M is learned from a batch.

    Args:
        learn: "closed_form": the inverse of a running mean of the curvature in the form of the
            structure (Jacobi, K-FAC, EKFAC). "cg": that, then `fit` on the LQR objective, with its
            cross-layer terms, kept only if the objective on a held-out batch falls. "momentum":
            the LLQR authors' recipe alone, kept likewise.
        damping: lambda, added to the mean curvature.
        ema: The share that the past keeps at a refresh, once there have been 1 / (1 - ema) of them;
            before, all refreshes count alike.
        samples: Draws of random signs per refresh, for the curvature's second moments; None for
            all outputs.
        probes: Random-sign probes, for the weights that have no closed form and for "cg".

    Raises:
        ValueError: A number is out of its range.
    """

    learn: Learn = "closed_form"
    damping: float = 1e-3
    ema: float = 0.8
    samples: int | None = 1
    probes: int = 4

    def __post_init__(self) -> None:
        if self.learn not in ("closed_form", "cg", "momentum"):
            raise ValueError(f"learn={self.learn!r}: choose 'closed_form', 'cg' or 'momentum'.")
        if not (isinstance(self.damping, Real) and 0 < self.damping < float("inf")):
            raise ValueError(f"damping is {self.damping!r}: give a finite number > 0.")
        if not (isinstance(self.ema, Real) and 0 <= self.ema < 1):
            raise ValueError(f"ema is {self.ema!r}: it is a share, from 0 to less than 1.")
        for name, count in (("samples", self.samples), ("probes", self.probes)):
            if name == "samples" and count is None:
                continue
            if not (isinstance(count, Integral) and count >= 1):
                raise ValueError(f"{name} is {count!r}: give a whole number, at least 1.")
