"""One turn of a refresh: M learned from a few batches, or left exactly as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..fitting import FitReport, fit
from ..fitting.authors_ekronecker import AuthorsEKronecker
from ..preconditioners.base import Structure
from ..preconditioners.direct_sum import leaves
from ..problem import LQRProblem
from .halves import Batch, at_least_two
from .recipe import Recipe
from .running_mean import CLOSED_FORMS, RunningMean
from .schedule import equal_parts


class Refresher:
    """Learns M by a recipe.

    Args:
        structure: M, written in place.
        recipe: How it is learned.
        generator: Of random signs.
        model: Whose batches a fit cuts in half.

    Raises:
        ValueError: The structure cannot be learned that way.
    """

    def __init__(
        self,
        structure: Structure,
        recipe: Recipe,
        generator: torch.Generator,
        model: nn.Module | None = None,
    ) -> None:
        self.structure, self.recipe, self.generator = structure, recipe, generator
        self.model = model
        self.mean = RunningMean(structure, recipe, generator)
        self.last_fit: FitReport | None = None
        for part in leaves(structure):
            known = type(part) in CLOSED_FORMS
            if recipe.learn == "closed_form" and not known:
                raise ValueError(
                    f"'{part.kind}' has no closed form: use Recipe(learn='cg'), or another "
                    "structure."
                )
            free = isinstance(part, AuthorsEKronecker) and recipe.learn == "momentum"
            if not (known or free or part.charts()):
                raise ValueError(
                    f"'{part.kind}' has nothing that learn='{recipe.learn}' fits: use another "
                    "structure."
                )

    def learn(
        self,
        batches: Sequence[Batch],
        make: Callable[[Any, Tensor], LQRProblem],
        share: float,
        ready: LQRProblem | None = None,
    ) -> FitReport | None:
        """M from batches that count alike; on any exception all is as it was, bit for bit.

        Args:
            batches: One or more.
            make: The problem of a batch, with the recipe's damping.
            share: What they weigh in the running mean together.
            ready: The problem of the only batch, if there is one at hand.

        Returns:
            The fit's report, where the recipe has a fit.

        Raises:
            RefusedError: The curvature is NaN or infinite.
        """
        old, factors = self.structure.clone(), dict(self.mean.factors)
        signs = self.generator.get_state()
        try:
            if self.recipe.learn == "closed_form":
                for (inputs, targets), weight in self._weighted(batches, share):
                    # No name for the problem: the next one is made when this one is gone.
                    self.mean.add(ready or make(inputs, targets), weight)
                return None
            problems = [make(*batch) for batch in at_least_two(batches, self.model)]
            for problem, weight in self._weighted(problems, share):
                self.mean.add(problem, weight)
            self.last_fit = self._fit(problems)
            return self.last_fit
        except BaseException:
            self.structure.assign_(old)
            self.mean.factors = factors
            self.generator.set_state(signs)
            raise

    def _weighted(self, items: Sequence[Any], share: float) -> Any:
        return zip(items, equal_parts(share, len(items)), strict=True)

    def _fit(self, problems: Sequence[LQRProblem]) -> FitReport:
        """Fits M on all problems but the last, which is held out."""
        if self.recipe.learn == "momentum":
            return fit(self.structure, problems, method="momentum", exact=False)
        return fit(
            self.structure,
            problems,
            probes="curvature",
            count=self.recipe.probes,
            anchor=0.1,
            max_iterations=10,
            rtol=1e-2,
            generator=self.generator,
            exact=False,
        )
