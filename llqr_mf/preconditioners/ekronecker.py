"""A positive diagonal in an orthogonal Kronecker basis, for every weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import FactorizationError
from .base import Parts, Structure
from .blueprint import Like
from .chart import Chart, ElementwiseChart
from .kronecker import times_sides
from .saved import check_orthonormal, check_positive
from .sites import Biases, Kernels, Site, sites

Bases = Mapping[str, Sequence[Tensor | None]]


class EKronecker(Structure):
    """M v = V [D o (V'v)] on every weight, V = V_0 (x) V_1 (x) ... orthogonal, D > 0.

    The eigenbasis of a Kronecker product with a free spectrum (George et al. 2018, EKFAC). A side
    without a basis (too large, a vocabulary, or dropped for memory) keeps its unit vectors; a
    vector has a plain diagonal. Starts at the identity.

    Tensors: "{weight}.basis{side}", (n, n), columns the basis vectors; "{name}.spectrum", D in the
    site's sides.

    Args:
        like: What it is made for.
        biases: "joined" takes a bias as one more input of its weight, "diagonal" as a vector.
        kernels: A convolution as the matrix (out, in * kernel), as the tensor (out, in, kernel), or
            as the matrix where in * kernel <= max_side ("auto").
        max_side: A larger side has no basis.
        max_state: Most numbers held for a site, as a multiple of its weights; bases are dropped,
            largest first, until it holds. With 3, square weights keep both. (One number more is
            let through: with its bias a square weight has sides n and n + 1, and
            n^2 + (n + 1)^2 = 2 n (n + 1) + 1.)
        max_turn: Most that the sides with a basis may add up to; bases are dropped likewise. A
            product with M takes four multiplications and additions per weight times that sum.

    Raises:
        ValueError: An option is unknown, or `max_state` less than the 1 that the spectrum takes.
    """

    kind = "ekronecker"

    def __init__(
        self,
        like: Like,
        *,
        biases: Biases = "joined",
        kernels: Kernels = "auto",
        max_side: int = 2048,
        max_state: float | None = None,
        max_turn: int | None = None,
    ) -> None:
        super().__init__(like)
        if max_state is not None and not max_state >= 1:
            raise ValueError(f"max_state is {max_state}: the spectrum alone takes 1.")
        self.sites = sites(self.blueprint, biases=biases, kernels=kernels, max_side=max_side)
        proto = self._proto
        for site in self.sites:
            for side in _sides_with_basis(site, max_state, max_turn):
                one = torch.eye(site.sides[side], dtype=proto.dtype, device=proto.device)
                self.tensors[f"{site.name}.basis{side}"] = one
            self.tensors[f"{site.name}.spectrum"] = proto.new_ones(site.sides)

    def bases(self, site: Site) -> list[Tensor | None]:
        """V_0, V_1, ... of a site, None where a side has no basis."""
        return [self.tensors.get(f"{site.name}.basis{side}") for side in range(len(site.sides))]

    def spectrum(self, site: Site) -> Tensor:
        """D of a site, in the shape of its sides."""
        return self.tensors[f"{site.name}.spectrum"]

    def rotate(self, parts: Mapping[str, Tensor]) -> Parts:
        """V'v: rows by parameter name to rows by site name, (k, *sides), in the bases."""
        return {
            site.name: times_sides(site.gather(parts), _transposed(self.bases(site)))
            for site in self.sites
        }

    def rotate_back(self, rotated: Mapping[str, Tensor]) -> Parts:
        """V x: the inverse of `rotate`."""
        made: Parts = {}
        for site in self.sites:
            made.update(site.scatter(times_sides(rotated[site.name], self.bases(site))))
        return made

    def times_parts(self, parts: Mapping[str, Tensor]) -> Parts:
        """V [D o (V'v)]."""
        rotated = self.rotate(parts)
        return self.rotate_back({s.name: rotated[s.name] * self.spectrum(s) for s in self.sites})

    @torch.no_grad()
    def set_bases(self, bases: Bases) -> None:
        """Changes bases and carries the diagonal over: D_new = diag(V_new' M_old V_new).

        That is D_old times (V_new' V_old) o (V_new' V_old) on every side, so D stays positive.

        Args:
            bases: By site name, one orthogonal (n, n) or None per side; None keeps what is there.

        Raises:
            ValueError: A name or a shape does not fit, a side holds no basis, or a matrix is not
                orthogonal. Nothing has been changed then.
        """
        by_name = {site.name: site for site in self.sites}
        turns: dict[str, list[Tensor | None]] = {}
        for name, given in bases.items():
            if name not in by_name:
                raise ValueError(f"'{name}' is no weight of this structure: {list(by_name)[:8]}.")
            held = self.bases(by_name[name])
            if len(given) != len(held):
                raise ValueError(f"'{name}' has {len(held)} sides and {len(given)} were given.")
            turns[name] = [
                None if new is None else self._turn(f"{name}.basis{side}", new, old)
                for side, (new, old) in enumerate(zip(given, held, strict=True))
            ]
        for name, turn in turns.items():
            spectrum = self.spectrum(by_name[name])
            spectrum.copy_(times_sides(spectrum.unsqueeze(0), turn)[0])
            for old, new in zip(self.bases(by_name[name]), bases[name], strict=True):
                if old is not None and new is not None:
                    old.copy_(new)

    def _turn(self, name: str, new: Tensor, old: Tensor | None) -> Tensor:
        """(V_new' V_old) squared entry by entry; its rows and columns sum to one."""
        if old is None:
            raise ValueError(f"there is no '{name}' (see max_side and max_state): give None.")
        if new.shape != old.shape:
            raise ValueError(f"'{name}' has shape {tuple(old.shape)}, not {tuple(new.shape)}.")
        turn = (new.to(old).mT @ old).square()
        off = torch.cat([turn.sum(0), turn.sum(1)]) - 1
        if not bool((off.abs() < 10 * torch.finfo(old.dtype).eps ** 0.5).all()):
            raise FactorizationError(
                f"'{name}' must be orthogonal: take eigenvectors or the Q of a QR."
            )
        return turn

    def _diagonal(self) -> Tensor:
        made: Parts = {}
        for site in self.sites:
            squares = [None if basis is None else basis.square() for basis in self.bases(site)]
            made.update(site.scatter(times_sides(self.spectrum(site).unsqueeze(0), squares)))
        return self.join(made, self._proto.new_empty(1, 0))[0]

    @torch.no_grad()
    def inverse(self) -> EKronecker:
        """The same bases, and 1 / D."""
        other = self.clone()
        for site in self.sites:
            other.spectrum(site).reciprocal_()
        return other

    @torch.no_grad()
    def root(self) -> EKronecker:
        """The same bases and sqrt(D)."""
        other = self.clone()
        for site in self.sites:
            other.spectrum(site).sqrt_()
        return other

    def logdet(self) -> Tensor:
        """The sum of log D."""
        flat = torch.cat([self.spectrum(site).reshape(-1) for site in self.sites])
        return flat.double().log().sum()

    @torch.no_grad()
    def scale_(self, c: float) -> None:
        """Multiplies D by c."""
        self.check_scale(c)
        for site in self.sites:
            self.spectrum(site).mul_(c)

    @torch.no_grad()
    def blend_(self, other: EKronecker, weight: float) -> None:
        """The mean of the diagonals in other's bases, which are taken over (`set_bases`)."""
        self.check_blend(other, weight)
        changed: dict[str, list[Tensor | None]] = {}
        for site in self.sites:
            pairs = zip(self.bases(site), other.bases(site), strict=True)
            changed[site.name] = [
                None if mine is None or theirs is None or torch.equal(mine, theirs) else theirs
                for mine, theirs in pairs
            ]
        self.set_bases(changed)
        for site in self.sites:
            self.spectrum(site).lerp_(other.spectrum(site), weight)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        """All spectra are positive and all bases orthogonal."""
        spectra = {f"{site.name}.spectrum" for site in self.sites}
        for name, tensor in tensors.items():
            (check_positive if name in spectra else check_orthonormal)(name, tensor)

    def charts(self) -> Sequence[Chart]:
        """D, on the bases as they are."""
        return (_SpectrumChart(self),)


class _SpectrumChart(ElementwiseChart):
    def __init__(self, structure: EKronecker) -> None:
        super().__init__([structure.spectrum(site) for site in structure.sites])
        self.structure = structure

    def _inward(self, v: Tensor) -> Tensor:
        rotated = self.structure.rotate(self.structure.split(v))
        return torch.cat([part.flatten(1) for part in rotated.values()], dim=1)

    def _read(self, flat: Tensor) -> Parts:
        """Rows (k, P) in the bases, by site name."""
        sites = self.structure.sites
        parts = flat.split([site.size for site in sites], dim=-1)
        return {
            s.name: p.reshape(*flat.shape[:-1], *s.sides) for s, p in zip(sites, parts, strict=True)
        }

    def times(self, phi: Tensor, v: Tensor) -> Tensor:
        turned = self._read(phi * self._inward(v))
        return self.structure.join(self.structure.rotate_back(turned), v)

    def pull(self, v: Tensor, w: Tensor) -> Tensor:
        return (self._inward(v) * self._inward(w)).sum(0)


def _transposed(bases: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if basis is None else basis.mT for basis in bases]


def _sides_with_basis(site: Site, max_state: float | None, max_turn: int | None) -> list[int]:
    kept = [i for i, full in enumerate(site.full) if full]
    kept.sort(key=lambda i: (-site.sides[i], -i))
    most = float("inf") if max_state is None else (max_state - 1) * site.size + 1
    turn = float("inf") if max_turn is None else max_turn
    while kept:
        sizes = [site.sides[i] for i in kept]
        if sum(n * n for n in sizes) <= most and sum(sizes) <= turn:
            break
        del kept[0]
    return sorted(kept)
