"""Matrix-free Layerwise LQR: exact curvature steps of deep nets, without a matrix."""

from . import (
    gaussian_process,
    losses,
    metrics,
    operators,
    optimizer,
    preconditioners,
    probe,
    solvers,
)
from .apply_step import apply_step_
from .fitting import FitReport, fit
from .levenberg_marquardt import LevenbergMarquardt
from .network import Layer, split
from .optimizer import LLQR
from .preconditioners import Diagonal, EKronecker, Identity, Kronecker, LowRank, Scalar
from .problem import LQRProblem
from .solution import Solution
from .solve import solve
from .streamed import StreamedProblem

__all__ = [
    "LLQR",
    "Diagonal",
    "EKronecker",
    "FitReport",
    "Identity",
    "Kronecker",
    "LQRProblem",
    "Layer",
    "LevenbergMarquardt",
    "LowRank",
    "Scalar",
    "Solution",
    "StreamedProblem",
    "apply_step_",
    "fit",
    "gaussian_process",
    "losses",
    "metrics",
    "operators",
    "optimizer",
    "preconditioners",
    "probe",
    "solve",
    "solvers",
    "split",
]
