"""The LLQR optimizer."""

from .bookkeeping import Counts
from .coverage import Coverage, Covered
from .llqr import LLQR
from .recipe import Recipe
from .schedule import annealed, burn_in
from .subspace import Subspace

__all__ = ["LLQR", "Counts", "Coverage", "Covered", "Recipe", "Subspace", "annealed", "burn_in"]
