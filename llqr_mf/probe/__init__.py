"""Probing curvature and what approximates it."""

from .compare import Comparison, ComparisonRow, compare

__all__ = ["Comparison", "ComparisonRow", "compare"]
