"""Metrics: which divergence measures a step, and so which curvature the model has."""

from .base import CostModel, Metric, StateCostSpec
from .divergence import Divergence
from .fisher import Fisher
from .gauss_newton import GaussNewton
from .kl import KL
from .lookup import get_metric, metric_names
from .newton import Newton
from .renyi import Renyi
from .reverse_kl import ReverseKL
from .squared_error import SquaredError
from .state_costs import StateCosts

__all__ = [
    "KL",
    "CostModel",
    "Divergence",
    "Fisher",
    "GaussNewton",
    "Metric",
    "Newton",
    "Renyi",
    "ReverseKL",
    "SquaredError",
    "StateCostSpec",
    "StateCosts",
    "get_metric",
    "metric_names",
]
