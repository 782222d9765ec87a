"""A Kronecker product of small positive-definite matrices for every weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import Parts, Structure
from .blueprint import Like
from .chart import Chart
from .saved import check_definite
from .sites import Biases, Kernels, Site, side_moments, sites, times_side
from .spd import clip_eigenvalues, spd_inverse, spd_logdet, spd_root, symmetrised


class Kronecker(Structure):
    """M = F_0 (x) F_1 (x) ... on every weight, F_s symmetric positive definite, one per side.

    With row-major vec, as tensors are stored, and sides (out, in): M vec(V) = vec(G V A) with
    G = F_0 and A = F_1 (Martens and Grosse 2015, where M is the inverse of the product of the two
    covariances). A side that is too large, or a vocabulary, has a diagonal factor; vectors have a
    diagonal. Starts at the identity.

    Tensors: "{weight}.factor{side}", (n, n) or (n,); "{name}.diagonal", (n,), for vectors.

    Args:
        like: What it is made for.
        biases: "joined" takes a bias as one more input of its weight, "diagonal" as a vector.
        kernels: A convolution as the matrix (out, in * kernel), as the tensor (out, in, kernel), or
            as the matrix where in * kernel <= max_side ("auto").
        max_side: A larger side gets a diagonal factor.

    Raises:
        ValueError: An option is unknown.
    """

    kind = "kronecker"

    def __init__(
        self,
        like: Like,
        *,
        biases: Biases = "joined",
        kernels: Kernels = "auto",
        max_side: int = 2048,
    ) -> None:
        super().__init__(like)
        self.sites = sites(self.blueprint, biases=biases, kernels=kernels, max_side=max_side)
        proto = self._proto
        for site in self.sites:
            for side, (n, full) in enumerate(zip(site.sides, site.full, strict=True)):
                one = torch.eye(n, dtype=proto.dtype, device=proto.device)
                self.tensors[factor_name(site, side)] = one if full else proto.new_ones(n)

    def factors(self, site: Site) -> list[Tensor]:
        """F_0, F_1, ... of a site: (n, n) each, or (n,) for a diagonal."""
        return [self.tensors[factor_name(site, side)] for side in range(len(site.sides))]

    def times_parts(self, parts: Mapping[str, Tensor]) -> Parts:
        """Every factor applied to its side."""
        made: Parts = {}
        for site in self.sites:
            made.update(site.scatter(times_sides(site.gather(parts), self.factors(site))))
        return made

    def _diagonal(self) -> Tensor:
        made: Parts = {}
        for site in self.sites:
            ones = self._proto.new_ones(1, *site.sides)
            diagonals = [_diagonal_of(factor) for factor in self.factors(site)]
            made.update(site.scatter(times_sides(ones, diagonals)))
        return self.join(made, self._proto.new_empty(1, 0))[0]

    @torch.no_grad()
    def inverse(self) -> Kronecker:
        """The Kronecker product of the inverses, each by Cholesky in float64."""
        other = self._bare()
        other.tensors = {
            name: 1 / factor if factor.ndim == 1 else spd_inverse(factor, name)
            for name, factor in self.tensors.items()
        }
        return other

    @torch.no_grad()
    def root(self) -> Kronecker:
        """The Kronecker product of the symmetric roots, each by eigenvalues in float64."""
        other = self._bare()
        other.tensors = {
            name: factor.sqrt() if factor.ndim == 1 else spd_root(factor, name)
            for name, factor in self.tensors.items()
        }
        return other

    @torch.no_grad()
    def logdet(self) -> Tensor:
        """The sum over sites and sides of (site size / n_s) log det F_s."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for site in self.sites:
            for side, factor in enumerate(self.factors(site)):
                name = factor_name(site, side)
                own = factor.double().log().sum() if factor.ndim == 1 else spd_logdet(factor, name)
                total += math.prod(site.sides[:side] + site.sides[side + 1 :]) * own
        return total

    @torch.no_grad()
    def scale_(self, c: float) -> None:
        """Multiplies the first factor of every site by c."""
        self.check_scale(c)
        for site in self.sites:
            self.tensors[factor_name(site, 0)].mul_(c)

    @torch.no_grad()
    def balance_(self) -> None:
        """Gives the factors of each site the same mean trace; M stays as it is."""
        for site in self.sites:
            for factor, scale in zip(self.factors(site), self._balance(site), strict=True):
                factor.mul_(scale)

    def _balance(self, site: Site) -> list[Tensor]:
        """What to multiply the factors of a site by, so that they have the same mean trace."""
        if len(site.sides) == 1 or site.size == 0:
            return [self._proto.new_ones(())] * len(site.sides)
        means = torch.stack([_diagonal_of(factor).mean() for factor in self.factors(site)])
        return list((means.log().mean() - means.log()).exp())

    @torch.no_grad()
    def blend_(self, other: Kronecker, weight: float) -> None:
        """The mean of the factors, once both are balanced (`balance_`).

        The products of factors are no linear space; the mean of positive-definite factors is
        positive definite, and balancing makes it free of how a scale is shared among factors.
        """
        self.check_blend(other, weight)
        self.balance_()
        for site in self.sites:
            pairs = zip(self.factors(site), other.factors(site), other._balance(site), strict=True)
            for mine, theirs, scale in pairs:
                mine.lerp_(theirs * scale, weight)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        """All factors are positive definite."""
        for name, tensor in tensors.items():
            check_definite(name, tensor)

    def charts(self) -> Sequence[Chart]:
        """For each side, the factors of all sites on that side at once."""
        most = max((len(site.sides) for site in self.sites), default=0)
        return tuple(_FactorChart(self, side) for side in range(most))


def factor_name(site: Site, side: int) -> str:
    """Under which name a factor is held."""
    return f"{site.name}.diagonal" if len(site.sides) == 1 else f"{site.name}.factor{side}"


def times_sides(x: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """A matrix, a diagonal or nothing on every side of x, (k, *sides)."""
    for side, matrix in enumerate(matrices):
        if matrix is not None:
            x = times_side(x, matrix, side)
    return x


def _diagonal_of(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 1 else factor.diagonal()


class _FactorChart(Chart):
    """The factors on one side of every site that has it; matrices flattened, both triangles.

    Coordinates are read as their symmetric part, and those that come out are symmetric.
    """

    def __init__(self, structure: Kronecker, side: int) -> None:
        self.structure, self.side = structure, side
        self.sites = [site for site in structure.sites if side < len(site.sides)]
        self.others = [site for site in structure.sites if side >= len(site.sides)]

    def _held(self) -> list[Tensor]:
        return [self.structure.tensors[factor_name(site, self.side)] for site in self.sites]

    def _read(self, phi: Tensor) -> list[Tensor]:
        held = self._held()
        parts = phi.split([factor.numel() for factor in held])
        shaped = [part.reshape(f.shape) for part, f in zip(parts, held, strict=True)]
        return [symmetrised(f) if f.ndim == 2 else f for f in shaped]

    def _other_factors(self, site: Site) -> list[Tensor | None]:
        factors: list[Tensor | None] = [*self.structure.factors(site)]
        factors[self.side] = None
        return factors

    def get(self) -> Tensor:
        return _flat(self._held())

    def put(self, phi: Tensor) -> None:
        for factor, values in zip(self._held(), self._read(phi), strict=True):
            factor.copy_(values)

    def times(self, phi: Tensor, v: Tensor) -> Tensor:
        parts = self.structure.split(v)
        made = {name: torch.zeros_like(part) for name, part in parts.items()}
        for site, factor in zip(self.sites, self._read(phi), strict=True):
            x = times_sides(site.gather(parts), self._other_factors(site))
            made.update(site.scatter(times_side(x, factor, self.side)))
        return self.structure.join(made, v)

    def rest(self, v: Tensor) -> Tensor:
        parts = self.structure.split(v)
        made = {name: torch.zeros_like(part) for name, part in parts.items()}
        for site in self.others:
            x = times_sides(site.gather(parts), self.structure.factors(site))
            made.update(site.scatter(x))
        return self.structure.join(made, v)

    def pull(self, v: Tensor, w: Tensor) -> Tensor:
        ours, theirs = self.structure.split(v), self.structure.split(w)
        made = []
        for site, factor in zip(self.sites, self._held(), strict=True):
            x = times_sides(site.gather(ours), self._other_factors(site))
            y = site.gather(theirs)
            full = factor.ndim == 2
            moments = side_moments(y, x, self.side, full=full)
            made.append(symmetrised(moments) if full else moments)
        return _flat(made)

    def project(self, phi: Tensor, floor: float) -> Tensor:
        made = []
        for factor, now in zip(self._read(phi), self._held(), strict=True):
            least = floor * float(_diagonal_of(now).mean())
            clipped = clip_eigenvalues(factor, least) if factor.ndim == 2 else None
            made.append(factor.clamp(min=least) if clipped is None else clipped)
        return _flat(made)

    def mass(self) -> Tensor:
        made = []
        for site, factor in zip(self.sites, self._held(), strict=True):
            others = [f for f in self._other_factors(site) if f is not None]
            norm = math.prod(float(f.square().sum()) for f in others)
            made.append(torch.full_like(factor, norm))
        return _flat(made)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
