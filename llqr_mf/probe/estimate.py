"""What an estimator returns: a number and how far off it may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor

from ..fitting.report import plain_number


@dataclass(frozen=True, eq=False)
class Estimate:
    """A random estimate with its standard error.

    Args:
        value: The estimate, float64; a scalar, or a tensor of many at once.
        standard_error: Its standard deviation over seeds, as estimated from the samples; the
            shape of `value`. NaN where one sample cannot tell, zero where the value is exact.
        samples: Samples behind the standard error; NaN-free intervals need 2.
        products: Vectors multiplied by the operator.
        seed: Of the random vectors.
        method: Which estimator.
        bias_bound: How far the expected value may be off, where that is known (the quadrature of
            a Lanczos run); zero for an unbiased estimator. An interval is widened by it.
    """

    value: Tensor
    standard_error: Tensor
    samples: int
    products: int
    seed: int
    method: str
    bias_bound: Tensor | float = 0.0

    def __float__(self) -> float:
        return float(self.value)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """A confidence interval by Student's t, widened by `bias_bound`: lower and upper end.

        Args:
            level: The share of seeds whose interval is to hold the true value.

        Raises:
            ValueError: `level` is not between 0 and 1.
        """
        half = wide_of(level, self.samples) * self.standard_error + self.bias_bound
        return self.value - half, self.value + half

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON; None for what is not finite."""
        return {
            "value": plain(self.value),
            "standard_error": plain(self.standard_error),
            "bias_bound": plain(torch.as_tensor(self.bias_bound)),
            "samples": self.samples,
            "products": self.products,
            "seed": self.seed,
            "method": self.method,
        }

    def __str__(self) -> str:
        if self.value.ndim:
            return f"{self.method}: {self.value.numel()} numbers, {self.products} products"
        return (
            f"{float(self.value):.6g} +- {float(self.standard_error):.2g} "
            f"({self.method}, {self.products} products)"
        )


def wide_of(level: float, samples: int) -> float:
    """Half the width of an interval of that level in standard errors, by Student's t."""
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: give a number between 0 and 1, say 0.95.")
    return float(stdtrit(max(1, samples - 1), (1 + level) / 2))


def mean_estimate(
    samples: Tensor, *, products: int, seed: int, method: str, bias_bound: Tensor | float = 0.0
) -> Estimate:
    """The mean over the first axis of independent samples, and the standard error of that."""
    samples = samples.double()
    count = len(samples)
    if count > 1:
        error = samples.std(0) / count**0.5
    else:
        error = torch.full_like(samples[0], torch.nan)
    return Estimate(samples.mean(0), error, count, products, seed, method, bias_bound)


def plain(numbers: Tensor) -> Any:
    """A tensor as nested lists of numbers, or a number; None for what is not finite."""
    if numbers.ndim:
        return [plain(part) for part in numbers]
    return plain_number(float(numbers))
