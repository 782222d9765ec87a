"""Each fit by conjugate gradients is the dense solution of the same objective."""

from __future__ import annotations

import pytest
import torch
from fitting.dense_fit import (
    least_squares_above,
    normal_equations,
    objective,
    problem,
    rows_of,
)
from small_models import mlp, normal, relative

import llqr_mf as lq
from llqr_mf.fitting import fit
from llqr_mf.preconditioners import Diagonal, DirectSum, EKronecker, Kronecker, LowRank, Scalar, Sum
from llqr_mf.preconditioners.baselines import ekfac, jacobi, kfac
from llqr_mf.preconditioners.probes import curvature_probes

EXACT = {"max_iterations": 3000, "rtol": 1e-11, "exact": False}
"""The solves stop at 1e-11 of the right side, and H has a condition number below 1e3: 1e-8."""

# The bound keeps M off zero by 1e-9 of its mean, which moves a solution by as little.
NO_FLOOR = {"floor": 1e-9, **EXACT}


def rotated(like: lq.LQRProblem) -> EKronecker:
    M = EKronecker(like)
    bases = {
        site.name: [torch.linalg.qr(normal(n, n, seed=n))[0] for n in site.sides]
        for site in M.sites
        if len(site.sides) == 2
    }
    M.set_bases(bases)
    return M


MAKERS = {"diagonal": Diagonal, "ekronecker": rotated, "scalar": Scalar}

PROBES = {
    "one gradient": (1, {}),
    "gradients of three batches": (3, {"count": 4}),
    "with isotropic ones": (2, {"count": 3, "isotropic": 0.3}),
    "curvature": (2, {"probes": "curvature", "count": 20}),
}


@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("maker", MAKERS)
def test_positive_coordinates_with_their_bounds(maker, probes) -> None:
    batches, options = PROBES[probes]
    problems = [problem(seed, damping=0.01) for seed in range(batches)]
    M = MAKERS[maker](problems[0])
    report = fit(M, problems, held_out=[], **options, **NO_FLOOR)
    (chart,) = M.charts()
    rows = rows_of(problems, **options)
    wanted = least_squares_above(*normal_equations(chart, problems, rows), 0.0)
    assert relative(chart.get(), wanted) < 1e-6
    assert report.fit_objective == pytest.approx(objective(M, problems, rows), rel=1e-9)
    assert maker == "scalar" or bool((wanted == 0).any())  # the bounds matter


def test_the_diagonal_solves_the_hadamard_equations() -> None:
    # design.md 2.6: (H o C) d = diag(C).
    problems = [problem(0), problem(1)]
    probes = normal(60, 31, seed=3)
    M = Diagonal(problems[0])
    fit(M, problems, held_out=[], probes=probes, **EXACT)
    C = probes.mT @ probes / 60
    H = sum(each.hessian.to_dense() for each in problems) / 2
    wanted = torch.linalg.solve(H * C, C.diagonal())
    assert float(wanted.min()) > 0
    assert relative(M.flat(), wanted) < 1e-8


def test_isotropic_probes_give_jacobi() -> None:
    # design.md 2.6: C = I.
    one = problem(0)
    M = Diagonal(one)
    fit(M, one, probes=31**0.5 * torch.eye(31, dtype=torch.float64), **EXACT)
    assert relative(M.flat(), 1 / one.hessian.to_dense().diagonal()) < 1e-8


def test_one_probe_reproduces_its_exact_step() -> None:
    # design.md 2.6, where all of d = u / -g is positive: H^-1 of a graph's Laplacian is.
    weights = normal(12, 12, seed=4).abs()
    H = (weights + weights.mT).neg().fill_diagonal_(0)
    H -= H.sum(1).diag() - 0.1 * torch.eye(12, dtype=H.dtype)
    g = normal(12, seed=5).abs()
    A, B = torch.eye(2, dtype=H.dtype), torch.zeros(2, 12, dtype=H.dtype)
    one = lq.LQRProblem(A=[A], B=[B], R=[H], r=[g])
    M = Diagonal(one)
    report = fit(M, one, **{**EXACT, "exact": True})
    assert relative(M.flat(), torch.linalg.solve(H, g) / g) < 1e-8
    assert report.fraction == pytest.approx(1, abs=1e-9)
    assert report.cosine == pytest.approx(1, abs=1e-9)


def test_one_probe_kronecker_reproduces_a_rank_one_step() -> None:
    # One sample and one weight: g = d x', and u = -a x' with a = (|x|^2 Q + damping)^-1 d.
    layers = lq.split(torch.nn.Linear(4, 3, bias=False).double())
    x, y = normal(1, 4, seed=1), torch.tensor([2])
    one = lq.LQRProblem.from_network(layers, x, y, loss="cross_entropy", damping=0.1)
    M = Kronecker(one)
    report = fit(M, one, count=1, **{**EXACT, "exact": True})
    assert report.fraction == pytest.approx(1, abs=1e-9)
    assert relative(-(M @ one.gradient), lq.solve(one, rtol=1e-13).step) < 1e-6


@pytest.mark.parametrize("count, damping", [(40, 0.5), (5, 0.02)])
@pytest.mark.parametrize("side", [0, 1])
def test_a_kronecker_factor_alone(side, count, damping) -> None:
    class OneSide(Kronecker):
        def charts(self):
            return super().charts()[side : side + 1]

    problems = [problem(0, damping=damping), problem(1, damping=damping)]
    M = OneSide(problems[0], biases="diagonal")
    probes = normal(count, 31, seed=5)
    (chart,) = M.charts()
    fit(M, problems, held_out=[], probes=probes, **NO_FLOOR)
    phi = chart.get()
    rows = rows_of(problems, probes)
    A, b = normal_equations(chart, problems, rows)
    slope = A @ phi - b
    scale = float(b.norm())
    if count == 40:  # the free solution is positive definite
        assert float(slope.norm()) < 1e-8 * scale
    # Else it is the least of all definite ones (Karush, Kuhn, Tucker): the slope has no negative
    # eigenvalue, and no product with phi.
    assert abs(float(slope @ phi)) < 1e-8 * scale * float(phi.norm())
    factors, slopes = _matrices(M, side, phi), _matrices(M, side, slope)
    least = [float(torch.linalg.eigvalsh(F).min()) for F in factors]
    assert min(least) > 0 and (count == 40) == (min(least) > 1e-6)
    assert min(float(torch.linalg.eigvalsh(Z).min()) for Z in slopes) > -1e-8 * scale


def _matrices(M: Kronecker, side: int, phi: torch.Tensor) -> list[torch.Tensor]:
    """The parts of a chart's coordinates as matrices."""
    factors = [M.factors(site)[side] for site in M.sites if side < len(site.sides)]
    parts = phi.split([f.numel() for f in factors])
    shaped = [p.reshape(f.shape) for p, f in zip(parts, factors, strict=True)]
    return [(x + x.mT) / 2 if x.ndim == 2 else x.diag() for x in shaped]


def test_sweeps_never_raise_the_objective() -> None:
    problems = [problem(0), problem(1)]
    rows = rows_of(problems, count=3)
    values = []
    for sweeps in (1, 2, 4, 8):
        M = Kronecker(problems[0])
        options = {"count": 3, "sweeps": sweeps, "max_iterations": 30, "exact": False}
        report = fit(M, problems, held_out=[], **options)
        values.append(report.fit_objective)
        assert report.fit_objective == pytest.approx(objective(M, problems, rows), rel=1e-9)
        assert float(torch.linalg.eigvalsh(M.to_dense()).min()) > 0
    assert values == sorted(values, reverse=True) and values[-1] < values[0]


def composite(like: lq.LQRProblem) -> DirectSum:
    blueprint = Diagonal(like).blueprint
    names = blueprint.layout.names
    parts = [Kronecker(blueprint.restricted(names[:2])), Diagonal(blueprint.restricted(names[2:]))]
    return DirectSum(like, parts)


def low_rank(like: lq.LQRProblem) -> LowRank:
    M = LowRank(like, rank=3)
    M.set_basis(normal(3, 31, seed=2))
    return M


OTHERS = {
    "direct sum": composite,
    "sum": lambda like: Sum([Diagonal(like), rotated(like)]),
    "low rank": low_rank,
}


@pytest.mark.parametrize("maker", OTHERS)
def test_other_structures_fall_and_say_so(maker) -> None:
    problems = [problem(0), problem(1)]
    M = OTHERS[maker](problems[0])
    report = fit(M, problems, held_out=[], exact=False)
    assert report.accepted and report.fit_objective < report.fit_objective_before
    value = objective(M, problems, rows_of(problems))
    assert report.fit_objective == pytest.approx(value, rel=1e-9)
    assert float(torch.linalg.eigvalsh(M.to_dense()).min()) > 0


def test_the_anchor_is_what_it_is_said_to_be() -> None:
    problems = [problem(0), problem(1)]
    anchor, rows = 0.3, rows_of(problems, count=3)
    M = Diagonal(problems[0])
    M.tensors["0.weight.diagonal"] *= 2
    old = M.flat()
    report = fit(M, problems, held_out=[], count=3, anchor=anchor, **NO_FLOOR)
    assert report.fit_objective == pytest.approx(objective(M, problems, rows), rel=1e-9)
    (chart,) = M.charts()
    A, b = normal_equations(chart, problems, rows)
    # M_0 is the old M at its best multiple; P = 31 and the rows' weights sum to one.
    start = old * float(old @ b) / float(old @ A @ old)
    squared = sum(float((v * start).square().sum()) for v in rows)
    c = sum(float(v.square().sum()) for v in rows) / 31 * float(start @ A @ start) / squared
    eye = torch.eye(31, dtype=torch.float64)
    wanted = least_squares_above(A + anchor * c * eye, b + anchor * c * start, 0.0)
    assert relative(M.flat(), wanted) < 1e-6


def test_the_anchor_holds_a_kronecker_product() -> None:
    one = problem(0)
    distances = []
    for anchor in (0.0, 1.0, 100.0, 1e6):
        M = Kronecker(one)
        fit(M, one, anchor=anchor, max_iterations=100, exact=False)
        dense = M.to_dense()
        c = float(dense.diagonal().mean())
        distances.append(float((dense / c - torch.eye(31, dtype=torch.float64)).norm()))
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-4


def test_the_multiple_makes_the_scale_of_the_start_immaterial() -> None:
    problems = [problem(0), problem(1)]
    made = []
    for scale in (1.0, 1e6, 1e-7):
        M = rotated(problems[0])
        M.scale_(scale)
        fit(M, problems, held_out=[], max_iterations=5, exact=False)
        made.append(M.to_dense())
    for other in made[1:]:
        assert relative(other, made[0]) < 1e-9


BASELINES = {
    "diagonal": (jacobi, Diagonal),
    "kronecker": (kfac, Kronecker),
    "ekronecker": (ekfac, ekfac),
}


@pytest.mark.parametrize("structure", BASELINES)
def test_probes_across_layers_beat_the_closed_forms_on_fresh_ones(structure) -> None:
    """Where layers are strongly coupled: Jacobi, K-FAC and EKFAC, each by a fit of its own kind."""
    layers = lq.split(mlp(4, 6, 6, 6, 3, seed=2))
    x, y = normal(40, 4, seed=1), torch.arange(40) % 3
    one = lq.LQRProblem.from_network(layers, x, y, loss="cross_entropy", damping=1e-2)
    H = one.hessian.to_dense()
    blocks = torch.block_diag(*[torch.ones(n, n, dtype=H.dtype) for n in one.layout.sizes])
    assert float((H * (1 - blocks)).norm() / (H * blocks).norm()) > 0.5
    v = curvature_probes(one, 2000, torch.Generator().manual_seed(7))
    C = v.mT @ v / len(v)

    def value(M: torch.Tensor) -> float:
        return float((M @ H @ M @ C).trace() / 2 - (M @ C).trace())

    baseline, start = BASELINES[structure]
    D = baseline(one).to_dense()
    M = start(one)
    fit(M, one, probes="curvature", count=40, max_iterations=40, exact=False)
    # Beside the baseline at its best multiple; measured 1.71, 1.31 and 1.11 times.
    c = float((D @ C).trace() / (D @ H @ D @ C).trace())
    assert value(M.to_dense()) < 1.08 * value(c * D) < 0
    if structure == "diagonal":
        # What layers have to do with each other is what helps: without it the fit is worse.
        d = torch.linalg.solve(H * blocks * C, C.diagonal()).clamp(min=0)
        c = float((d.diag() @ C).trace() / (d.diag() @ H @ d.diag() @ C).trace())
        assert value(M.to_dense()) < 1.08 * value(c * d.diag())
