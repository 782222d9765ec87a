"""Class probabilities from Gaussian logits."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Approximation: TypeAlias = Literal["monte_carlo", "probit"]
"""How an expectation over the logits is taken."""

DRAWN_ELEMENTS = 2**24
"""Logits drawn at a time."""


@torch.no_grad()
def class_probabilities(
    mean: Tensor,
    covariance: Tensor,
    *,
    method: Approximation = "monte_carlo",
    samples: int = 1000,
    seed: int = 0,
) -> Tensor:
    """E[softmax(f)] for f ~ N(mean, covariance), sample by sample.

    "probit" is the formula of MacKay 1992, softmax_c(mean_c / sqrt(1 + pi/8 var_c)), for more than
    two classes as in Gibbs 1997; it sees the variances alone. "monte_carlo" sees the covariances.

    Args:
        mean: Logits, (M, C).
        covariance: Of every sample, (M, C, C).
        method: Which.
        samples: Draws of "monte_carlo".
        seed: Of those.

    Returns:
        Tensor (M, C), rows that add up to one.

    Raises:
        ValueError: A shape does not fit, or an option is unknown.
    """
    _check(mean, covariance, method, samples)
    if method == "probit":
        return torch.softmax(_moderated(mean, covariance), -1)
    return _expectation(mean, covariance, samples, seed, binary=False)


@torch.no_grad()
def bernoulli_probabilities(
    mean: Tensor,
    covariance: Tensor,
    *,
    method: Approximation = "monte_carlo",
    samples: int = 1000,
    seed: int = 0,
) -> Tensor:
    """E[sigmoid(f)], output by output; see `class_probabilities`.

    "probit" is sigmoid(mean / sqrt(1 + pi/8 var)) (MacKay 1992).
    """
    _check(mean, covariance, method, samples)
    if method == "probit":
        return torch.sigmoid(_moderated(mean, covariance))
    return _expectation(mean, covariance, samples, seed, binary=True)


def _moderated(mean: Tensor, covariance: Tensor) -> Tensor:
    variance = covariance.diagonal(dim1=1, dim2=2).clamp(min=0)
    return mean / (1 + math.pi / 8 * variance).sqrt()


def _expectation(
    mean: Tensor, covariance: Tensor, samples: int, seed: int, *, binary: bool
) -> Tensor:
    # By eigenvectors: a covariance may be singular, and off by rounding.
    eigenvalues, vectors = torch.linalg.eigh(covariance.double())
    root = vectors * eigenvalues.clamp(min=0).sqrt().unsqueeze(1)
    generator = torch.Generator(mean.device).manual_seed(seed)
    wide, total = mean.double(), torch.zeros_like(mean, dtype=torch.float64)
    step = max(1, DRAWN_ELEMENTS // max(1, mean.numel()))
    for start in range(0, samples, step):
        # One draw after another, so that the numbers do not depend on the step.
        shape = min(step, samples - start), *mean.shape
        noise = torch.empty(shape, dtype=torch.float64, device=mean.device)
        for draw in noise:
            draw.normal_(generator=generator)
        logits = wide + torch.einsum("mcd,smd->smc", root, noise)
        total += (torch.sigmoid(logits) if binary else torch.softmax(logits, -1)).sum(0)
    return (total / samples).to(mean.dtype)


def _check(mean: Tensor, covariance: Tensor, method: str, samples: int) -> None:
    if method not in get_args(Approximation):
        raise ValueError(f"method={method!r}: choose 'monte_carlo' or 'probit'.")
    if mean.ndim != 2 or covariance.shape != (*mean.shape, mean.shape[-1]):
        raise ValueError(
            f"mean has shape {tuple(mean.shape)} and covariance {tuple(covariance.shape)}: give "
            "(M, C) and (M, C, C)."
        )
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples is {samples!r}: give at least 1 draw.")
