"""Eigensolvers of several libraries, and how many products each takes to a residual."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from llqr_mf.operators.apply import apply_rows
from probe_peers import Counted, OverBudget, Task, lambda_operator, peer, pyhessian_of
from scipy.sparse.linalg import eigsh
from scipy.sparse.linalg import lobpcg as scipy_lobpcg

import llqr_mf as lq
from llqr_mf.preconditioners.baselines import ekfac

Solve = Callable[[Task, Counted, int, str, float, int], tuple[Any, Any]]
"""A solver: task, operator, k, end, what sets its accuracy, seed; to values and columns."""


def ours(**options: Any) -> Solve:
    """The library's own."""

    def solve(task: Task, A: Counted, k: int, which: str, rtol: float, seed: int) -> Any:
        asked = {name: (f(task) if callable(f) else f) for name, f in options.items()}
        pairs = lq.probe.eigenvalues(
            A.ours, k, which=which, rtol=rtol, max_products=int(A.most), seed=seed, **asked
        )
        if not bool(pairs.converged.all()):
            raise OverBudget
        assert pairs.products == A.vectors
        return pairs.values, pairs.vectors

    return solve


def arpack(task: Task, A: Counted, k: int, which: str, tol: float, seed: int, **more: Any) -> Any:
    """SciPy's `eigsh`, which curvlinops goes to as well."""
    start = np.random.default_rng(seed).standard_normal(A.n)
    end = {"largest": "LA", "smallest": "SA"}[which]
    return eigsh(A.to_scipy(), k, which=end, tol=tol, v0=start, maxiter=10**6, **more)


def lobpcg_of_scipy(task: Task, A: Counted, k: int, which: str, tol: float, seed: int) -> Any:
    """SciPy's."""
    start = np.random.default_rng(seed).standard_normal((A.n, k))
    tol *= task.scale("H")
    return scipy_lobpcg(A.to_scipy(), start, tol=tol, maxiter=2000, largest=which == "largest")


def power_of_pyhessian(task: Task, A: Counted, k: int, which: str, tol: float, seed: int) -> Any:
    """Power iteration with deflation; the largest magnitudes."""
    with pyhessian_of(task, A, seed) as whole:
        values, vectors = whole.eigenvalues(maxIter=10**6, tol=tol, top_n=k)
    columns = [torch.cat([part.flatten() for part in v]) for v in vectors]
    return torch.tensor(values, dtype=torch.float64), torch.stack(columns, 1)


def eigenthings(name: str, **more: Any) -> Solve:
    """hessian-eigenthings: for Lanczos the accuracy is a number of steps."""

    def solve(task: Task, A: Counted, k: int, which: str, tol: float, seed: int) -> Any:
        lib = peer("hessian_eigenthings.algorithms")
        if name == "lanczos":
            end = {"largest": "LA", "smallest": "SA"}[which]
            asked = {"max_iter": max(int(tol), k), "which": end, **more}
        else:
            asked = {"max_iter": 10**6, "tol": tol}
        found = getattr(lib, name)(lambda_operator(A), k=k, seed=seed, **asked)
        return found.eigenvalues, found.eigenvectors.mT

    return solve


def tighter(target: float) -> list[float]:
    """What is asked for, and less only if that gave a wrong pair."""
    return [target * 10 ** (-i / 2) for i in range(7)]


def tolerances(target: float) -> list[float]:
    """Looser to tighter."""
    return [100 * target * 10 ** (-i / 2) for i in range(15)]


def changes(target: float) -> list[float]:
    """Of an eigenvalue from one iteration to the next: about the square of a residual."""
    return [1e-2 * 10**-i for i in range(14)]


STEPS = sorted({int(4 * 1.06**i) for i in range(80)})
"""Of a Lanczos run without restarts; up to 399, which takes 399 vectors of memory."""

SOLVERS: dict[str, tuple[str | None, Solve, Callable[[float], Sequence[float]]]] = {
    "lq Lanczos": (None, ours(), tighter),
    "lq Lanczos, block=4": (None, ours(block=4), tighter),
    "lq Lanczos, basis=400": (None, ours(basis=400), tighter),
    "lq LOBPCG": (None, ours(method="lobpcg"), tighter),
    "lq LOBPCG, EKFAC": (
        None,
        ours(method="lobpcg", preconditioner=lambda task: ekfac(task.problems["G + damping"])),
        tighter,
    ),
    "SciPy eigsh": (None, arpack, tolerances),
    "SciPy eigsh, ncv as lq": (
        None,
        lambda task, A, k, *rest: arpack(task, A, k, *rest, ncv=max(2 * k + 10, 30)),
        tolerances,
    ),
    "SciPy lobpcg": (None, lobpcg_of_scipy, tolerances),
    "PyHessian": ("pyhessian", power_of_pyhessian, changes),
    "eigenthings Lanczos": (
        "hessian_eigenthings",
        eigenthings("lanczos"),
        lambda _: STEPS,
    ),
    "eigenthings Lanczos, orth.": (
        "hessian_eigenthings",
        eigenthings("lanczos", reorthogonalize=True),
        lambda _: STEPS,
    ),
    "eigenthings power": (
        "hessian_eigenthings",
        eigenthings("deflated_power_iteration"),
        tolerances,
    ),
}
CASES = [
    ("G", "largest", 1),
    ("G", "largest", 10),
    ("H", "largest", 1),
    ("H", "largest", 10),
    ("H", "smallest", 3),
    ("G + damping", "smallest", 3),
]


def applies(solver: str, matrix: str, which: str) -> bool:
    """Whether a solver has that end, and M > 0 is about the inverse of that matrix."""
    if which == "smallest":
        return "EKFAC" not in solver or matrix == "G + damping"
    return "EKFAC" not in solver


def products_to(
    task: Task, solver: str, case: tuple[str, str, int], target: float, seed: int, limit: int
) -> tuple[int | None, str]:
    """Vectors multiplied until all k pairs are right and have that residual, or why not."""
    matrix, which, k = case
    _, solve, controls = SOLVERS[solver]
    spectrum, scale = task.spectra[matrix], task.scale(matrix)
    right = spectrum[:k] if which == "smallest" else spectrum[-k:]
    note = "nothing tried gave it"
    for control in controls(target):
        A = task.counted(matrix, limit)
        try:
            values, vectors = (
                torch.as_tensor(np.asarray(a)) for a in solve(task, A, k, which, control, seed)
            )
        except OverBudget:
            return None, f"> {limit}"
        except (RuntimeError, ValueError, np.linalg.LinAlgError) as error:
            note = f"{type(error).__name__}: {str(error)[:50]}"
            continue
        x = vectors.mT / vectors.norm(dim=0)[:, None]
        residual = (apply_rows(A.operator, x) - values[:, None] * x).norm(dim=1).max() / scale
        wrong = (values.sort().values - right).abs().max() / scale
        if residual <= target and wrong <= target:
            return A.vectors, ""
        note = "wrong pairs" if residual <= target else note
    return None, note


def eigen_rows(
    task: Task, targets: Sequence[float], seeds: int, limit: int
) -> Iterator[dict[str, Any]]:
    """Every solver on every case."""
    for case in CASES:
        matrix, which, k = case
        for solver, (needs, _, _) in SOLVERS.items():
            if (needs and not peer(needs)) or not applies(solver, matrix, which):
                continue
            if which == "smallest" and solver in ("PyHessian", "eigenthings power"):
                continue
            row: dict[str, Any] = {"name": solver, "matrix": matrix, "which": which, "k": k}
            for target in targets:
                runs: list[tuple[int | None, str]] = []
                for seed in range(seeds):
                    runs.append(products_to(task, solver, case, target, seed, limit))
                    if runs[-1][0] is None:
                        break
                reached = [products for products, _ in runs]
                # One start that fails is enough: the row says so.
                row[f"{target:g}"] = None if None in reached else int(statistics.median(reached))
                if runs[-1][1]:
                    row["note"] = f"{target:g}: {runs[-1][1]}"
            yield row
