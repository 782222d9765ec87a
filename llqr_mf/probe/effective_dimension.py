"""How many directions the data determine against the damping."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..problem import LQRProblem
from ..streamed import StreamedProblem
from .draws import Kind
from .estimate import Estimate, mean_estimate
from .probed import Probeable
from .spectral_sum import lanczos_runs


def effective_dimension(
    A: Probeable,
    damping: float | Sequence[float] | Tensor | np.ndarray | None = None,
    *,
    vectors: int = 10,
    steps: int = 30,
    probes: Kind = "rademacher",
    seed: int = 0,
    reorthogonalize: bool = True,
    columns: int | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate:
    """The trace of C (C + c I)^{-1}: sum_i l_i / (l_i + c), l_i >= 0 the eigenvalues of C.

    The effective number of parameters (MacKay 1992), degrees of freedom of ridge regression. C is:

    - the operator itself where an operator or a matrix is given, which must then not hold the
      damping already;
    - the curvature without damping where a problem is given. `problem.hessian` is H = C + R, so the
      R = r I of the problem is taken off: with h_i the eigenvalues of H, l_i = h_i - r. Where
      c = r, the default, that is n - r tr H^{-1}.

    By stochastic Lanczos quadrature (`spectral_sum`), whose truncation is bounded by the Gauss and
    the Gauss-Radau rule with a node at l = 0: `bias_bound`. Rounding of the products comes on top,
    up to n eps |C| / c in all. Products: vectors * steps, for any number of dampings.

    Where one eigenvalue outweighs the rest, intervals of few vectors are optimistic; see
    `spectral_sum`.

    Args:
        A: A symmetric positive-semidefinite operator or matrix C, or a problem with one.
        damping: c > 0, or several in a sequence, a tensor or an array of one axis, which give an
            estimate of as many numbers. None takes the problem's own.
        vectors: Random vectors.
        steps: Lanczos steps for each.
        probes: Their distribution.
        seed: Of the vectors.
        reorthogonalize: Whether the Lanczos vectors are kept orthogonal, and in memory.
        columns: Vectors in memory at a time.
        progress: Show a progress bar.
        checkpoint: A folder to go on from; see `spectral_sum`.

    Returns:
        The effective dimension, from 0 to n; float64, shape () or (dampings,).

    Raises:
        ValueError: C is not positive semidefinite, a damping is not positive and finite or is
            missing, or the problem's R is no multiple of I.
    """
    shift = 0.0
    if isinstance(A, LQRProblem | StreamedProblem):
        uniform = A.control_cost.uniform
        if uniform is None:
            raise ValueError(
                "the problem's R is no multiple of the identity: give a problem whose damping is "
                "one number, or an operator of the curvature alone and `damping`."
            )
        shift = uniform
    if damping is None:
        if not isinstance(A, LQRProblem | StreamedProblem):
            raise ValueError("damping is missing: an operator does not say what it is.")
        damping = shift
    given = torch.as_tensor(damping, dtype=torch.float64, device="cpu")
    if given.ndim > 1 or given.numel() == 0 or not bool(((given > 0) & given.isfinite()).all()):
        raise ValueError(f"damping is {damping}: give a positive number, or several.")
    runs, probed = lanczos_runs(
        A,
        vectors=vectors,
        steps=steps,
        probes=probes,
        seed=seed,
        reorthogonalize=reorthogonalize,
        columns=columns,
        progress=progress,
        checkpoint=checkpoint,
    )

    def share(c: float) -> tuple[Tensor, Tensor]:
        return runs.form(lambda h: (h - shift) / (h - shift + c), lower=shift)

    samples, errors = zip(*(share(c) for c in given.flatten().tolist()), strict=True)
    values, bias = torch.stack(samples, -1), torch.stack(errors, -1).mean(0)
    alone = given.ndim == 0
    return mean_estimate(
        values[:, 0] if alone else values,
        products=probed.products,
        seed=seed,
        method="stochastic Lanczos quadrature",
        bias_bound=bias[0] if alone else bias,
    )
