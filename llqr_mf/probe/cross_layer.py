"""How much curvature stands between layers, and what it is worth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..fitting.report import plain_number
from ..gram import grams_of_groups
from ..methods.base import Problem
from ..operators.apply import apply_rows
from ..output_sweep import terminal_factor
from ..preconditioners.layerwise import Layerwise, grouped_blocks, layer_blocks
from ..problem import LQRProblem
from ..solvers.dots import row_dots
from ..streamed import StreamedProblem
from .blockwise import shares_by_grams
from .compare import compare
from .draws import Kind
from .estimate import plain
from .probed import Probed

GRAM_ELEMENTS = 2**28
"""Most numbers in the Gram matrices of all layers together."""

Method = Literal["auto", "gram", "hutchinson"]


@dataclass(frozen=True, eq=False)
class CrossLayer:
    """The blocks H_st of the curvature (R left out) by their Frobenius norms.

    Args:
        names: Of the layers, or of the groups.
        sizes: Their numbers of parameters.
        norms: |H_st|_F, float64, (T, T).
        standard_error: Of the norms; zero where they are exact.
        fraction: J(u) / J(u*) of the step u = -blockdiag(H_tt + R_t)^{-1} g that knows nothing
            across layers; negative where it raises the model. None if it was not asked for, or
            `note` says why.
        best_fraction: The same for the best multiple of u.
        products: Vectors multiplied by a block or by H, each counted once.
        method: "gram" or "hutchinson".
        seed: Of the random vectors.
        note: Why there is no fraction, where H or a block of it is not positive definite.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    norms: Tensor
    standard_error: Tensor
    fraction: float | None
    best_fraction: float | None
    products: int
    method: str
    seed: int
    note: str = ""

    @property
    def coupling(self) -> Tensor:
        """|H_st|_F / sqrt(|H_ss|_F |H_tt|_F), (T, T), from 0 to 1 where H is positive.

        For a Gauss-Newton matrix its square is the alignment of the layers' tangent kernels,
        <G_s, G_t> / (|G_s| |G_t|). NaN for a layer without curvature.
        """
        root = self.norms.diagonal().sqrt()
        return self.norms / (root[:, None] * root)

    @property
    def lost(self) -> float | None:
        """1 - fraction: the share of the exact decrease lost without the off-diagonal blocks."""
        return None if self.fraction is None else 1 - self.fraction

    @property
    def off_diagonal_share(self) -> float:
        """The share of |H|_F^2 that is in the blocks off the diagonal."""
        squares = self.norms.square()
        return float(1 - squares.diagonal().sum() / squares.sum())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, NaN as None."""
        return {
            "names": list(self.names),
            "sizes": list(self.sizes),
            "norms": plain(self.norms),
            "standard_error": plain(self.standard_error),
            "coupling": plain(self.coupling),
            "fraction": self.fraction,
            "best_fraction": self.best_fraction,
            "off_diagonal_share": plain_number(self.off_diagonal_share),
            "products": self.products,
            "method": self.method,
            "seed": self.seed,
            "note": self.note,
        }

    def __str__(self) -> str:
        width = max(len(name) for name in self.names)
        lines = [f"coupling of {len(self.names)} layers, {self.method}, {self.products} products"]
        for name, row in zip(self.names, self.coupling.tolist(), strict=True):
            lines.append(f"{name:{width}}  " + " ".join(f"{x:.2f}" for x in row))
        lines.append(f"off-diagonal share of |H|_F^2: {self.off_diagonal_share:.3f}")
        if self.fraction is not None:
            lines.append(
                f"exact decrease reached without off-diagonal blocks: {self.fraction:.3f}, with "
                f"the best multiple of that step {self.best_fraction:.3f}"
            )
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)

    def plot(self, ax: Any = None, *, annotate: bool | None = None) -> Any:
        """A heat map of `coupling` on matplotlib's axes, which it returns.

        Args:
            ax: Axes; None makes a figure.
            annotate: Whether to write the numbers; None does for up to 12 layers.
        """
        import matplotlib.pyplot as plt

        ax = plt.subplots(figsize=(6, 5))[1] if ax is None else ax
        image = ax.imshow(self.coupling.numpy(), vmin=0, vmax=1, cmap="viridis")
        ticks = range(len(self.names))
        ax.set_xticks(ticks, self.names, rotation=45, ha="right")
        ax.set_yticks(ticks, self.names)
        ax.figure.colorbar(image, ax=ax, label=r"$\|H_{st}\|_F / \sqrt{\|H_{ss}\|_F \|H_{tt}\|_F}$")
        if annotate or (annotate is None and len(self.names) <= 12):
            for i, row in enumerate(self.coupling.tolist()):
                for j, x in enumerate(row):
                    color = "black" if x > 0.6 else "white"
                    ax.text(j, i, f"{x:.2f}", ha="center", va="center", color=color, fontsize=7)
        return ax


@torch.no_grad()
def cross_layer(
    problem: Problem,
    *,
    groups: Sequence[str | Sequence[str]] | None = None,
    method: Method = "auto",
    vectors: int = 16,
    probes: Kind = "rademacher",
    decrease: bool = True,
    rtol: float | None = None,
    seed: int = 0,
    columns: int | None = 1,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> CrossLayer:
    """The T x T map of the curvature between layers, R left out of it.

    With a terminal cost Q_T = L L' alone, |H_st|_F^2 = <G_s, G_t> for the layers' own Gram matrices
    G_t = L'J_t J_t'L, which have a closed form where samples do not interact: exact, by one
    backward pass. Otherwise |H_st|_F^2 = E|H_st z|^2 over random z: T products of a block column
    for each vector, and both triangles are used.

    Args:
        problem: Of one batch, or streamed: then by "hutchinson", and `decrease` must be False.
        groups: Patterns of parameter names, one for each group, that cover every parameter once;
            None takes the layers that have parameters.
        method: "gram" (exact), "hutchinson" (any curvature), or "auto".
        vectors: Random vectors for each group; "hutchinson" only.
        probes: Their distribution.
        decrease: Whether to solve for what the off-diagonal blocks are worth, with the problem's
            own damping: from the Gram matrices where they are there and R is a number, else by
            one exact step and one CG per layer.
        rtol: Of those solves; as in `compare`.
        seed: Of the random vectors.
        columns: Random vectors multiplied at a time.
        progress: Whether to show progress bars.
        checkpoint: A folder to go on from; "hutchinson" only.

    Raises:
        TypeError: The problem has no layers at hand.
        ValueError: The groups do not cover every parameter once, or "gram" has no closed form.
    """
    if not isinstance(problem, LQRProblem | StreamedProblem):
        raise TypeError(
            f"cross_layer needs a problem, not a {type(problem).__name__}: an operator alone does "
            "not know its layers."
        )
    if decrease and isinstance(problem, StreamedProblem):
        raise ValueError(
            "decrease=True solves with the blocks of one batch's problem: set decrease=False, or "
            "give an LQRProblem."
        )
    blocks = layer_blocks(problem) if groups is None else grouped_blocks(problem, groups)
    if method not in ("auto", "gram", "hutchinson"):
        raise ValueError(f"method={method!r}: choose 'auto', 'gram' or 'hutchinson'.")
    grams = None
    if isinstance(problem, LQRProblem) and (
        method == "gram" or (method == "auto" and _grams_fit(problem, len(blocks)))
    ):
        grams = grams_of_groups(problem, blocks)
    if grams is None and method == "gram":
        raise ValueError(
            "method='gram' needs a metric with a factored terminal cost alone, samples that do "
            "not interact and no parameter read twice: use method='hutchinson'."
        )
    products = 0
    if grams is not None:
        squares, error = _inner_products(grams), None
    else:
        probed = Probed(
            problem,
            seed=seed,
            probes=probes,
            columns=columns,
            progress=progress,
            checkpoint=checkpoint,
            header={"estimator": "cross_layer", "blocks": [list(mine) for mine in blocks]},
        )
        squares, error = _estimate(problem, blocks, probed, vectors)
        products = probed.products
    norms = squares.clamp(min=0).sqrt()
    fraction, best, note = None, None, ""
    if decrease:
        assert isinstance(problem, LQRProblem)
        damping = problem.control_cost.uniform
        shares = None
        if grams is not None and damping is not None:
            shares = shares_by_grams(problem, grams, damping)
        if shares is not None:
            fraction, best = shares
    if decrease and fraction is None:
        assert isinstance(problem, LQRProblem)
        layerwise = Layerwise(problem, groups=groups, rtol=1e-6 if rtol is None else rtol)
        try:
            report = compare(problem, {"layerwise": layerwise}, rtol=rtol, progress=progress)
        except ValueError as refusal:
            note = f"no share of the decrease: {refusal}"
        else:
            row = report["layerwise"]
            fraction, best, products = row.fraction, row.best_fraction, products + report.products
    return CrossLayer(
        names=_names(problem, blocks, groups),
        sizes=tuple(sum(problem.layout.sizes[i] for i in mine) for mine in blocks),
        norms=norms,
        # The delta method: d sqrt(x) = dx / (2 sqrt(x)).
        standard_error=torch.zeros_like(norms)
        if error is None
        else error / (2 * norms).clamp(min=1e-300),
        fraction=fraction,
        best_fraction=best,
        products=products,
        method="gram" if grams is not None else "hutchinson",
        seed=seed,
        note=note,
    )


def _grams_fit(problem: LQRProblem, count: int) -> bool:
    factor = terminal_factor(problem)
    if factor is None:
        return False
    return count * ((factor.rank or 0) * factor.samples) ** 2 <= GRAM_ELEMENTS


def _inner_products(grams: Sequence[Tensor]) -> Tensor:
    """<G_s, G_t> for all pairs, float64, (T, T)."""
    rows = [gram.reshape(1, -1) for gram in grams]
    made = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for s, a in enumerate(rows):
        for t, b in enumerate(rows[: s + 1]):
            made[s, t] = made[t, s] = row_dots(a, b)[0].cpu()
    return made


def _estimate(
    problem: Problem, blocks: Sequence[tuple[int, ...]], probed: Probed, vectors: int
) -> tuple[Tensor, Tensor]:
    """E|H_st z|^2 and its standard error, both (T, T)."""
    if vectors < 2:
        raise ValueError(f"vectors is {vectors}: give at least 2, for a standard error.")
    every = tuple(i for mine in blocks for i in mine)
    sizes = [sum(problem.layout.sizes[i] for i in mine) for mine in blocks]
    places = [problem.layout.places(mine).to(problem.device) for mine in blocks]

    def squares(z: Tensor) -> tuple[Tensor]:
        made = torch.zeros(len(z), len(blocks), len(blocks), dtype=torch.float64)
        for t, (mine, place) in enumerate(zip(blocks, places, strict=True)):
            column = problem.curvature_block(every, mine)
            parts = apply_rows(column, z[:, place]).split(sizes, dim=1)
            probed.times.vectors += len(z)
            made[:, :, t] = torch.stack([row_dots(p, p).cpu() for p in parts], dim=1)
        return (made,)

    (samples,) = probed.map(vectors, squares, name="cross_layer")
    samples = (samples + samples.mT) / 2
    return samples.mean(0), samples.std(0) / len(samples) ** 0.5


def _names(
    problem: Problem,
    blocks: Sequence[tuple[int, ...]],
    groups: Sequence[str | Sequence[str]] | None,
) -> tuple[str, ...]:
    """Of the groups, or of the layers: what the parameters' names have in common."""
    if groups is not None:
        return tuple(g if isinstance(g, str) else " ".join(g) for g in groups)
    return tuple(_common([problem.layout.names[i] for i in mine]) for mine in blocks)


def _common(names: Sequence[str]) -> str:
    """The module that some parameters are all in, or the first of them if there is none."""
    paths = [name.split(".")[:-1] or [name] for name in names]
    prefix = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        prefix.append(parts[0])
    return ".".join(prefix) or names[0]
