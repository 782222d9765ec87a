"""The linearised network as a Gaussian process: tangent kernels, Laplace posterior, evidence."""

from .evidence import Evidence, PriorChoice, choose_prior, evidence_of, log_evidence
from .kernel_matrix import kernel, kernel_matrix
from .laplace import Laplace
from .likelihood import Likelihood
from .predictive import bernoulli_probabilities, class_probabilities
from .tangent_kernel import NetworkMean, NeuralTangentKernel

__all__ = [
    "Evidence",
    "Laplace",
    "Likelihood",
    "NetworkMean",
    "NeuralTangentKernel",
    "PriorChoice",
    "bernoulli_probabilities",
    "choose_prior",
    "class_probabilities",
    "evidence_of",
    "kernel",
    "kernel_matrix",
    "log_evidence",
]
