"""Eigenvalues at the ends of the spectrum, with a residual for each."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from linear_operator import LinearOperator
from torch import Tensor

from ..operators.apply import as_operator
from ..solvers.lanczos import lanczos
from ..solvers.lobpcg import lobpcg
from ..solvers.product import RowProduct
from ..solvers.ritz import RitzPairs, State, Which
from .journal import Journal
from .probed import Probeable, Probed, symmetric_operator

Method = Literal["lanczos", "lobpcg"]


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Approximate eigenvalues and eigenvectors.

    Some eigenvalue of A lies within `residual_norm[i]` of `values[i]` (Parlett 1998, theorem
    4.5.1), whether or not the pair has converged; rounding of the products aside. That it is the
    i-th one no residual can prove.

    Args:
        values: Falling; float64, shape (k,), or up to (2 k,) for "both".
        vectors: Orthonormal columns (n, k), in the operator's dtype, or float32 if that is
            narrower.
        residual_norm: |A x - value x| of each, from products made at the end; float64, (k,).
        converged: Which residuals meet the tolerance; shape (k,).
        products: Vectors multiplied by the operator.
        iterations: Blocks multiplied.
        restarts: How often Lanczos cut its basis down.
        seed: Of the random start.
        which: Which end.
        method: "lanczos" or "lobpcg".
    """

    values: Tensor
    vectors: Tensor
    residual_norm: Tensor
    converged: Tensor
    products: int
    iterations: int
    restarts: int
    seed: int
    which: Which
    method: Method

    def intervals(self) -> tuple[Tensor, Tensor]:
        """Lower and upper ends of intervals that hold an eigenvalue each; shapes (k,)."""
        return self.values - self.residual_norm, self.values + self.residual_norm

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON; without the vectors."""
        return {
            "values": self.values.tolist(),
            "residual_norm": self.residual_norm.tolist(),
            "converged": self.converged.tolist(),
            "products": self.products,
            "iterations": self.iterations,
            "restarts": self.restarts,
            "seed": self.seed,
            "which": self.which,
            "method": self.method,
        }

    def __str__(self) -> str:
        """The table."""
        lines = [f"{'eigenvalue':>16}{'residual':>12}{'converged':>11}"]
        columns = (self.values, self.residual_norm, self.converged)
        for value, residual, met in zip(*(c.tolist() for c in columns), strict=True):
            lines.append(f"{value:>16.8g}{residual:>12.2e}{'yes' if met else 'no':>11}")
        lines.append(f"{self.which}, {self.method}, {self.products} products")
        return "\n".join(lines)


def eigenvalues(
    A: Probeable,
    k: int = 6,
    *,
    which: Which = "largest",
    method: Method = "lanczos",
    block: int = 1,
    basis: int | None = None,
    preconditioner: RowProduct | Tensor | None = None,
    initial: Tensor | None = None,
    rtol: float | None = None,
    max_products: int | None = None,
    seed: int = 0,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Eigenpairs:
    """The k largest or smallest eigenvalues of a symmetric operator, and their vectors.

    Negative eigenvalues, say of a Newton Hessian, are eigenvalues like any other.

    "lanczos" (block Lanczos with thick restarts, Wu and Simon 2000) takes the fewest products
    where there is no preconditioner. "lobpcg" (Knyazev 2001) takes one, for the smallest end, and
    gains from it as CG does.

    A single start vector may find a multiple eigenvalue once only: `block` vectors find `block`
    copies. Memory, in vectors of length n: `basis` + 2 `block` for Lanczos and k more at the end,
    seven for each iterated vector for LOBPCG. A checkpoint holds the vectors that are kept, once
    in memory and, while it is written, twice.

    Args:
        A: See `Probeable`.
        k: How many; at each end for "both".
        which: "largest" and "smallest" by value, "both" ends, or the largest "magnitude".
        method: "lanczos" or "lobpcg". LOBPCG takes "largest" or "smallest".
        block: Vectors that Lanczos multiplies together. LOBPCG multiplies all at once.
        basis: Lanczos: vectors in a full basis; None takes 2 k + 10 `block`, 30 at least, with 2 k
            for k if "both". LOBPCG: vectors iterated; None takes a quarter more than k.
        preconditioner: LOBPCG only: approximates the inverse of A, positive definite: a structure
            or any operator, or a function of rows (j, n).
        initial: Columns (n, j) near the wanted vectors, say those of the weights before.
        rtol: A pair has converged with |A x - value x| <= rtol max |value|, the largest met on the
            way. None takes the root of the rounding of the dtype: 1.5e-8 in float64, 3.5e-4 in
            float32, 1e-2 in half precisions. The error of a value is then of the size of rounding
            where the others are well apart from it.
        max_products: Most vectors multiplied. None takes 1000, or more for a large basis.
        seed: Of the random start: the same seed gives the same bits.
        progress: Whether to show a progress bar.
        checkpoint: A folder to keep what is done in, at every restart (LOBPCG: every 10
            iterations), and to go on from, with the same `initial` and `preconditioner`;
            `max_products` may differ then.

    Returns:
        The pairs. A RuntimeWarning says so where some have not converged.

    Raises:
        TypeError: A is something else.
        ValueError: An argument does not fit, or a product is not finite.
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}: choose 'lanczos' or 'lobpcg'.")
    if method == "lanczos" and preconditioner is not None:
        raise ValueError("Lanczos takes no preconditioner: give method='lobpcg', or leave it out.")
    if method == "lobpcg" and block != 1:
        raise ValueError("LOBPCG multiplies all its vectors at once: set basis=, not block=.")
    if isinstance(preconditioner, Tensor):
        preconditioner = as_operator(preconditioner)
    start = None if initial is None else _initial_rows(initial, symmetric_operator(A))
    header = {
        "estimator": "eigenvalues",
        "k": k,
        "which": which,
        "method": method,
        "block": block,
        "basis": basis,
        "preconditioned": preconditioner is not None,
        "initial": 0 if start is None else len(start),
        "rtol": rtol,
    }
    probed = Probed(
        A,
        seed=seed,
        probes="gaussian",
        checkpoint=checkpoint,
        header=header,
        started_from=start,
        preconditioner=preconditioner,
    )
    state, keep = journaled(probed.journal)
    if method == "lanczos":
        found = lanczos(
            probed.operator,
            probed.draw,
            k,
            which=which,
            block=block,
            basis=basis,
            initial=start,
            rtol=rtol,
            max_products=max_products,
            state=state,
            on_restart=keep,
            progress=progress,
        )
    else:
        found = lobpcg(
            probed.operator,
            probed.draw,
            k,
            which=which,
            preconditioner=preconditioner,
            iterated=basis,
            initial=start,
            rtol=rtol,
            max_products=max_products,
            state=state,
            on_state=keep,
            progress=progress,
        )
    if not bool(found.converged.all()):
        warnings.warn(not_converged(found), RuntimeWarning, stacklevel=2)
    return Eigenpairs(
        values=found.values,
        vectors=found.rows.mT,
        residual_norm=found.residual_norm,
        converged=found.converged,
        products=found.products,
        iterations=found.iterations,
        restarts=found.restarts,
        seed=seed,
        which=which,
        method=method,
    )


def journaled(journal: Journal) -> tuple[State | None, Callable[[State], None] | None]:
    """The state that a journal holds, and what keeps the next in it, if it has a file."""
    if journal.path is None:
        return None, None
    state = journal.get("state")

    def keep(state: State) -> None:
        journal.put("state", state)

    return state, keep


def not_converged(found: RitzPairs) -> str:
    """What to say of pairs that have not converged."""
    met = found.converged
    worst = float((found.residual_norm / found.tolerance)[~met].max())
    text = (
        f"{int((~met).sum())} of {len(met)} eigenpairs have not converged in {found.products} "
        f"products (a residual is {worst:.2g} times its tolerance): "
    )
    if found.out_of_products:
        return text + "raise max_products or basis, or allow a larger rtol."
    return text + "rounding of the products leaves no more: allow a larger rtol, or use float64."


def _initial_rows(initial: Tensor, A: LinearOperator) -> Tensor:
    """Columns as rows.

    Raises:
        ValueError: They do not fit the operator.
    """
    size = A.shape[-1]
    if initial.ndim != 2 or initial.shape[0] != size or initial.shape[1] == 0:
        raise ValueError(f"initial has shape {tuple(initial.shape)}: give columns ({size}, j).")
    return initial.to(A.device).mT
