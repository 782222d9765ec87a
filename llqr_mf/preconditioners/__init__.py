"""Structured inverse preconditioners: M, cheap to multiply, positive definite, close to H^{-1}."""

from .base import Structure
from .blueprint import Blueprint
from .diagonal import Diagonal

__all__ = ["Blueprint", "Diagonal", "Structure"]
