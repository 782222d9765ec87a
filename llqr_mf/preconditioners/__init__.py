"""Structured inverse preconditioners: M, cheap to multiply, positive definite, close to H^{-1}."""

from .base import Structure
from .blueprint import Blueprint
from .chart import Chart
from .diagonal import Diagonal
from .ekronecker import EKronecker
from .kronecker import Kronecker

__all__ = ["Blueprint", "Chart", "Diagonal", "EKronecker", "Kronecker", "Structure"]
