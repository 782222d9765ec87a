"""Matrix-free Layerwise LQR: exact curvature steps of deep nets, without a matrix."""

from . import losses, metrics, operators, solvers
from .levenberg_marquardt import LevenbergMarquardt
from .network import Layer, split
from .problem import LQRProblem
from .solution import Solution
from .solve import solve
from .streamed import StreamedProblem

__all__ = [
    "LQRProblem",
    "Layer",
    "LevenbergMarquardt",
    "Solution",
    "StreamedProblem",
    "losses",
    "metrics",
    "operators",
    "solve",
    "solvers",
    "split",
]
