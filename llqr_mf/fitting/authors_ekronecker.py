"""The E-Kronecker structure as the authors of LLQR learn it: nothing in it is constrained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..preconditioners.base import Parts, Structure
from ..preconditioners.blueprint import Like
from ..preconditioners.kronecker import times_sides
from ..preconditioners.sites import Kernels, Site, sites


class AuthorsEKronecker(Structure):
    """M G = Q_out [D o (Q_out' G Q_in)] Q_in' on every weight, with Q and D all free.

    The control for `EKronecker`, whose bases are orthogonal and whose D is positive: Dufort-Labbe
    et al. (arXiv:2605.04230) start Q at the identity and D at one, and learn all three by momentum
    (`fit` with method="momentum"; no other method knows it). M is symmetric, **but may be
    indefinite**: -M g need not be a descent direction. Vectors and vocabulary sides have no Q.

    Tensors: "{weight}.q{side}", (n, n), and "{name}.d" in the weight's sides.

    Args:
        like: What it is made for.
        kernels: As in `EKronecker`.
        max_side: A larger side has no Q.
    """

    kind = "authors_ekronecker"

    def __init__(self, like: Like, *, kernels: Kernels = "auto", max_side: int = 2048) -> None:
        super().__init__(like)
        self.sites = sites(self.blueprint, biases="diagonal", kernels=kernels, max_side=max_side)
        proto = self._proto
        for site in self.sites:
            for side, (n, full) in enumerate(zip(site.sides, site.full, strict=True)):
                if full:
                    one = torch.eye(n, dtype=proto.dtype, device=proto.device)
                    self.tensors[f"{site.name}.q{side}"] = one
            self.tensors[f"{site.name}.d"] = proto.new_ones(site.sides)

    def _q(self, site: Site) -> list[Tensor | None]:
        return [self.tensors.get(f"{site.name}.q{side}") for side in range(len(site.sides))]

    def times_parts(self, parts: Mapping[str, Tensor]) -> Parts:
        """Q [D o (Q'v)]."""
        made: Parts = {}
        for site in self.sites:
            q = self._q(site)
            inside = times_sides(site.gather(parts), [None if x is None else x.mT for x in q])
            made.update(site.scatter(times_sides(inside * self.tensors[f"{site.name}.d"], q)))
        return made

    def inverse(self) -> Structure:
        """Not to be had: it may be singular.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("nothing keeps the authors' E-Kronecker from being singular.")

    def logdet(self) -> Tensor:
        """Not to be had: it may be indefinite.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("nothing keeps the authors' E-Kronecker from being indefinite.")

    @torch.no_grad()
    def scale_(self, c: float) -> None:
        """Multiplies D by c."""
        self.check_scale(c)
        for site in self.sites:
            self.tensors[f"{site.name}.d"].mul_(c)

    @torch.no_grad()
    def blend_(self, other: AuthorsEKronecker, weight: float) -> None:
        """The mean of every tensor, as the authors average."""
        self.check_blend(other, weight)
        for name, tensor in self.tensors.items():
            tensor.lerp_(other.tensors[name], weight)
