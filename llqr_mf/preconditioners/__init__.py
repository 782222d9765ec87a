"""Structured inverse preconditioners: M, cheap to multiply, positive definite, close to H^{-1}."""

from . import baselines
from .base import Structure
from .blueprint import Blueprint
from .chart import Chart
from .combine import Scaled, Sum
from .diagonal import Diagonal
from .direct_sum import DirectSum, structure
from .ekronecker import EKronecker
from .identity import Identity
from .kronecker import Kronecker
from .layerwise import Layerwise
from .low_rank import LowRank
from .scalar import Scalar
from .subsampled import SubsampledDual

__all__ = [
    "Blueprint",
    "Chart",
    "Diagonal",
    "DirectSum",
    "EKronecker",
    "Identity",
    "Kronecker",
    "Layerwise",
    "LowRank",
    "Scalar",
    "Scaled",
    "Structure",
    "SubsampledDual",
    "Sum",
    "baselines",
    "structure",
]
