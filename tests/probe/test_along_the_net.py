"""Gradient alignment, curvature of activations and sharpness, against dense matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import ZOO
from small_models import mlp
from torch import Tensor

import llqr_mf as lq
from llqr_mf.probe.alignment import gradient_alignment
from llqr_mf.probe.depth import through_depth
from llqr_mf.probe.eigenvalues import eigenvalues
from llqr_mf.probe.sharpness import Sharpness


def zoo_problem(name: str, metric: str = "gauss_newton") -> lq.LQRProblem:
    model, inputs, targets, loss = ZOO[name]()
    return lq.LQRProblem.from_network(
        lq.split(model), inputs, targets, loss=loss, metric=metric, damping=0.1
    )


# ---- alignment


def test_alignment_is_that_of_dense_eigenvectors() -> None:
    problem = zoo_problem("mlp", "newton")
    pairs = eigenvalues(problem, 4, rtol=1e-10)
    found = gradient_alignment(problem.gradient, pairs)
    _, vectors = torch.linalg.eigh(problem.hessian.to_dense())
    g = problem.gradient / problem.gradient.norm()
    expected = (vectors.mT @ g).square().flip(0)[:4]
    torch.testing.assert_close(found.shares, expected, rtol=1e-6, atol=1e-9)
    assert float(found.cumulative[-1]) == pytest.approx(float(expected.sum()), rel=1e-6)
    assert found.uniform == 1 / problem.size
    assert found.to_dict()["norm"] == pytest.approx(float(problem.gradient.norm()))
    assert "share" in str(found)


def test_all_eigenvectors_hold_the_whole_gradient() -> None:
    problem = lq.LQRProblem.from_network(
        lq.split(mlp(2, 3)),
        torch.randn(5, 2).double(),
        torch.randn(5, 3).double(),
        loss="mse",
    )
    found = gradient_alignment(problem.gradient, eigenvalues(problem, problem.size, rtol=1e-10))
    assert float(found.cumulative[-1]) == pytest.approx(1.0, abs=1e-10)


def test_alignment_refuses_what_has_no_direction() -> None:
    problem = zoo_problem("mlp")
    pairs = eigenvalues(problem, 2)
    with pytest.raises(ValueError, match="shape"):
        gradient_alignment(problem.gradient[1:], pairs)
    with pytest.raises(ValueError, match="direction"):
        gradient_alignment(torch.zeros_like(problem.gradient), pairs)


# ---- depth


@pytest.mark.parametrize("name", ["mlp", "resnet_train"])
@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
def test_spectra_through_depth_are_those_of_dense_matrices(name: str, metric: str) -> None:
    problem = zoo_problem(name, metric)
    kinds = ("curvature", "cost") if metric == "newton" else ("curvature", "value", "cost")
    found = through_depth(problem, 3, kinds=kinds, rtol=1e-8)
    assert found.rows[-1].name == "output"
    for row in found.rows:
        t = row.time
        dense = {
            "curvature": problem.state_curvature(t).to_dense(),
            "cost": problem.Q[t].to_dense(),
        }
        if "value" in kinds:
            dense["value"] = problem.value(t).to_dense()
        for kind in kinds:
            exact = torch.linalg.eigvalsh(dense[kind])
            largest = exact.flip(0)[:3]
            # The tail CGs of a value stop at 1e-12; residuals bound the distance.
            allowed = row.residuals[kind] + 1e-9 * exact.abs().max()
            assert bool(((row.values[kind] - largest).abs() <= allowed).all()), (kind, t)
            total = row.traces[kind]
            error = (total.value - exact.sum()).abs()
            assert error <= 5 * total.standard_error + 1e-9 * exact.abs().max(), (kind, t)
    assert "tr curvature" in str(found) and len(found.to_dict()["rows"]) == len(found.rows)


def test_a_chosen_time_and_bad_ones() -> None:
    problem = zoo_problem("mlp")
    (row,) = through_depth(problem, 1, kinds=["curvature"], times=[problem.horizon]).rows
    expected = torch.linalg.eigvalsh(problem.Q[-1].to_dense())[-1]
    assert float(row.values["curvature"][0]) == pytest.approx(float(expected), rel=1e-3)
    with pytest.raises(ValueError, match="times"):
        through_depth(problem, times=[problem.horizon + 1])
    with pytest.raises(ValueError, match="kinds"):
        through_depth(problem, kinds=["slope"])  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["dropout", "layer_and_rms_norm"])
def test_repeated_eigenvalues_through_depth_are_all_found(name: str) -> None:
    # At the default tolerance: a copy that is missed leaves no trace in the residuals.
    for seed in range(8):
        torch.manual_seed(seed)
        problem = zoo_problem(name)
        for row in through_depth(problem, 3, kinds=["curvature"], seed=seed).rows:
            dense = problem.state_curvature(row.time).to_dense()
            largest = torch.linalg.eigvalsh(dense).flip(0)[:3]
            error = (row.values["curvature"] - largest).abs()
            assert float(error.max()) <= 2e-3 * float(largest[0]), row.time


@pytest.mark.filterwarnings("ignore:.*eigenpairs have not converged:RuntimeWarning")
def test_values_without_damping() -> None:
    # More weights than outputs undo any change; the output itself no weight does.
    found = through_depth(zoo_problem("mlp").with_damping(0.0), 2, kinds=["value", "curvature"])
    *hidden, output = found.rows
    for row in hidden:
        assert float(row.values["value"].abs().max()) <= 1e-10
    assert torch.equal(output.values["value"], output.values["curvature"])
    # A linear head alone, on more samples than weights: some changes cannot be undone.
    x, y = torch.randn(30, 2).double(), torch.randn(30, 1).double()
    net = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(2, 1)).double()
    problem = lq.LQRProblem.from_network(lq.split(net), x, y, loss="mse", damping=0.0)
    (row,) = through_depth(problem, 2, kinds=["value"], times=[1]).rows
    C = problem.state_curvature(1).to_dense()
    J = problem.output_jacobian.to_dense()
    A, Q = problem.A[1].to_dense(), problem.Q[2].to_dense()
    rest = torch.eye(30, dtype=torch.float64) - J @ torch.linalg.pinv(J)
    exact = torch.linalg.eigvalsh(A.mT @ rest @ Q @ rest @ A)
    assert float(exact[-1]) > 0.01 * float(torch.linalg.eigvalsh(C)[-1])
    allowed = row.residuals["value"] + 1e-9
    assert bool(((row.values["value"] - exact.flip(0)[:2]).abs() <= allowed).all())


def test_residuals_through_depth_are_printed() -> None:
    found = through_depth(zoo_problem("mlp"), 2, rtol=0.3, times=[0], kinds=["curvature"])
    residual = float(found.rows[0].residuals["curvature"][0])
    head, line = str(found).splitlines()
    assert "residual" in head and f"{residual:.1g}" in line


def test_depth_wants_the_problem_of_one_batch() -> None:
    x, y = torch.randn(12, 4).double(), torch.randn(12, 2).double()
    chunks = lq.StreamedProblem.chunks(x, y, 5)
    streamed = lq.StreamedProblem(lq.split(mlp(4, 8, 2)), chunks, loss="mse")
    with pytest.raises(TypeError, match=r"StreamedProblem.*LQRProblem\.from_network"):
        through_depth(streamed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k is 0"):
        through_depth(zoo_problem("mlp"), 0)


# ---- sharpness


def descend(model: torch.nn.Module, x: Tensor, y: Tensor, rate: float) -> None:
    loss = F.mse_loss(model(x), y)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.sub_(rate * g)


def run(rate: float, steps: int, every: int) -> Sharpness:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 4, generator=generator).double()
    y = torch.randn(20, 2, generator=generator).double()
    model = mlp(4, 8, 2)
    watch = Sharpness(model, x, y, loss="mse", every=every, k=2, rtol=1e-6)
    for step in range(steps):
        point = watch(step)
        assert (point is None) == (step % every > 0)
        if point is not None:
            before = [p.clone() for p in model.parameters()]
            dense = lq.LQRProblem.from_network(
                lq.split(model), x, y, loss="mse", metric="newton", damping=0.0
            ).hessian.to_dense()
            largest = torch.linalg.eigvalsh(dense).flip(0)[:2]
            torch.testing.assert_close(
                torch.tensor(point.values, dtype=torch.float64), largest, rtol=1e-5, atol=0
            )
            assert point.loss == pytest.approx(float(F.mse_loss(model(x), y).detach()))
            assert all(p.grad is None for p in model.parameters())
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        descend(model, x, y, rate)
    return watch


def test_sharpness_is_that_of_the_dense_hessian_along_a_run() -> None:
    watch = run(rate=0.2, steps=31, every=10)
    assert [point.step for point in watch.history] == [0, 10, 20, 30]
    assert watch.to_dict()[0]["step"] == 0


def test_a_measurement_starts_from_the_last() -> None:
    watch = run(rate=1e-4, steps=3, every=1)
    first, *later = [point.products for point in watch.history]
    assert all(products < first for products in later)


def test_sharpness_of_a_stream_is_that_of_the_whole() -> None:
    x, y = torch.randn(12, 4).double(), torch.randn(12, 2).double()
    model = mlp(4, 8, 2)
    whole = Sharpness(model, x, y, loss="mse", rtol=1e-8).measure(0)
    chunks = lq.StreamedProblem.chunks(x, y, 5)
    parts = Sharpness(model, loss="mse", rtol=1e-8, batches=chunks).measure(0)
    assert parts.sharpness == pytest.approx(whole.sharpness, rel=1e-6)
    assert parts.loss == pytest.approx(whole.loss)


def test_sharpness_wants_data_and_a_stride() -> None:
    model = mlp(4, 8, 2)
    with pytest.raises(ValueError, match="batches"):
        Sharpness(model, loss="mse")
    x, y = torch.ones(2, 4), torch.ones(2, 2)
    for given in (
        {"inputs": x, "batches": [(x, y)]},
        {"targets": y, "batches": [(x, y)]},
        {"inputs": x, "targets": y, "batches": [(x, y)]},
        {"inputs": x},
        {"targets": y},
    ):
        with pytest.raises(ValueError, match=f"there is {' and '.join(given)}: give either"):
            Sharpness(model, loss="mse", **given)
    with pytest.raises(ValueError, match="every"):
        Sharpness(model, torch.ones(2, 4), torch.ones(2, 2), loss="mse", every=0)
