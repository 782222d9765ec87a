"""Structures side by side, each on its own parameters; and the builder by names and patterns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from linear_operator import LinearOperator
from torch import Tensor

from ..operators.apply import apply_rows, apply_rows_t
from ..operators.base import MatrixFreeOperator
from .base import Parts, Structure
from .blueprint import Blueprint, Like
from .chart import Chart
from .composite import Composite, check_parts
from .diagonal import Diagonal
from .ekronecker import EKronecker
from .identity import Identity
from .kronecker import Kronecker
from .low_rank import LowRank
from .scalar import Scalar

KINDS: Mapping[str, type[Structure]] = {
    "diagonal": Diagonal,
    "ekron": EKronecker,
    "ekronecker": EKronecker,
    "identity": Identity,
    "kronecker": Kronecker,
    "low_rank": LowRank,
    "scalar": Scalar,
}
"""The structures that `structure` knows by name."""

Rules = str | Sequence[tuple[str, str | None]]


class DirectSum(Composite):
    """M = blockdiag(M_1, M_2, ...), each on its own parameters; any order of those.

    Args:
        like: What it is made for.
        structures: Over disjoint parameters that together are those of `like`.

    Raises:
        ValueError: A parameter has no structure, or two, or another shape.
    """

    kind = "direct_sum"

    def __init__(self, like: Like, structures: Sequence[Structure]) -> None:
        check_parts(structures)
        layout = Blueprint.of(like).layout
        wanted = sorted(zip(layout.names, layout.shapes, strict=True))
        given = sorted(
            pair for s in structures for pair in zip(s.layout.names, s.layout.shapes, strict=True)
        )
        if wanted != given:
            names = [n for n, _ in given]
            wrong = sorted({n for n, _ in set(wanted) ^ set(given)} or {*names})
            twice = [n for n in wrong if names.count(n) > 1]
            raise ValueError(
                f"every parameter needs exactly one structure: see {(twice or wrong)[:4]}."
            )
        super().__init__(like, structures)

    def times_parts(self, parts: Mapping[str, Tensor]) -> Parts:
        """Every structure on its own parameters."""
        made: Parts = {}
        for structure in self.structures:
            made.update(structure.times_parts({n: parts[n] for n in structure.layout.names}))
        return made

    def apart(self, v: Tensor) -> list[Tensor]:
        """The rows (k, P_i) of every structure in rows (k, P)."""
        parts = self.split(v)
        return [structure.join(parts, v) for structure in self.structures]

    def together(self, rows: Sequence[Tensor]) -> Tensor:
        """The inverse of `apart`."""
        made: Parts = {}
        for structure, part in zip(self.structures, rows, strict=True):
            made.update(structure.split(part))
        return self.join(made, rows[0])

    def _diagonal(self) -> Tensor:
        return self.together([s._diagonal().unsqueeze(0) for s in self.structures])[0]

    def inverse(self) -> DirectSum:
        """blockdiag(M_1^{-1}, M_2^{-1}, ...)."""
        return self._with([structure.inverse() for structure in self.structures])

    def root(self) -> LinearOperator:
        """The structures' roots side by side."""
        roots = tuple(structure.root() for structure in self.structures)
        return _BlocksOperator(self._proto, whole=self, blocks=roots)

    def logdet(self) -> Tensor:
        """The sum of those of the structures."""
        return torch.stack([structure.logdet() for structure in self.structures]).sum()

    def scale_(self, c: float) -> None:
        """Scales every structure; raises where one cannot be (Identity), before any is."""
        self.check_scale(c)
        # What holds no tensors is what refuses.
        for structure in sorted(self.structures, key=lambda s: len(s.tensors) > 0):
            structure.scale_(c)

    def blend_(self, other: DirectSum, weight: float) -> None:
        """Each structure with its counterpart, as that averages."""
        self.check_blend(other, weight)
        for mine, theirs in zip(self.structures, other.structures, strict=True):
            mine.blend_(theirs, weight)

    def charts(self) -> Sequence[Chart]:
        """The first charts of all structures as one, then the second, ..."""
        columns = [structure.charts() for structure in self.structures]
        most = max(len(charts) for charts in columns)
        return tuple(
            _SideBySide(self, [charts[i] if i < len(charts) else None for charts in columns])
            for i in range(most)
        )


class _BlocksOperator(MatrixFreeOperator):
    """Operators on the parameters of a direct sum's structures, side by side."""

    def __init__(
        self,
        proto: Tensor,
        *,
        whole: DirectSum,
        blocks: tuple[LinearOperator, ...],
        columns: int | None = None,
    ) -> None:
        super().__init__(proto, columns=columns, whole=whole, blocks=blocks)
        self.whole, self.blocks = whole, blocks

    def _sizes(self) -> tuple[int, int]:
        return self.whole._sizes()

    def _rows(self, v: Tensor) -> Tensor:
        pairs = zip(self.blocks, self.whole.apart(v), strict=True)
        return self.whole.together([apply_rows(block, part) for block, part in pairs])

    def _rows_t(self, w: Tensor) -> Tensor:
        pairs = zip(self.blocks, self.whole.apart(w), strict=True)
        return self.whole.together([apply_rows_t(block, part) for block, part in pairs])


class _SideBySide(Chart):
    """One chart of each structure that has it, so that they are fitted together."""

    def __init__(self, whole: DirectSum, charts: Sequence[Chart | None]) -> None:
        self.whole, self.charts = whole, charts
        self.held = [chart for chart in charts if chart is not None]
        self.sizes = [len(chart.get()) for chart in self.held]
        self.elementwise = all(chart.elementwise for chart in self.held)

    def get(self) -> Tensor:
        return torch.cat([chart.get() for chart in self.held])

    def put(self, phi: Tensor) -> None:
        for chart, part in zip(self.held, phi.split(self.sizes), strict=True):
            chart.put(part)

    def times(self, phi: Tensor, v: Tensor) -> Tensor:
        pieces = iter(phi.split(self.sizes))
        rows = zip(self.charts, self.whole.apart(v), strict=True)
        return self.whole.together(
            [torch.zeros_like(x) if c is None else c.times(next(pieces), x) for c, x in rows]
        )

    def rest(self, v: Tensor) -> Tensor:
        rows = zip(self.whole.structures, self.charts, self.whole.apart(v), strict=True)
        return self.whole.together(
            [s.times_rows(x) if c is None else c.rest(x) for s, c, x in rows]
        )

    def pull(self, v: Tensor, w: Tensor) -> Tensor:
        rows = zip(self.charts, self.whole.apart(v), self.whole.apart(w), strict=True)
        return torch.cat([chart.pull(x, y) for chart, x, y in rows if chart is not None])

    def project(self, phi: Tensor, floor: float) -> Tensor:
        pairs = zip(self.held, phi.split(self.sizes), strict=True)
        return torch.cat([chart.project(part, floor) for chart, part in pairs])

    def mass(self) -> Tensor:
        return torch.cat([chart.mass() for chart in self.held])


def leaves(structure: Structure) -> list[Structure]:
    """The structures of a direct sum; itself otherwise."""
    if isinstance(structure, DirectSum):
        return [leaf for part in structure.structures for leaf in leaves(part)]
    return [structure]


def structure(like: Like, rules: Rules, **options: Any) -> Structure:
    """A structure by name, or by name for each parameter.

    Args:
        like: What it is made for.
        rules: One of `KINDS`, or pairs (pattern, name): a parameter takes the first pattern that
            matches its name (as file names, case and all), and None means "identity". All
            parameters of one name make one structure.
        **options: For the structures; each goes to those that know it.

    Raises:
        ValueError: A name or an option is unknown, a pattern matches no parameter, or a parameter
            is matched by none.
    """
    blueprint = Blueprint.of(like)
    pairs = rule_pairs(rules)
    chosen: dict[type[Structure], list[str]] = {}
    kinds = [(pattern, _kind(name)) for pattern, name in pairs]
    for pattern, _ in kinds:
        if not any(fnmatchcase(name, pattern) for name in blueprint.layout.names):
            raise ValueError(
                f"the pattern '{pattern}' matches no trainable parameter: they are "
                f"{list(blueprint.layout.names)[:8]}."
            )
    for name in blueprint.layout.names:
        kind = next((kind for pattern, kind in kinds if fnmatchcase(name, pattern)), None)
        if kind is None:
            raise ValueError(f"no rule matches '{name}': end the rules with ('*', None).")
        chosen.setdefault(kind, []).append(name)
    known = {kind: _options(kind) for kind in chosen}
    for option in options:
        if not any(option in own for own in known.values()):
            own = sorted(set().union(*known.values()))
            raise ValueError(f"there is no option '{option}': the structures chosen have {own}.")
    made = [
        kind(blueprint.restricted(names), **{o: x for o, x in options.items() if o in known[kind]})
        for kind, names in chosen.items()
    ]
    return made[0] if len(made) == 1 else DirectSum(blueprint, made)


def rule_pairs(rules: Rules) -> list[tuple[str, str | None]]:
    """Rules as pairs.

    Raises:
        ValueError: They are none.
    """
    if isinstance(rules, str):
        return [("*", rules)]
    pairs = [*rules] if isinstance(rules, Sequence) else []
    for pair in pairs:
        strings = isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)
        if not strings or not isinstance(pair[1], str | None):
            raise ValueError(f"{pair!r} is no rule: give pairs (pattern, name or None).")
    if not pairs:
        raise ValueError(
            f"the structure is {rules!r}: give a name from {sorted(KINDS)}, or pairs (pattern, "
            "name or None)."
        )
    return pairs


def _kind(name: str | None) -> type[Structure]:
    if name is None:
        return Identity
    if name not in KINDS:
        raise ValueError(f"there is no structure '{name}': choose from {sorted(KINDS)}.")
    return KINDS[name]


def _options(kind: type[Structure]) -> list[str]:
    parameters = inspect.signature(kind).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
