"""Losses: value, gradient and curvature at the network's output, all of them means."""

from .base import Loss
from .bce import BCEWithLogits
from .callable import CallableLoss
from .cross_entropy import CrossEntropy
from .log_probabilities import KLDivergence, NegativeLogLikelihood
from .lookup import LossSpec, get_loss, loss_names
from .mse import MeanSquaredError

__all__ = [
    "BCEWithLogits",
    "CallableLoss",
    "CrossEntropy",
    "KLDivergence",
    "Loss",
    "LossSpec",
    "MeanSquaredError",
    "NegativeLogLikelihood",
    "get_loss",
    "loss_names",
]
