"""What `probes.py` compares: one task, and what each library calls its functions."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from linear_operator import settings
from llqr_mf.operators.apply import apply_rows
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn

import llqr_mf as lq
from llqr_mf.preconditioners.baselines import ekfac, jacobi

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from common import images, mlp, train


class OverBudget(Exception):
    """More products than a run may take."""


class Counted:
    """A symmetric operator as every library wants it, with its vectors counted.

    Args:
        operator: What is multiplied.
        most: Vectors after which `OverBudget` is raised.
    """

    def __init__(self, operator: Any, most: float = float("inf")) -> None:
        self.operator, self.most, self.vectors = operator, most, 0
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        self.n = int(operator.shape[0])
        self.ours = lq.operators.from_function(self.rows, self.n, dtype=self.dtype, rows=True)

    def rows(self, v: Tensor) -> Tensor:
        """Shape (k, n) to (k, n)."""
        self.vectors += len(v)
        if self.vectors > self.most:
            raise OverBudget
        with torch.no_grad():
            return apply_rows(self.operator, v.contiguous())

    def vector(self, v: Tensor) -> Tensor:
        """Shape (n,)."""
        return self.rows(v[None])[0]

    def numpy(self, x: Any) -> Any:
        """Columns (n,) or (n, k)."""
        columns = torch.from_numpy(np.array(x, dtype=np.float64)).reshape(self.n, -1)
        return self.rows(columns.mT).mT.numpy().reshape(x.shape)

    def to_scipy(self) -> LinearOperator:
        """For ARPACK."""
        return LinearOperator(
            (self.n, self.n), dtype=np.float64, matvec=self.numpy, matmat=self.numpy
        )

    def adjoint(self) -> Counted:
        """Itself."""
        return self

    def __matmul__(self, x: Tensor) -> Tensor:
        return self.vector(x) if x.ndim == 1 else self.rows(x.mT).mT

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self.vector(x) if x.ndim == 1 else self.rows(x)


def peer(name: str) -> Any:
    """A module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


class Task:
    """The net, its operators in float64, and their dense spectra."""

    def __init__(self, sizes: list[int], rows: int, steps: int, damping: float) -> None:
        x, y = images("digits")
        self.model = mlp(sizes)
        self.loss = train(self.model, x, y, steps)
        self.damping, self.single = damping, (x[:rows], y[:rows])
        self.data = (x[:rows].double(), y[:rows])
        self.model32, self.model = self.model, deepcopy(self.model).double()
        self.problems = {
            "G": self.problem("gauss_newton", 0.0),
            "H": self.problem("newton", 0.0),
            "G + damping": self.problem("gauss_newton", damping),
        }
        self.n = self.problems["G"].size
        self.spectra, self.diagonals = {}, {}
        for name in "GH":
            A = self.problems[name].hessian.to_dense()
            self.diagonals[name] = A.diagonal().clone()
            self.spectra[name] = torch.linalg.eigvalsh(A.add_(A.mT.clone()).div_(2))
        self.spectra["G + damping"] = self.spectra["G"] + damping

    def problem(self, metric: str, damping: float, *, single: bool = False) -> lq.LQRProblem:
        """The problem in one precision."""
        model, (x, y) = (self.model32, self.single) if single else (self.model, self.data)
        return lq.LQRProblem.from_network(
            lq.split(model), x, y, loss="cross_entropy", metric=metric, damping=damping
        )

    def counted(self, name: str, most: float = float("inf")) -> Counted:
        """A fresh count of an operator."""
        return Counted(self.problems[name].hessian, most)

    def scale(self, name: str) -> float:
        """The largest |eigenvalue|."""
        return float(self.spectra[name].abs().max())


@contextmanager
def pyhessian_of(task: Task, A: Counted, seed: int) -> Iterator[Any]:
    """PyHessian on our operator: its iterations, our products."""
    module = importlib.import_module("pyhessian.hessian")
    shapes = [p.shape for p in task.model.parameters()]

    def product(_: Any, __: Any, v: Sequence[Tensor]) -> list[Tensor]:
        parts = A.vector(torch.cat([part.flatten() for part in v])).split(
            [s.numel() for s in shapes]
        )
        return [part.view(s) for part, s in zip(parts, shapes, strict=True)]

    def eig(T: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(T)
        return torch.stack([values, torch.zeros_like(values)], 1), vectors

    kept, torch.eig = module.hessian_vector_product, eig
    torch.set_default_dtype(torch.float64)
    try:
        whole = module.hessian(
            deepcopy(task.model), nn.functional.cross_entropy, task.data, cuda=False
        )
        module.hessian_vector_product = product
        torch.manual_seed(seed)
        yield whole
    finally:
        module.hessian_vector_product = kept
        del torch.eig
        torch.set_default_dtype(torch.float32)


def lambda_operator(A: Counted) -> Any:
    """For hessian-eigenthings."""
    base = importlib.import_module("hessian_eigenthings.operators.base")
    return base.LambdaOperator(A.vector, A.n, dtype=A.dtype)


# ---- do the products agree


def agreement(task: Task) -> list[dict[str, Any]]:
    """Relative differences of one product of each library's own operator from ours."""
    v = torch.randn(task.n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model, loss, data = deepcopy(task.model), nn.CrossEntropyLoss(), [task.data]
    made: dict[tuple[str, str], Tensor] = {}
    for name, metric in (("G", "gauss_newton"), ("H", "newton")):
        single = task.problem(metric, 0.0, single=True).hessian
        made["lq in float32", name] = (single @ v.float()).double()
    if peer("curvlinops"):
        lib, parameters = peer("curvlinops"), list(model.parameters())
        kinds = (("G", lib.GGNLinearOperator), ("H", lib.HessianLinearOperator))
        for name, kind in kinds:
            made["curvlinops", name] = kind(model, loss, parameters, data) @ v
    if peer("hessian_eigenthings"):
        lib, losses = peer("hessian_eigenthings.operators"), peer("hessian_eigenthings.loss_fns")
        H = lib.HessianOperator(model, data, losses.supervised_loss(loss))
        forward, of_output = losses.supervised_forward, losses.supervised_loss_of_output(loss)
        G = lib.GGNOperator(model, data, forward, of_output)
        made |= {("hessian-eigenthings", name): A.matvec(v) for name, A in (("G", G), ("H", H))}
    if peer("pyhessian"):
        module = importlib.import_module("pyhessian.hessian")
        whole = module.hessian(model, loss, task.data, cuda=False)
        sizes = [p.numel() for p in whole.params]
        parts = [a.view_as(p) for a, p in zip(v.split(sizes), whole.params, strict=True)]
        image = module.hessian_vector_product(whole.gradsH, whole.params, parts)
        made["PyHessian", "H"] = torch.cat([part.flatten() for part in image])
    ours = {name: task.problems[name].hessian @ v for name in "GH"}
    return [
        {"name": lib, "matrix": name, "difference": float((w - ours[name]).norm() / w.norm())}
        for (lib, name), w in made.items()
    ]


# ---- traces and diagonals

Found = tuple[Any, Any]
"""An estimate, and its stated standard error or None."""

Estimator = tuple[str | None, Callable[[Counted, int, int], Found]]
"""The peer that is needed, and the estimate by operator, products and seed."""


def own(kind: str, method: str) -> Estimator:
    """The library's."""

    def estimate(A: Counted, m: int, seed: int) -> Found:
        made = getattr(lq.probe, kind)(A.ours, products=m, method=method, seed=seed)
        return made.value, made.standard_error

    return None, estimate


def of_curvlinops(name: str) -> Estimator:
    """Of curvlinops, whose generator is the global one."""

    def estimate(A: Counted, m: int, seed: int) -> Found:
        torch.manual_seed(seed)
        return getattr(peer("curvlinops"), name)(A, m), None

    return "curvlinops", estimate


def of_skerch(name: str, key: str) -> Estimator:
    """Of skerch; for XTrace and XDiag half of the products deflate."""

    def estimate(A: Counted, m: int, seed: int) -> Found:
        function = getattr(peer("skerch.algorithms"), name)
        share = m if name == "hutch" else m // 2
        return function(A, A.device, A.dtype, share, seed=1000 * seed)[key], None

    return "skerch", estimate


def of_eigenthings(method: str) -> Estimator:
    """Of hessian-eigenthings."""

    def estimate(A: Counted, m: int, seed: int) -> Found:
        lib = peer("hessian_eigenthings.algorithms")
        made = lib.trace(lambda_operator(A), num_matvecs=m, method=method, seed=seed)
        return made.estimate, made.stderr

    return "hessian_eigenthings", estimate


def of_matfree(name: str | None) -> Estimator:
    """Of matfree: a leave-one-out integrand, or the mean of forms, on signs or normals."""

    def estimate(A: Counted, m: int, seed: int) -> Found:
        import jax
        from matfree import stochtrace

        jax.config.update("jax_enable_x64", True)
        like = jax.ShapeDtypeStruct((A.n,), np.float64)

        def host(v: Any) -> Any:
            rows = np.array(v, dtype=np.float64)
            return A.rows(torch.from_numpy(rows.reshape(-1, A.n))).numpy().reshape(rows.shape)

        def times(v: Any) -> Any:
            return jax.pure_callback(host, like, v, vmap_method="broadcast_all")

        zeros, key = jax.numpy.zeros(A.n), jax.random.PRNGKey(seed)
        if name is None:
            integrand, made = stochtrace.monte_carlo_trace(), stochtrace.estimator_monte_carlo
            sampler = stochtrace.sampler_signs(zeros, num=m)
        else:
            integrand, made = getattr(stochtrace, name)(), stochtrace.estimator_leave_one_out
            count = m if "nys" in name else m // 2
            sampler = stochtrace.sampler_normal(zeros, num=count)
        return float(made(integrand, sampler)(times, key)), None

    return "matfree", estimate


TRACES: dict[str, Estimator] = {
    "lq hutchinson": own("trace", "hutchinson"),
    "lq hutch++": own("trace", "hutch++"),
    "lq xtrace": own("trace", "xtrace"),
    "lq xnystrace": own("trace", "xnystrace"),
    "curvlinops hutchinson": of_curvlinops("hutchinson_trace"),
    "curvlinops hutch++": of_curvlinops("hutchpp_trace"),
    "curvlinops xtrace": of_curvlinops("xtrace"),
    "skerch hutchinson": of_skerch("hutch", "tr"),
    "skerch xtrace": of_skerch("xhutchpp", "tr"),
    "eigenthings hutchinson": of_eigenthings("hutchinson"),
    "eigenthings hutch++": of_eigenthings("hutch++"),
    "matfree hutchinson": of_matfree(None),
    "matfree xtrace": of_matfree("leave_one_out_xtrace"),
    "matfree xnystrace": of_matfree("leave_one_out_xnystrace"),
}
DIAGONALS: dict[str, Estimator] = {
    "lq hutchinson": own("diagonal", "hutchinson"),
    "lq xdiag": own("diagonal", "xdiag"),
    "curvlinops hutchinson": of_curvlinops("hutchinson_diag"),
    "curvlinops xdiag": of_curvlinops("xdiag"),
    "skerch hutchinson": of_skerch("hutch", "diag"),
    "skerch xdiag": of_skerch("xhutchpp", "diag"),
}

# ---- densities: nodes and weights, (vectors, steps), a row of weights with the sum 1

Rule = Callable[[Task, Counted, int, int, int], tuple[Tensor, Tensor]]


def density_of_lq(task: Task, A: Counted, vectors: int, steps: int, seed: int) -> Any:
    """The library's."""
    made = lq.probe.spectral_density(A.ours, vectors=vectors, steps=steps, seed=seed)
    return made.nodes, made.weights / A.n


def density_of_pyhessian(task: Task, A: Counted, vectors: int, steps: int, seed: int) -> Any:
    """PyHessian's."""
    with pyhessian_of(task, A, seed) as whole:
        nodes, weights = whole.density(iter=steps, n_v=vectors)
    return torch.tensor(np.array(nodes)), torch.tensor(np.array(weights))


def density_of_curvlinops(task: Task, A: Counted, vectors: int, steps: int, seed: int) -> Any:
    """The Lanczos runs behind `lanczos_approximate_spectrum`, without its ends by ARPACK."""
    torch.manual_seed(seed)
    run = importlib.import_module("curvlinops.papyan2020traces.spectrum").fast_lanczos
    made = [run(A, steps) for _ in range(vectors)]
    return torch.stack([e for e, _ in made]), torch.stack([v[0] ** 2 for _, v in made])


def density_of_eigenthings(task: Task, A: Counted, vectors: int, steps: int, seed: int) -> Any:
    """hessian-eigenthings'."""
    lib = peer("hessian_eigenthings.algorithms")
    made = lib.spectral_density(
        lambda_operator(A), num_runs=vectors, lanczos_steps=steps, seed=1000 * seed
    )
    return made.raw_eigenvalues, made.raw_weights


DENSITIES: dict[str, tuple[str | None, Rule]] = {
    "lq": (None, density_of_lq),
    "PyHessian": ("pyhessian", density_of_pyhessian),
    "curvlinops": ("curvlinops", density_of_curvlinops),
    "eigenthings": ("hessian_eigenthings", density_of_eigenthings),
}

# ---- log-determinants


def logdet_of_lq(make: Callable[[Any], Any] | None = None, **options: Any) -> Any:
    """The library's, with a preconditioner made of the problem."""

    def estimate(task: Task, A: Counted, vectors: int, seed: int) -> Found:
        if make is not None:
            options["preconditioner"] = make(task.problems["G + damping"])
        made = lq.probe.logdet(A.ours, vectors=vectors, seed=seed, **options)
        assert made.products == A.vectors
        return made.value, made.standard_error

    return estimate


def logdet_of_linear_operator(task: Task, A: Counted, vectors: int, seed: int, **more: Any) -> Any:
    """`inv_quad_logdet` of the very operator; no Cholesky, at its default tolerances."""
    torch.manual_seed(seed)
    with settings.num_trace_samples(vectors), settings.max_cholesky_size(0):
        _, value = A.ours.inv_quad_logdet(logdet=True)
    return value, None


def logdet_of_linear_operator_tight(task: Task, A: Counted, vectors: int, seed: int) -> Any:
    """The same with 300 steps of Lanczos and CG to 1e-6."""
    with (
        settings.max_lanczos_quadrature_iterations(300),
        settings.max_cg_iterations(300),
        settings.cg_tolerance(1e-6),
    ):
        return logdet_of_linear_operator(task, A, vectors, seed)


LOGDETS: dict[str, Callable[[Task, Counted, int, int], Found]] = {
    "lq CG": logdet_of_lq(),
    "lq CG, diagonal": logdet_of_lq(jacobi),
    "lq CG, EKFAC": logdet_of_lq(ekfac),
    "lq Lanczos, 20 steps": logdet_of_lq(method="lanczos", steps=20),
    "lq Lanczos, 50 steps": logdet_of_lq(method="lanczos", steps=50),
    "linear_operator": logdet_of_linear_operator,
    "linear_operator, tight": logdet_of_linear_operator_tight,
}
