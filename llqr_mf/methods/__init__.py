"""How each method solves a problem: one file per family, all with the same signature."""

from .base import Found, Options
from .dual import by_dual
from .krylov import by_cg, by_minres
from .low_rank import by_low_rank
from .riccati import by_riccati

METHODS = {
    "cg": by_cg,
    "minres": by_minres,
    "dual": by_dual,
    "low_rank": by_low_rank,
    "riccati": by_riccati,
}
"""Functions of the options that give what was found, by name."""

__all__ = ["METHODS", "Found", "Options"]
