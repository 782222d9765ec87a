"""A low-rank preconditioner for (I + G) y = h, from some columns of G."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Elements of F converted to float64 at a time."""


@dataclass(frozen=True, eq=False)
class Nystrom:
    """(I + F F')^{-1} = I - F (I + F'F)^{-1} F', with F F' = C W^{-1} C' close to G.

    F F' is never larger than G, and equals it on the chosen columns (but for `shift`). So CG on
    (I + G) preconditioned by this sees only what the columns miss of G.

    F stays in the dtype of C, which halves the memory of a float32 problem, and every product with
    it runs in float64: the two terms cancel along the large eigenvalues of G, and float32 would
    lose positivity where one is over 1e7. The small matrix is made from the rounded F, so that
    this is an exact inverse, hence positive definite, whatever the rounding of F.

    Args:
        rows: F', shape (m, n).
        cholesky: Lower Cholesky factor of I + F'F, float64, shape (m, m).
        shift: What was added to the diagonal of W.
    """

    rows: Tensor
    cholesky: Tensor
    shift: float

    @classmethod
    def of(cls, columns: Tensor, chosen: Tensor) -> Nystrom:
        """The preconditioner of C = G[:, chosen].

        W = C[chosen] is often singular to rounding: it gets a multiple of the identity, which
        starts at the rounding of C times W's trace, and grows until it has a Cholesky factor.

        Args:
            columns: C, shape (n, m). Not changed.
            chosen: Distinct indices, shape (m,).

        Raises:
            ValueError: Shapes do not fit, an index comes twice, or C is not finite or has a
                negative diagonal: then G is not positive.
        """
        n, m = columns.shape
        if chosen.shape != (m,) or len(chosen.unique()) != m:
            raise ValueError(
                f"chosen has shape {tuple(chosen.shape)} for {m} columns: give one index for each "
                "column, and none twice."
            )
        core = columns[chosen].double()
        core = (core + core.mT) / 2
        trace = float(core.diagonal().sum())
        if not bool(torch.isfinite(columns).all()) or bool((core.diagonal() < 0).any()):
            raise ValueError(
                "columns are not finite, or negative on the diagonal, so they are not of a "
                "positive semidefinite G: look at the model's outputs, or run it in float64."
            )
        lower, shift = _shifted_cholesky(core, trace * torch.finfo(columns.dtype).eps)
        rows = torch.empty(m, n, dtype=columns.dtype, device=columns.device)
        small = torch.eye(m, dtype=torch.float64, device=columns.device)
        for part in _parts(n, m):
            right = columns[part].double().mT
            rows[:, part] = torch.linalg.solve_triangular(lower, right, upper=False).to(rows)
            rounded = rows[:, part].double()
            small.addmm_(rounded, rounded.mT)
        return cls(rows, torch.linalg.cholesky(small), shift)

    def __call__(self, y: Tensor) -> Tensor:
        """(I + F F')^{-1} y for rows (k, n), in their dtype."""
        parts = _parts(self.rows.shape[1], len(self.rows))
        made = y.double()
        seen = torch.zeros(len(self.rows), len(y), dtype=torch.float64, device=y.device)
        for part in parts:
            seen.addmm_(self.rows[:, part].double(), made[:, part].mT)
        inner = torch.cholesky_solve(seen, self.cholesky).mT
        made = made.clone()
        for part in parts:
            made[:, part].addmm_(inner, self.rows[:, part].double(), alpha=-1)
        return made.to(y.dtype)


def uniform_choice(size: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct indices below `size`, every set as likely; sorted.

    Args:
        size: N r.
        count: Taken as `size` if larger.
        generator: Its device is that of the indices.
    """
    order = torch.randperm(size, generator=generator, device=generator.device)
    return order[:count].sort().values


def diagonal_choice(diagonal: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct indices drawn one after the other in proportion to diag(G); sorted.

    Samples that the network is sure of have a factor near zero, and columns that add nothing.

    Args:
        diagonal: diag(G), shape (n,), not negative.
        count: Fewer are given where fewer entries are positive.
        generator: On the diagonal's device.

    Raises:
        ValueError: An entry is negative or not finite.
    """
    weights = diagonal.double()
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError("diagonal has entries that are negative or not finite: give diag(G).")
    # With an exponential clock for each, the first to ring are a draw without replacement;
    # torch.multinomial takes at most 2^24 categories.
    clocks = torch.empty_like(weights).exponential_(generator=generator) / weights
    positive = int((weights > 0).sum())
    count = min(count, positive)
    return clocks.nan_to_num(nan=torch.inf).topk(count, largest=False).indices.sort().values


def _shifted_cholesky(core: Tensor, shift: float) -> tuple[Tensor, float]:
    """Cholesky factor of core + shift I, with the least shift of a growing series that works."""
    tiny = torch.finfo(torch.float64).tiny
    shift = max(shift, tiny**0.5)
    while True:
        matrix = core.clone()
        matrix.diagonal().add_(shift)
        lower, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            return lower, shift
        shift *= 10


def _parts(n: int, m: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, m))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]
