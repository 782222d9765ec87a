"""Solvers of the condensed equations. They know the operators only."""

from .cg import CGResult, NegativeCurvatureError, cg
from .costate import CostateEquation
from .dual import Dual, DualResult, gram_by_products
from .inexact import RefinedResult, refined_cg
from .lanczos import lanczos
from .lobpcg import lobpcg
from .low_rank import LowRankResult, low_rank
from .minres import MinresResult, minres
from .nystrom import Nystrom
from .quadrature import Tridiagonals, gauss, gauss_radau, tridiagonalize
from .riccati import RiccatiResult, riccati
from .ritz import RitzPairs
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
    "RitzPairs",
    "Status",
    "Tridiagonals",
    "cg",
    "gauss",
    "gauss_radau",
    "gram_by_products",
    "lanczos",
    "lobpcg",
    "low_rank",
    "minres",
    "refined_cg",
    "riccati",
    "tridiagonalize",
]
