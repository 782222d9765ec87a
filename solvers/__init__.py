"""Solvers of the condensed equations. They know the operators only."""

from .cg import CGResult, NegativeCurvatureError, cg
from .dual import Dual, DualResult, gram_by_products
from .low_rank import LowRankResult, low_rank
from .minres import MinresResult, minres
from .riccati import RiccatiResult, riccati
from .status import Code, Status

__all__ = [
    "CGResult",
    "Code",
    "Dual",
    "DualResult",
    "LowRankResult",
    "MinresResult",
    "NegativeCurvatureError",
    "RiccatiResult",
    "Status",
    "cg",
    "gram_by_products",
    "low_rank",
    "minres",
    "riccati",
]
