"""Networks as layered systems: model -> layers -> linearisation -> stages."""

from .linearize import Linearization, linearize
from .split import Layer, split
from .stage import NetworkStage, build_stages, with_curvature

__all__ = [
    "Layer",
    "Linearization",
    "NetworkStage",
    "build_stages",
    "linearize",
    "split",
    "with_curvature",
]
