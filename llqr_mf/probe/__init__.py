"""Probing curvature and what approximates it."""

from .compare import Comparison, ComparisonRow, compare
from .cross_layer import CrossLayer, cross_layer
from .estimate import Estimate

__all__ = [
    "Comparison",
    "ComparisonRow",
    "CrossLayer",
    "Estimate",
    "compare",
    "cross_layer",
]
