"""Solvers of the condensed equations. They know the operators only."""

from .cg import CGResult, NegativeCurvatureError, cg
from .costate import CostateEquation
from .dual import Dual, DualResult, gram_by_products
from .inexact import RefinedResult, refined_cg
from .low_rank import LowRankResult, low_rank
from .minres import MinresResult, minres
from .nystrom import Nystrom
from .riccati import RiccatiResult, riccati
from .status import Code, Status

__all__ = [
    "CGResult",
    "Code",
    "CostateEquation",
    "Dual",
    "DualResult",
    "LowRankResult",
    "MinresResult",
    "NegativeCurvatureError",
    "Nystrom",
    "RefinedResult",
    "RiccatiResult",
    "Status",
    "cg",
    "gram_by_products",
    "low_rank",
    "minres",
    "refined_cg",
    "riccati",
]
