"""The Fisher metric: exact, Monte-Carlo and empirical."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from llqr_mf.losses import Loss
from llqr_mf.losses.base import Totals
from llqr_mf.operators.outer_curvature import OuterCurvature
from llqr_mf.operators.output_curvature import OutputCurvature

from ..seeds import mixed
from .base import Metric

_KINDS = ("exact", "monte_carlo", "empirical")


@dataclass(frozen=True)
class Fisher(Metric):
    """The Fisher matrix of the output distribution that the loss is a likelihood of.

    Args:
        kind: "exact" is in closed form. "monte_carlo" is an unbiased estimate from targets drawn
            from the model; its rank is `samples` per sample, which makes it the cheap one where a
            sample has many outputs. "empirical" puts the given targets in the draws' place: not a
            Fisher matrix but an outer product of gradients, which vanishes as the model fits.
        samples: Draws per sample, for "monte_carlo".
        seed: Seed of the draws, for "monte_carlo": the same seed draws the same on the same
            outputs, so take another one per step (`dataclasses.replace(metric, seed=...)`).
            Batches of a `StreamedProblem` have draws of their own.
    """

    kind: Literal["exact", "monte_carlo", "empirical"] = "exact"
    _: KW_ONLY
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(
                f"kind of Fisher is {self.kind!r}: choose one of {', '.join(map(repr, _KINDS))}."
            )
        if self.samples < 1:
            raise ValueError(f"samples of Fisher is {self.samples}: draw at least one per sample.")

    def terminal(self, loss: Loss, outputs: Tensor, targets: Tensor) -> OutputCurvature:
        """The Fisher matrix at the output, shape (N*D, N*D), a mean over the loss's count."""
        if self.kind == "exact":
            return loss.fisher(outputs, targets)
        if self.kind == "monte_carlo":
            generator = torch.Generator(device=outputs.device).manual_seed(self.seed)
            vectors = loss.sample_gradients(outputs, targets, self.samples, generator)
        else:
            vectors = loss.per_sample_gradients(outputs, targets).unsqueeze(-1)
        # At least one: where nothing counts the vectors are zero.
        total = vectors.shape[-1] * max(1, loss.count(outputs, targets))
        return OuterCurvature(outputs.new_empty(0), vectors=vectors / total**0.5)

    def mass(self, totals: Totals) -> float:
        """The loss's `fisher_mass`; mass^2 / draws for the empirical one.

        A sample's gradient there is draws / mass times one that does not depend on the others, and
        the sum of their squares is divided by draws.
        """
        if self.kind != "empirical":
            return totals.fisher
        return totals.mass**2 / totals.draws if totals.draws else 0.0

    def of_batch(self, place: int) -> Fisher:
        """With a seed of its own for every batch but the first."""
        if self.kind != "monte_carlo" or not place:
            return self
        return replace(self, seed=mixed(self.seed, place))
