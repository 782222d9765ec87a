"""Probing curvature and what approximates it."""

from .alignment import Alignment, gradient_alignment
from .compare import Comparison, ComparisonRow, compare
from .condition import ConditionNumber, condition_number
from .cross_layer import CrossLayer, cross_layer
from .depth import Depth, DepthRow, through_depth
from .diagonal import diagonal
from .effective_dimension import effective_dimension
from .eigenvalues import Eigenpairs, eigenvalues
from .estimate import Estimate
from .frobenius import frobenius_norm
from .inverse_quadratic import inverse_quadratic
from .logdet import logdet
from .preconditioned import preconditioned
from .sharpness import Sharpness, SharpnessPoint
from .spectral_density import SpectralDensity, spectral_density
from .spectral_sum import spectral_sum
from .trace import trace

__all__ = [
    "Alignment",
    "Comparison",
    "ComparisonRow",
    "ConditionNumber",
    "CrossLayer",
    "Depth",
    "DepthRow",
    "Eigenpairs",
    "Estimate",
    "Sharpness",
    "SharpnessPoint",
    "SpectralDensity",
    "compare",
    "condition_number",
    "cross_layer",
    "diagonal",
    "effective_dimension",
    "eigenvalues",
    "frobenius_norm",
    "gradient_alignment",
    "inverse_quadratic",
    "logdet",
    "preconditioned",
    "spectral_density",
    "spectral_sum",
    "through_depth",
    "trace",
]
