"""Log-determinants of positive-definite operators."""

from __future__ import annotations

import os
import warnings
from typing import Literal, TypeAlias, get_args

import torch
from linear_operator import LinearOperator
from torch import Tensor

from ..operators.apply import apply_rows, as_operator
from ..preconditioners.roots import inverse_root_of, logdet_of
from ..solvers.cg import CGResult, cg
from ..solvers.dots import row_dots
from ..solvers.quadrature import bracket, gauss
from ..solvers.status import MESSAGES, Code
from .checks import check_definite, check_lower, check_positive, check_rtol
from .draws import Kind
from .estimate import Estimate, mean_estimate
from .probed import Probeable, Probed, symmetric_operator
from .spectral_sum import columns_that_fit, lanczos_runs

Method: TypeAlias = Literal["cg", "lanczos"]

RTOL = 1e-3
"""Where CG stops by default: the quadrature is then far below the noise of the vectors."""

CG_BLOCKS = 6
"""Numbers in memory per entry of a right-hand side, between those without and with M."""


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

    "cg" takes the tridiagonal matrices from the coefficients of CG on random right-hand sides, and
    stops when they are solved. Memory, for each of `columns` right-hand sides: 5 n numbers, 7 n
    with M, which are float64 where columns * n is at most 2^24, besides what products make.
    "lanczos" runs a fixed number of steps, by default with all its vectors kept.

    A preconditioner M = S S', about A^{-1}, takes its own logarithm out of the noise (Gardner et
    al. 2018): log det A = log det(S'A S) - log det M, and the closer S'A S is to I, the smaller the
    variance, which goes with the spread of the logarithms of its eigenvalues. The right-hand sides
    are b = S^{-T} z, so that the CG on A with M is that on S'A S from z, with z as `probes` says.
    So M must have a known S: a matrix, a diagonal, or one of the structures `Identity`, `Scalar`,
    `Diagonal`, `Kronecker`, `EKronecker`, `LowRank`, and `DirectSum` or `Scaled` of these.

    There are two errors: the standard error, of the random vectors, and `bias_bound`, of the
    truncation, which is a bound with `lower` and otherwise an estimate (`spectral_sum`). With
    `max_iterations` reached the truncation is larger, and `bias_bound` says so; it is infinite
    where there was one iteration, no `lower`, and no convergence.

    Only a positive-definite A has an answer; a sign is not computed. An indefinite or singular one
    is refused where a Ritz value is not above the rounding of the largest. Few right-hand sides
    and iterations may not get there: then CG does not converge, or the truncation of Lanczos is
    more than twice the standard error, and a RuntimeWarning says so.

    Products: of "cg" those of the solves, and with M and `lower` one more per vector, for the last
    coefficient.

    Args:
        A: A symmetric positive-definite operator or matrix, or a problem, whose Hessian with its
            damping is meant.
        vectors: Random vectors.
        preconditioner: M, for "cg".
        method: "cg" or "lanczos".
        rtol: Relative residual at which CG stops; None takes 1e-3. The error of the quadrature goes
            with its square.
        max_iterations: Of CG; None takes `solvers.krylov.default_iterations`.
        steps: Of "lanczos".
        lower: A lower bound of the spectrum, say the damping; with M, of that of M A. Positive.
        probes: Distribution of z.
        seed: Of the vectors.
        reorthogonalize: For "lanczos", see `solvers.quadrature.tridiagonalize`.
        columns: Vectors in memory at a time; None takes all, or as many as fit in 2^27 numbers.
        progress: Show a progress bar.
        checkpoint: A folder to go on from.

    Returns:
        The log-determinant.

    Raises:
        ValueError: A is not positive definite beyond rounding, `lower` is no lower bound, M has no
            known root, or an option is out of range.
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
        check_positive(runs.rule()[0], probed.proto.dtype)
        samples, errors = runs.form(torch.log, lower=lower)
        made = _estimate(samples, errors, 0.0, probed, "Lanczos")
        if lower is None and bool(made.bias_bound > 2 * made.standard_error):
            warnings.warn(
                f"the truncation of the log-determinant, about {float(made.bias_bound):.2g}, is "
                f"more than twice its standard error: raise `steps`={steps}, or add damping.",
                RuntimeWarning,
                stacklevel=2,
            )
        return made
    if vectors < 1:
        raise ValueError(f"vectors is {vectors}: give at least 1, and 2 for a standard error.")
    if rtol is not None:
        check_rtol(rtol)
    size = symmetric_operator(A).shape[-1]
    M = None if preconditioner is None else as_operator(preconditioner)
    if M is not None and tuple(M.shape) != (size, size):
        raise ValueError(f"the preconditioner has shape {tuple(M.shape)}, and A {size} rows.")
    root = None if M is None else inverse_root_of(M)
    taken_out = 0.0 if M is None else logdet_of(M)
    if columns is None:
        columns = columns_that_fit(A, vectors, CG_BLOCKS)
    header = {
        "estimator": "log-determinant by CG",
        "rtol": rtol,
        "max_iterations": max_iterations,
        "lower": lower,
        "preconditioned": M is not None,
    }
    probed = Probed(
        A,
        seed=seed,
        probes=probes,
        columns=columns,
        progress=progress,
        checkpoint=checkpoint,
        header=header,
        preconditioner=M,
    )
    dtype = probed.proto.dtype
    if rtol is None:
        rtol = RTOL

    def solve(rows: Tensor) -> tuple[Tensor, ...]:
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
        left = solved.residual_norm.clamp(min=1e-100)
        in_norm = left.square()
        if M is not None and lower is not None:
            r = b - apply_rows(probed.operator, solved.x.mT.contiguous())
            probed.times.vectors += len(rows)
            in_norm = row_dots(r, apply_rows(M, r.to(M.dtype)).to(dtype)) / square
        # The recurrence stopped at `rtol`; a restart may have gone on from there.
        in_norm = in_norm * (rtol / left).clamp(min=1).square()
        made = []
        for j in range(len(rows)):
            diagonal, off = solved.tridiagonal(j)
            ritz = gauss(diagonal, off)[0]
            check_positive(ritz, dtype)
            coupling = _coupling(solved, j, in_norm[j]).clamp(max=ritz[-1])
            made.append(
                bracket(
                    diagonal,
                    off,
                    torch.log,
                    lower=lower,
                    coupling=coupling,
                    rounding=torch.finfo(dtype).eps,
                )
            )
        values, errors = (torch.stack(part) for part in zip(*made, strict=True))
        cut = [code is Code.MAX_ITERATIONS for code in solved.codes]
        return values * square, errors * square, torch.tensor(cut, device=square.device)

    samples, errors, cut = probed.map(vectors, solve, name="CG")
    if bool(cut.any()):
        warnings.warn(
            f"the log-determinant is of {int(cut.sum())} solves of {vectors} that did not "
            f"converge: {MESSAGES[Code.MAX_ITERATIONS]} Of a singular A none does.",
            RuntimeWarning,
            stacklevel=2,
        )
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


def _coupling(solved: CGResult, column: int, left: Tensor) -> Tensor:
    """What couples the step after the last in the Lanczos matrix of a CG; float64, shape ().

    It is sqrt(beta) p'Ap / r'z, and a product of betas is r'z over its first value. The last beta
    is not made where a column ends: there it follows from the residual.

    Args:
        solved: The solve.
        column: Which column.
        left: r'z at the end over that at the start.
    """
    assert solved.coefficients is not None
    curvature, beta = solved.coefficients[:, :, column]
    m = int((~curvature.isnan()).sum())
    last = beta[m - 1]
    if not bool(last > 0):
        last = left / beta[: m - 1].prod()
    return last.sqrt() * curvature[m - 1]
