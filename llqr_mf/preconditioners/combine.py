"""Positive combinations and diagonal scalings of structures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from linear_operator import LinearOperator
from torch import Tensor

from .base import Parts, Structure
from .chart import Chart
from .composite import Composite, check_parts
from .diagonal import Diagonal
from .spd import spd_logdet

DENSE_SIZE = 4096
"""Largest P at which a sum's log-determinant is taken from the dense matrix."""


class Sum(Composite):
    """M = sum_i c_i M_i with c_i > 0.

    Tensors: "{name}.term{i}" for those of M_i, and "weights", c.

    Args:
        structures: M_1, M_2, ... over the same parameters.
        weights: The numbers c_i. Default: ones.

    Raises:
        ValueError: There is no structure, layouts differ, or a weight is missing or not positive.
    """

    kind = "sum"

    def __init__(
        self, structures: Sequence[Structure], *, weights: Sequence[float] | None = None
    ) -> None:
        if not structures:
            raise ValueError("a sum needs at least one structure.")
        check_parts(structures)
        if any(structure.layout != structures[0].layout for structure in structures):
            raise ValueError(
                "the structures of a sum must be over the same parameters: DirectSum puts those "
                "over different ones side by side."
            )
        c = [1.0] * len(structures) if weights is None else list(weights)
        if len(c) != len(structures):
            raise ValueError(f"{len(structures)} structures need as many weights, not {len(c)}.")
        for weight in c:
            self.check_scale(weight)
        proto = structures[0]._proto
        held = torch.tensor(c, dtype=proto.dtype, device=proto.device)
        super().__init__(structures[0], structures, {"weights": held})

    def _key(self, i: int, name: str) -> str:
        return f"{name}.term{i}"

    @property
    def weights(self) -> Tensor:
        """The numbers c_i, one per structure."""
        return self.tensors["weights"]

    def times_parts(self, parts: Mapping[str, Tensor]) -> Parts:
        """sum_i c_i M_i v."""
        made: Parts = {}
        for c, structure in zip(self.weights, self.structures, strict=True):
            for name, part in structure.times_parts(parts).items():
                made[name] = part * c + made[name] if name in made else part * c
        return made

    def _diagonal(self) -> Tensor:
        diagonals = torch.stack([structure._diagonal() for structure in self.structures])
        return self.weights @ diagonals

    def inverse(self) -> Structure:
        """Not known in closed form.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "the inverse of a sum has no closed form: solve with `solvers.cg`, preconditioned by "
            "the inverse of one of its terms."
        )

    @torch.no_grad()
    def logdet(self) -> Tensor:
        """From the dense matrix.

        Raises:
            NotImplementedError: P is more than `DENSE_SIZE`.
        """
        if len(self._diagonal()) > DENSE_SIZE:
            raise NotImplementedError(
                f"the log-determinant of a sum needs the dense matrix, of size {DENSE_SIZE} at "
                "most: estimate it by stochastic Lanczos quadrature."
            )
        return spd_logdet(self.to_dense(), "the sum")

    @torch.no_grad()
    def scale_(self, c: float) -> None:
        """Multiplies the weights by c."""
        self.check_scale(c)
        self.weights.mul_(c)

    @torch.no_grad()
    def blend_(self, other: Sum, weight: float) -> None:
        """Term by term: each c_i M_i becomes its mean with the other's, as M_i averages."""
        self.check_blend(other, weight)
        mixed = torch.lerp(self.weights, other.weights, weight)
        shares = (weight * other.weights / mixed).tolist()
        for mine, theirs, share in zip(self.structures, other.structures, shares, strict=True):
            mine.blend_(theirs, min(share, 1.0))
        self.weights.copy_(mixed)

    def charts(self) -> Sequence[Chart]:
        """Those of every term, the other terms held."""
        return tuple(
            _TermChart(self, i, chart)
            for i, structure in enumerate(self.structures)
            for chart in structure.charts()
        )


class Scaled(Composite):
    """M = D^{1/2} N D^{1/2} with a diagonal D and any structure N.

    Tensors: "{name}.scaling" for D, and those of N.

    Args:
        diagonal: D.
        inner: N, over the same parameters.

    Raises:
        ValueError: The layouts differ, or N is itself `Scaled`.
    """

    kind = "scaled"

    def __init__(self, diagonal: Diagonal, inner: Structure) -> None:
        if not isinstance(diagonal, Diagonal):
            raise TypeError(f"diagonal is a {type(diagonal).__name__}: give a Diagonal.")
        check_parts([inner])
        if diagonal.layout != inner.layout:
            raise ValueError("diagonal and inner must be over the same parameters.")
        super().__init__(inner, (diagonal, inner))

    def _key(self, i: int, name: str) -> str:
        return f"{name.removesuffix('diagonal')}scaling" if i == 0 else name

    @property
    def diagonal_part(self) -> Diagonal:
        """D."""
        first = self.structures[0]
        assert isinstance(first, Diagonal)
        return first

    @property
    def inner(self) -> Structure:
        """N."""
        return self.structures[1]

    def times_parts(self, parts: Mapping[str, Tensor]) -> Parts:
        """D^{1/2} N D^{1/2} v."""
        outer = self.diagonal_part.tensors
        roots = {name: outer[f"{name}.diagonal"].sqrt() for name in parts}
        inside = self.inner.times_parts({n: part * roots[n] for n, part in parts.items()})
        return {name: part * roots[name] for name, part in inside.items()}

    def _diagonal(self) -> Tensor:
        return self.diagonal_part.flat() * self.inner._diagonal()

    def inverse(self) -> Scaled:
        """D^{-1/2} N^{-1} D^{-1/2}."""
        return self._with((self.diagonal_part.inverse(), self.inner.inverse()))

    def root(self) -> LinearOperator:
        """D^{1/2} times the root of N."""
        return self.diagonal_part.root() @ self.inner.root()

    def logdet(self) -> Tensor:
        """The sum of those of D and N."""
        return self.diagonal_part.logdet() + self.inner.logdet()

    def scale_(self, c: float) -> None:
        """Multiplies D by c."""
        self.diagonal_part.scale_(c)

    def blend_(self, other: Scaled, weight: float) -> None:
        """D and N each with its counterpart."""
        self.check_blend(other, weight)
        self.inner.blend_(other.inner, weight)
        self.diagonal_part.blend_(other.diagonal_part, weight)

    def charts(self) -> Sequence[Chart]:
        """Those of N, between the two D^{1/2}."""
        return tuple(_ScaledChart(self, chart) for chart in self.inner.charts())


class _Within(Chart):
    """A chart of one part; its coordinates and their projection are the same."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        self.elementwise = chart.elementwise

    def get(self) -> Tensor:
        return self.chart.get()

    def put(self, phi: Tensor) -> None:
        self.chart.put(phi)

    def project(self, phi: Tensor, floor: float) -> Tensor:
        return self.chart.project(phi, floor)


class _TermChart(_Within):
    def __init__(self, whole: Sum, i: int, chart: Chart) -> None:
        super().__init__(chart)
        self.whole, self.i = whole, i

    def _c(self) -> Tensor:
        return self.whole.weights[self.i]

    def times(self, phi: Tensor, v: Tensor) -> Tensor:
        return self._c() * self.chart.times(phi, v)

    def rest(self, v: Tensor) -> Tensor:
        total = self._c() * self.chart.rest(v)
        for j, structure in enumerate(self.whole.structures):
            if j != self.i:
                total = total + self.whole.weights[j] * structure.times_rows(v)
        return total

    def pull(self, v: Tensor, w: Tensor) -> Tensor:
        return self._c() * self.chart.pull(v, w)

    def mass(self) -> Tensor:
        return self._c().square() * self.chart.mass()


class _ScaledChart(_Within):
    def __init__(self, whole: Scaled, chart: Chart) -> None:
        super().__init__(chart)
        self.whole = whole

    def _root(self) -> Tensor:
        return self.whole.diagonal_part.flat().sqrt()

    def times(self, phi: Tensor, v: Tensor) -> Tensor:
        return self._root() * self.chart.times(phi, self._root() * v)

    def rest(self, v: Tensor) -> Tensor:
        return self._root() * self.chart.rest(self._root() * v)

    def pull(self, v: Tensor, w: Tensor) -> Tensor:
        return self.chart.pull(self._root() * v, self._root() * w)

    def mass(self) -> Tensor:
        """That of N times the square of D's mean: exact where D is constant."""
        return self.chart.mass() * self.whole.diagonal_part.flat().mean().square()
