"""Symmetric matrices of given spectra, which the estimators are tested on."""

from __future__ import annotations

import torch
from torch import Tensor

F64 = torch.float64
KINDS = ("rademacher", "gaussian", "spherical")
SIZE = 60


def spectrum(name: str, n: int = SIZE) -> Tensor:
    i = torch.arange(n, dtype=F64)
    return {
        "flat": 1 + i / (2 * n),
        "exponential": 0.8**i,
        "polynomial": (1 + i) ** -1.5,
        "step": torch.where(i < 12, 1.0, 1e-3).to(F64),
        "indefinite": (-0.85) ** i,
    }[name]


def matrix(values: Tensor, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=generator))
    A = (q * values) @ q.mT
    return (A + A.mT) / 2
