"""What `fit` promises around its solvers: acceptance, failures, costs, precisions, words."""

from __future__ import annotations

import json
import math

import pytest
import torch
from fitting.dense_fit import LAYERS, objective, problem, rows_of
from llqr_mf.operators import System
from small_models import (
    NETWORKS,
    assert_unchanged,
    mlp,
    network,
    normal,
    relative,
    state_of,
)

import llqr_mf as lq
from llqr_mf.fitting import fit
from llqr_mf.fitting.authors_ekronecker import AuthorsEKronecker
from llqr_mf.preconditioners import Diagonal, EKronecker, Kronecker, Scalar

METHODS = ["cg", "momentum"]


def values_of(M) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in M.tensors.items()}


def same(M, before) -> bool:
    return all(torch.equal(M.tensors[name], before[name]) for name in before)


# ---- acceptance


def test_a_new_m_is_kept_only_if_the_held_out_objective_falls() -> None:
    fitted, other = problem(0), problem(1)
    M = Diagonal(fitted)
    M.scale_(10.0)
    accepted = fit(M, fitted, held_out=other, max_iterations=3)
    assert accepted.accepted and "fell" in accepted.reason
    assert accepted.held_out < accepted.held_out_before
    assert accepted.held_out == pytest.approx(float(other.objective(-(M @ other.gradient))))

    fit(M, other, max_iterations=500)  # nothing is better on `other` than this
    before = values_of(M)
    refused = fit(M, [fitted, other], max_iterations=500)
    assert not refused.accepted and "did not fall" in refused.reason
    assert refused.held_out > refused.held_out_before
    assert refused.fit_objective < refused.fit_objective_before
    assert same(M, before) and refused.preconditioner is M


@pytest.mark.parametrize("method", METHODS)
def test_momentum_and_cg_refuse_alike(method) -> None:
    fitted, other = problem(0), problem(1)
    M = Kronecker(fitted)
    fit(M, other, max_iterations=500, sweeps=20)
    before = values_of(M)
    # Its objective at its own gradient is nearly the optimum, and no M is at two.
    report = fit(M, fitted, held_out=other, method=method)
    assert not report.accepted and same(M, before)


def test_the_last_of_several_is_held_out() -> None:
    problems = [problem(seed) for seed in range(3)]
    report = fit(Diagonal(problems[0]), problems, exact=False)
    given = fit(Diagonal(problems[0]), problems[:2], held_out=problems[2:], exact=False)
    alone = fit(Diagonal(problems[0]), problems, held_out=[], exact=False)
    assert report.to_dict() == given.to_dict()
    assert report.held_out is not None and alone.held_out is None
    assert alone.held_out_fraction is None and alone.accepted


# ---- the report


def test_the_numbers_of_the_report() -> None:
    fitting, held = [problem(0), problem(1)], [problem(2), problem(3)]
    M = Diagonal(fitting[0])
    report = fit(M, fitting, held_out=held)

    def check(problems, after, before, optimum, fraction, cosine):
        values, best, cosines = [], [], []
        for each in problems:
            g, H = each.gradient, each.hessian.to_dense()
            u, step = -(M @ g), -torch.linalg.solve(H, g)
            values.append(float(each.objective(u)))
            best.append(float(each.objective(step)))
            cosines.append(float(u @ step / (u.norm() * step.norm())))
        start = [float(each.objective(-each.gradient)) for each in problems]
        # The exact steps are good to a relative residual of 1e-6.
        assert after == pytest.approx(sum(values) / 2, rel=1e-10)
        assert before == pytest.approx(sum(start) / 2, rel=1e-10)
        assert optimum == pytest.approx(sum(best) / 2, rel=1e-5)
        assert fraction == pytest.approx(sum(values) / sum(best), rel=1e-5)
        assert cosine == pytest.approx(sum(cosines) / 2, rel=1e-5)

    names = ("before", "optimum", "fraction", "cosine")
    check(
        fitting,
        report.objective,
        report.objective_before,
        report.optimum,
        *(getattr(report, name) for name in names[2:]),
    )
    check(held, report.held_out, *(getattr(report, f"held_out_{name}") for name in names))


def test_it_reads_well_and_goes_into_json() -> None:
    report = fit(Diagonal(problem(0)), [problem(0), problem(1)])
    text = str(report)
    for word in ("Diagonal by cg", "held out", "fraction", "products"):
        assert word in text
    assert json.loads(json.dumps(report.to_dict()))["method"] == "cg"
    with pytest.raises(AttributeError):
        report.accepted = False
    assert "-" in str(fit(Diagonal(problem(0)), problem(0), exact=False))


@pytest.mark.parametrize(
    "make, options",
    [
        (Diagonal, {}),
        (Diagonal, {"count": 3, "isotropic": 0.5}),
        (Kronecker, {"sweeps": 2, "max_iterations": 4}),
        (Kronecker, {"method": "momentum"}),
        (Diagonal, {"method": "momentum", "steps": 7}),
    ],
)
def test_products_are_counted_exactly(monkeypatch, make, options) -> None:
    problems = [problem(0), problem(1), problem(2)]
    for each in problems:
        each.gradient  # noqa: B018
    seen = []
    product = System.condensed_product

    def counted(self, v, *args, **kwargs):
        seen.append(len(v))
        return product(self, v, *args, **kwargs)

    monkeypatch.setattr(System, "condensed_product", counted)
    report = fit(make(problems[0]), problems, exact=False, **options)
    assert report.products + report.measuring_products == sum(seen)
    assert report.measuring_products == 2 * 3
    if "method" in options:
        assert report.products == options.get("steps", 50) + 1 == report.iterations + 1
    if options == {}:
        # 8 probes in all on two problems, one product to start with.
        assert report.products == 8 * (report.iterations + 1)


# ---- failures


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("broken_at", [1, 4, 1000])
def test_a_product_that_is_not_finite_changes_nothing(monkeypatch, method, broken_at) -> None:
    problems = [problem(0), problem(1)]
    M = Kronecker(problems[0])
    before = values_of(M)
    calls = []
    product = System.condensed_product

    def failing(self, v, *args, **kwargs):
        calls.append(1)
        out = product(self, v, *args, **kwargs)
        return out.fill_(math.nan) if len(calls) >= broken_at else out

    monkeypatch.setattr(System, "condensed_product", failing)
    report = fit(M, problems, held_out=[], method=method, exact=False)
    if broken_at == 1000:
        assert report.accepted
        return
    assert not report.accepted and "NaN" in report.reason
    assert same(M, before)
    str(report)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_probe_that_is_not_finite_changes_nothing(value) -> None:
    one = problem(0)
    M = Diagonal(one)
    before = values_of(M)
    probes = normal(3, 31, seed=1)
    probes[1, 4] = value
    report = fit(M, one, probes=probes)
    assert not report.accepted and "NaN" in report.reason and same(M, before)
    assert report.products == 0 and report.objective == report.objective_before


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_not_finite_changes_nothing(method) -> None:
    broken = problem(1)
    broken.__dict__["gradient"] = torch.full((31,), math.nan, dtype=torch.float64)
    M = Diagonal(broken)
    before = values_of(M)
    report = fit(M, broken, method=method)
    assert not report.accepted and same(M, before) and report.optimum is None
    # As a held-out problem too.
    report = fit(M, problem(0), held_out=broken, method=method)
    assert not report.accepted and same(M, before) and report.held_out_fraction is None


def test_zero_gradients_change_nothing() -> None:
    one = problem(0)
    M = Diagonal(one)
    report = fit(M, one, probes=torch.zeros(2, 31, dtype=torch.float64))
    assert not report.accepted and "zero" in report.reason


def test_a_diverging_recipe_changes_nothing() -> None:
    one = problem(0)
    M = AuthorsEKronecker(one)
    before = values_of(M)
    report = fit(M, one, method="momentum", learning_rate=1e6, clip=1e30, ema=0.0)
    assert not report.accepted and same(M, before)


def test_an_error_half_way_restores_m(monkeypatch) -> None:
    one = problem(0)
    M = Diagonal(one)
    before = values_of(M)
    with pytest.raises(RuntimeError, match="measure"):
        monkeypatch.setattr(
            "llqr_mf.fitting.measure.solve",
            lambda *_, **__: (_ for _ in ()).throw(RuntimeError("measure")),
        )
        fit(M, one)
    assert same(M, before)


def test_indefinite_curvature_is_said() -> None:
    H = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    g = torch.ones(3, dtype=torch.float64)
    one = lq.LQRProblem(
        A=[torch.eye(2, dtype=H.dtype)],
        B=[torch.zeros(2, 3, dtype=H.dtype)],
        R=[H],
        r=[g],
    )
    M = Diagonal(one)
    report = fit(M, one)
    assert "positive curvature" in report.reason
    assert bool(torch.isfinite(M.flat()).all()) and float(M.flat().min()) > 0


# ---- precisions, kinds of problems, what stays as it is


@pytest.mark.parametrize("make", [Diagonal, Kronecker, EKronecker, Scalar])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_problems(make, dtype) -> None:
    values = []
    for kind in (torch.float64, dtype):
        layers = lq.split(mlp(3, 4, 3, dtype=kind))
        x, y = normal(24, 3, seed=2, dtype=kind), torch.arange(24) % 3
        one = lq.LQRProblem.from_network(layers, x, y, loss="cross_entropy", damping=0.1)
        M = make(one)
        report = fit(M, one)
        assert report.accepted
        assert all(t.dtype == torch.promote_types(kind, torch.float32) for t in M.tensors.values())
        values.append(report.objective)
    # Relative rounding of gradients and products, times a few sums.
    assert values[1] == pytest.approx(values[0], rel=1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_network(name) -> None:
    model, inputs, targets = network(name)
    before = state_of(model)
    layers = lq.split(model)
    one = lq.LQRProblem.from_network(layers, inputs, targets, loss="cross_entropy", damping=0.1)
    for make in (Kronecker, EKronecker):
        M = make(model)
        report = fit(M, one, count=2)
        assert report.accepted and report.fit_objective < report.fit_objective_before
        value = objective(M, [one], rows_of([one], count=2))
        assert report.fit_objective == pytest.approx(value, rel=1e-9)
    assert_unchanged(model, before)


def test_the_scale_of_gradients_does_not_matter_in_float32() -> None:
    one = problem(0)
    layers = lq.split(mlp(3, 4, 3, dtype=torch.float32))
    x, y = normal(6, 3, dtype=torch.float32), torch.arange(6) * 2 % 3
    narrow = lq.LQRProblem.from_network(layers, x, y, loss="cross_entropy", damping=0.1)
    made = []
    for scale in (1.0, 1e-25):  # its square is zero in float32
        M = Diagonal(narrow)
        fit(M, narrow, probes=narrow.gradient.unsqueeze(0) * scale, exact=False)
        made.append(M.flat().double())
    assert relative(made[1], made[0]) < 1e-4
    wide = Diagonal(one)
    fit(wide, one, probes=one.gradient.unsqueeze(0), exact=False)
    assert relative(made[0], wide.flat()) < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_streamed_problem_is_the_whole_batch(method) -> None:
    x, y = normal(12, 3, seed=4), torch.arange(12) % 3
    options = {"loss": "cross_entropy", "damping": 0.1}
    whole = lq.LQRProblem.from_network(LAYERS, x, y, **options)
    chunks = lq.StreamedProblem.chunks(x, y, 6)
    streamed = lq.StreamedProblem(LAYERS, chunks, **options)
    made = []
    for one in (whole, streamed):
        M = Kronecker(one)
        # A few steps: later, rounding decides which eigenvalues are at their bounds first.
        options = {"count": 1, "sweeps": 1, "max_iterations": 4} if method == "cg" else {}
        fit(M, one, method=method, **options)
        made.append(M.to_dense())
    assert relative(made[1], made[0]) < 1e-8


def test_the_model_and_the_random_state_stay_as_they_are() -> None:
    model = mlp(3, 4, 3)
    layers = lq.split(model)
    problems = [
        lq.LQRProblem.from_network(
            layers, normal(6, 3, seed=s), torch.arange(6) % 3, loss="cross_entropy"
        )
        for s in range(2)
    ]
    before = state_of(model)
    for method in METHODS:
        M = Kronecker(model)
        fit(M, problems, method=method)
        assert not any(t.requires_grad for t in M.tensors.values())
    fit(Diagonal(model), problems, probes="curvature", isotropic=0.2)
    assert_unchanged(model, before)


def test_a_generator_decides_random_probes() -> None:
    made = []
    for seed in (0, 0, 1):
        M = Diagonal(problem(0))
        generator = torch.Generator().manual_seed(seed)
        fit(M, problem(0), probes="curvature", generator=generator, exact=False)
        made.append(M.flat())
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    M = Diagonal(problem(0))
    fit(M, problem(0), probes="curvature", exact=False)
    assert torch.equal(M.flat(), made[0])


def test_the_weights_of_probes() -> None:
    problems = [problem(0), problem(1)]
    plain = rows_of(problems, count=3)
    mixed = rows_of(problems, count=3, isotropic=0.25)
    for b, each in enumerate(problems):
        # Micro-batch gradients, of weight 1/2 1/3.
        assert relative(plain[b].mean(0) * 6**0.5, each.gradient) < 1e-12
        assert mixed[b].shape == (6, 31)
        assert relative(mixed[b][:3], plain[b] * 0.75**0.5) < 1e-12
        share = mixed[b][3:].square().sum() / plain[b].square().sum()
        # 3 times 31 squared normal numbers around their mean: sqrt(2 / 93) = 0.15.
        assert float(share) == pytest.approx(0.25, rel=0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"method": "momentum"}, {"probes": "curvature"}])
def test_a_device(options) -> None:
    made = []
    for device in ("cpu", "cuda"):
        layers = lq.split(mlp(3, 4, 3).to(device))
        x, y = normal(12, 3).to(device), (torch.arange(12) % 3).to(device)
        one = lq.LQRProblem.from_network(layers, x, y, loss="cross_entropy", damping=0.1)
        M = EKronecker(one)
        report = fit(M, one, **options)
        assert report.accepted and M.device.type == device
        made.append(report.fit_objective)
    if "probes" not in options:  # a device has its own random numbers
        assert made[1] == pytest.approx(made[0], rel=1e-9)
