"""Log-determinants of positive-definite operators."""

from __future__ import annotations

import os
from typing import Literal, TypeAlias, get_args

import torch
from linear_operator import LinearOperator
from torch import Tensor

from ..operators.apply import apply_rows, as_operator
from ..preconditioners.roots import inverse_root_of, logdet_of
from ..solvers.cg import cg
from ..solvers.dots import row_dots
from ..solvers.quadrature import bracket
from .draws import Kind
from .estimate import Estimate, mean_estimate
from .inverse_quadratic import check_definite, check_lower, check_rtol
from .probed import Probeable, Probed
from .spectral_sum import lanczos_runs

Method: TypeAlias = Literal["cg", "lanczos"]


def logdet(
    A: Probeable,
    *,
    vectors: int = 30,
    preconditioner: LinearOperator | Tensor | None = None,
    method: Method = "cg",
    rtol: float | None = None,
    max_iterations: int | None = None,
    steps: int = 50,
    lower: float | None = None,
    probes: Kind = "rademacher",
    seed: int = 0,
    reorthogonalize: bool = True,
    columns: int | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate:
    """The logarithm of det A of a positive-definite A, by stochastic Lanczos quadrature.

    "cg" takes the tridiagonal matrices from the coefficients of CG on random right-hand sides, at
    four vectors of memory each, and stops when they are solved. "lanczos" runs a fixed number of
    steps, by default with all its vectors kept.

    A preconditioner M = S S', about A^{-1}, takes its own logarithm out of the noise (Gardner et
    al. 2018): log det A = log det(S'A S) - log det M, and the closer S'A S is to I, the smaller the
    variance, which goes with the spread of the logarithms of its eigenvalues. The right-hand sides
    are b = S^{-T} z, so that the CG on A with M is that on S'A S from z, with z as `probes` says.
    So M must have a known S: a matrix, a diagonal, or one of the structures `Identity`, `Scalar`,
    `Diagonal`, `Kronecker`, `EKronecker`, `LowRank`, and `DirectSum` or `Scaled` of these.

    There are two errors: the standard error, of the random vectors, and `bias_bound`, of the
    truncation, which is a bound with `lower` and otherwise an estimate (`spectral_sum`). With
    `max_iterations` reached the truncation is larger, and `bias_bound` says so.

    Only a positive-definite A has an answer; a sign is not computed. An indefinite or singular one
    is refused where that is met; what so few right-hand sides and iterations do not see stays
    unseen.

    Args:
        A: A symmetric positive-definite operator or matrix, or a problem, whose Hessian with its
            damping is meant.
        vectors: Random vectors.
        preconditioner: M, for "cg".
        method: "cg" or "lanczos".
        rtol: Relative residual at which CG stops; None takes 1e-6 in float64, else 1e-4.
        max_iterations: Of CG; None takes `solvers.krylov.default_iterations`.
        steps: Of "lanczos".
        lower: A lower bound of the spectrum, say the damping; with M, of that of M A. Positive.
        probes: Distribution of z.
        seed: Of the vectors.
        reorthogonalize: For "lanczos", see `solvers.quadrature.tridiagonalize`.
        columns: Vectors in memory at a time.
        progress: Show a progress bar.
        checkpoint: A file to go on from.

    Returns:
        The log-determinant.

    Raises:
        ValueError: A is not positive definite, `lower` is no lower bound, M has no known root, or
            an option is out of range.
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}: choose 'cg' or 'lanczos'.")
    check_lower(lower)
    if method == "lanczos":
        if preconditioner is not None:
            raise ValueError("method='lanczos' takes no preconditioner: use method='cg'.")
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
        _check_positive(runs.rule()[0])
        samples, errors = runs.form(torch.log, lower=lower)
        return _estimate(samples, errors, 0.0, probed, "Lanczos")
    if vectors < 1:
        raise ValueError(f"vectors is {vectors}: give at least 1, and 2 for a standard error.")
    if rtol is not None:
        check_rtol(rtol)
    M = None if preconditioner is None else as_operator(preconditioner)
    root = None if M is None else inverse_root_of(M)
    taken_out = 0.0 if M is None else logdet_of(M)
    header = {
        "estimator": "log-determinant by CG",
        "rtol": rtol,
        "max_iterations": max_iterations,
        "lower": lower,
        "preconditioner": None if M is None else f"log-determinant {taken_out:.6g}",
    }
    probed = Probed(
        A,
        seed=seed,
        probes=probes,
        columns=columns,
        progress=progress,
        checkpoint=checkpoint,
        header=header,
    )
    if preconditioner is not None and tuple(preconditioner.shape) != (probed.size, probed.size):
        raise ValueError(
            f"the preconditioner has shape {tuple(preconditioner.shape)}, and A {probed.size} rows."
        )
    dtype = probed.proto.dtype
    if rtol is None:
        rtol = 1e-6 if dtype == torch.float64 else 1e-4

    def solve(rows: Tensor) -> tuple[Tensor, Tensor]:
        square = row_dots(rows, rows)
        b = rows if root is None else apply_rows(root, rows.to(root.dtype)).to(dtype)
        solved = cg(
            probed.operator,
            b.mT,
            preconditioner=M,
            rtol=rtol,
            max_iterations=max_iterations,
        )
        probed.times.vectors += solved.products * len(rows)
        check_definite(solved)
        made = [
            bracket(*solved.tridiagonal(j), torch.log, lower=lower, rounding=torch.finfo(dtype).eps)
            for j in range(len(rows))
        ]
        values, errors = (torch.stack(part) for part in zip(*made, strict=True))
        return values * square, errors * square

    samples, errors = probed.map(vectors, solve, name="CG")
    return _estimate(samples, errors, taken_out, probed, "CG")


def _estimate(
    samples: Tensor, errors: Tensor, taken_out: float, probed: Probed, name: str
) -> Estimate:
    return mean_estimate(
        samples - taken_out,
        products=probed.products,
        seed=probed.seed,
        method=f"log-determinant by {name}",
        bias_bound=errors.mean(0),
    )


def _check_positive(ritz: Tensor) -> None:
    least = float(ritz.min())
    if not least > 0:
        raise ValueError(
            f"A is not positive definite: it has an eigenvalue of at most {least:.6g}. Add "
            "damping, or use a Gauss-Newton or Fisher metric."
        )
