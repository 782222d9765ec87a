"""A positive diagonal and a low-rank correction across all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from linear_operator import LinearOperator
from torch import Tensor

from .base import Parts, Structure
from .blueprint import Like
from .chart import Chart
from .diagonal import Diagonal
from .saved import check_definite, check_gram, check_positive
from .spd import clip_eigenvalues, spd_inverse, spd_logdet, spd_root, symmetrised


class LowRank(Structure):
    """M = D^{1/2} (I + W' (K - I) W) D^{1/2}: D > 0 diagonal, W W' = I, K positive definite.

    The rows of W, (rank, P), span all parameters, so that M is not block diagonal. Within their
    span M is D^{1/2} K D^{1/2}, outside of it D. The inverse is of the same form, with 1/D and
    K^{-1}. Starts at the identity: D = 1, K = I, and rows of zeros, which count for nothing,
    until `set_basis`. K is the identity on rows of zeros.

    Tensors: "{name}.diagonal" and "{name}.basis", the parts of D and W; "{first name}.core", K.

    Args:
        like: What it is made for.
        rank: Most rows of W.
    """

    kind = "low_rank"

    def __init__(self, like: Like, *, rank: int = 16) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1 and is {rank}: Diagonal has none.")
        super().__init__(like)
        self.rank = rank
        proto = self._proto
        for name, shape in zip(self.layout.names, self.layout.shapes, strict=True):
            self.tensors[f"{name}.diagonal"] = proto.new_ones(shape)
            self.tensors[f"{name}.basis"] = proto.new_zeros(rank, *shape)
        self.core_name = f"{self.layout.names[0]}.core"
        self.tensors[self.core_name] = self._eye()

    def _eye(self) -> Tensor:
        return torch.eye(self.rank, dtype=self.dtype, device=self.device)

    @property
    def core(self) -> Tensor:
        """K, (rank, rank)."""
        return self.tensors[self.core_name]

    def basis(self) -> Tensor:
        """W, (rank, P)."""
        return self.join(self._named("basis"), self.core)

    def flat(self) -> Tensor:
        """The diagonal D, (P,)."""
        return torch.cat([part.reshape(-1) for part in self._named("diagonal").values()])

    def _named(self, what: str) -> Parts:
        return {name: self.tensors[f"{name}.{what}"] for name in self.layout.names}

    def times_parts(self, parts: Mapping[str, Tensor]) -> Parts:
        """D^{1/2} (v + W' (K - I) W v) with v = D^{1/2} of what was given."""
        roots = {name: d.sqrt() for name, d in self._named("diagonal").items()}
        scaled = {name: part * roots[name] for name, part in parts.items()}
        inside = self.coordinates(scaled) @ (self.core - self._eye())
        across = self.combine(inside)
        return {name: (scaled[name] + across[name]) * roots[name] for name in parts}

    def coordinates(self, parts: Mapping[str, Tensor]) -> Tensor:
        """W v of k rows by name, (k, rank)."""
        total = self.core.new_zeros(())
        for name, rows in self._named("basis").items():
            part, n = parts[name], rows.numel() // self.rank
            total = total + part.reshape(len(part), n) @ rows.reshape(self.rank, n).mT
        return total

    def combine(self, coordinates: Tensor) -> Parts:
        """W' c of coordinates (k, rank), as rows by name."""
        made: Parts = {}
        for name, rows in self._named("basis").items():
            flat = coordinates @ rows.reshape(self.rank, rows.numel() // self.rank)
            made[name] = flat.reshape(len(flat), *rows.shape[1:])
        return made

    # ---- setting D and W

    @torch.no_grad()
    def set_diagonal(self, diagonal: Tensor) -> None:
        """Sets D, flat (P,); W and K stay.

        Raises:
            ValueError: Its shape does not fit, or an entry is not positive and finite.
        """
        parts = self.layout.unflatten(diagonal.to(self.core))
        if not bool(((diagonal > 0) & diagonal.isfinite()).all()):
            raise ValueError("the diagonal must be positive and finite: clamp it first.")
        for name, part in parts.items():
            self.tensors[f"{name}.diagonal"].copy_(part)

    @torch.no_grad()
    def set_basis(self, rows: Tensor) -> None:
        """Makes W an orthonormal basis of the span of given rows, and carries K over.

        K becomes the compression W_new (I + W_old'(K - I)W_old) W_new', which is positive definite;
        M stays as it is if the new span contains the old one.

        Args:
            rows: (k, P), k <= rank. Dependent ones are dropped, to their rounding.

        Raises:
            ValueError: The shape does not fit, or an entry is not finite.
        """
        size = sum(self.layout.sizes)
        if rows.ndim != 2 or len(rows) > self.rank or rows.shape[1] != size:
            raise ValueError(
                f"rows have shape {tuple(rows.shape)}: give ({self.rank}, {size}) or fewer rows."
            )
        if not bool(rows.isfinite().all()):
            raise ValueError("rows hold NaN or infinity: look at the gradients they came from.")
        wide, triangle = torch.linalg.qr(rows.double().mT)
        left, values, _ = torch.linalg.svd(triangle)
        rounding = 10 * len(rows) * torch.finfo(rows.dtype).eps * values[:1]
        basis = (wide @ left).mT * (values > rounding).unsqueeze(1)
        padded = basis.new_zeros(self.rank, size)
        padded[: len(basis)] = basis
        self._take_basis(self.split(padded.to(self.core)))

    def _take_basis(self, rows: Mapping[str, Tensor]) -> None:
        turn = self.coordinates(rows)
        eye = self._eye()
        self.core.copy_(eye + symmetrised(turn @ (self.core - eye) @ turn.mT))
        for name, part in rows.items():
            self.tensors[f"{name}.basis"].copy_(part)

    # ---- algebra

    def _diagonal(self) -> Tensor:
        rows = self.basis()
        return self.flat() * (1 + ((self.core - self._eye()) @ rows * rows).sum(0))

    @torch.no_grad()
    def inverse(self) -> LowRank:
        """D^{-1/2} (I + W' (K^{-1} - I) W) D^{-1/2}."""
        other = self.clone()
        for name in self.layout.names:
            other.tensors[f"{name}.diagonal"].reciprocal_()
        other.core.copy_(spd_inverse(self.core, self.core_name))
        return other

    @torch.no_grad()
    def root(self) -> LinearOperator:
        """D^{1/2} (I + W' (K^{1/2} - I) W), which is not symmetric."""
        inner, outer = self.clone(), Diagonal(self)
        for name in self.layout.names:
            outer.tensors[f"{name}.diagonal"].copy_(self.tensors[f"{name}.diagonal"].sqrt())
            inner.tensors[f"{name}.diagonal"].fill_(1)
        inner.core.copy_(spd_root(self.core, self.core_name))
        return outer @ inner

    @torch.no_grad()
    def logdet(self) -> Tensor:
        """The sum of log D, and log det K."""
        return self.flat().double().log().sum() + spd_logdet(self.core, self.core_name)

    @torch.no_grad()
    def scale_(self, c: float) -> None:
        """Multiplies D by c."""
        self.check_scale(c)
        for diagonal in self._named("diagonal").values():
            diagonal.mul_(c)

    @torch.no_grad()
    def blend_(self, other: LowRank, weight: float) -> None:
        """The means of D and of K, in other's basis, which is taken over as by `set_basis`.

        What M holds outside of the span of other's basis is lost but for D.
        """
        self.check_blend(other, weight)
        self._take_basis(other._named("basis"))
        self.core.lerp_(other.core, weight)
        for name, diagonal in self._named("diagonal").items():
            diagonal.lerp_(other.tensors[f"{name}.diagonal"], weight)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        """D and K are positive definite, and the rows of W orthonormal or zero."""
        for name in self.layout.names:
            check_positive(f"{name}.diagonal", tensors[f"{name}.diagonal"])
        check_definite(self.core_name, tensors[self.core_name])
        parts = {name: tensors[f"{name}.basis"] for name in self.layout.names}
        rows = self.join(parts, tensors[self.core_name])
        dead = (~rows.any(1)).to(rows).diag()
        check_gram(f"{self.layout.names[0]}.basis", rows @ rows.mT + dead)

    def charts(self) -> Sequence[Chart]:
        """K, on D and W as they are; D comes by `set_diagonal`."""
        return (_CoreChart(self),)


class _CoreChart(Chart):
    """K flattened, both triangles, read as its symmetric part."""

    def __init__(self, structure: LowRank) -> None:
        self.structure = structure

    def _read(self, phi: Tensor) -> Tensor:
        return symmetrised(phi.reshape(self.structure.core.shape))

    def _inward(self, v: Tensor) -> Tensor:
        """W D^{1/2} v, (k, rank)."""
        return self.structure.coordinates(self.structure.split(v * self.structure.flat().sqrt()))

    def _outward(self, coordinates: Tensor) -> Tensor:
        rows = self.structure.join(self.structure.combine(coordinates), coordinates)
        return rows * self.structure.flat().sqrt()

    def get(self) -> Tensor:
        return self.structure.core.flatten().clone()

    @torch.no_grad()
    def put(self, phi: Tensor) -> None:
        live = self.structure.basis().any(1)
        inside = live.unsqueeze(0) & live.unsqueeze(1)
        core = self.structure.core
        core.copy_(torch.where(inside, self._read(phi), self.structure._eye()))

    def times(self, phi: Tensor, v: Tensor) -> Tensor:
        return self._outward(self._inward(v) @ self._read(phi))

    def rest(self, v: Tensor) -> Tensor:
        return v * self.structure.flat() - self._outward(self._inward(v))

    def pull(self, v: Tensor, w: Tensor) -> Tensor:
        return symmetrised(self._inward(w).mT @ self._inward(v)).flatten()

    def project(self, phi: Tensor, floor: float) -> Tensor:
        mean = float(self.structure.core.diagonal().mean())
        return clip_eigenvalues(self._read(phi), floor * mean).flatten()

    def mass(self) -> Tensor:
        """The square of D's mean: exact where D is constant and no row of W is zero."""
        return torch.ones_like(self.get()) * self.structure.flat().mean().square()
