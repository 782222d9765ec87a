"""Losses that are functions: Gauss-Newton with a factor, wherever one is needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import dense_jacobian
from small_models import F64, mlp, normal
from torch import Tensor, nn
from torch.nn import functional as F

import llqr_mf as lq
from llqr_mf.metrics import Divergence
from llqr_mf.preconditioners.subsampled import SubsampledDual

N, WIDTH = 7, 4
X, Y = normal(N, 4, seed=1), normal(N, WIDTH, seed=2)


def vae(outputs: Tensor, targets: Tensor) -> Tensor:
    """Means and log-variances: not convex."""
    mean, log_variance = outputs.chunk(2, 1)
    square = (targets[:, :2] - mean).square() * (-log_variance).exp()
    return (log_variance + square).sum(1).mean() / 2


def charbonnier(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets).square() + 1e-3).sqrt().mean()


def distance(outputs: Tensor, targets: Tensor) -> Tensor:
    """Couples the outputs of a sample."""
    return (outputs - targets).norm(dim=1).mean()


def paired(outputs: Tensor, targets: Tensor) -> Tensor:
    """Couples samples two places apart."""
    r = outputs - targets
    return (4 * r.square() + r * r.roll(2, 0)).mean()


FUNCTIONS: dict[str, Any] = {
    "huber": nn.HuberLoss(delta=0.5),
    "smooth": nn.SmoothL1Loss(),
    "poisson": nn.PoissonNLLLoss(),
    "charbonnier": charbonnier,
    "distance": distance,
    "vae": vae,
}


def quiet(loss: Any, y: Tensor = Y, metric: Any = "gauss_newton", **options: Any) -> lq.LQRProblem:
    layers = lq.split(mlp(4, 5, WIDTH, dtype=y.dtype))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is indefinite.*")
        return lq.LQRProblem.from_network(
            layers, X.to(y.dtype), y, loss=loss, metric=metric, **{"damping": 0.1, **options}
        )


def positive(Q: Tensor) -> Tensor:
    """The positive part of every sample's block."""
    parts = []
    for n in range(N):
        s = slice(n * WIDTH, (n + 1) * WIDTH)
        eigenvalues, vectors = torch.linalg.eigh(Q[s, s])
        parts.append((vectors * eigenvalues.clamp(min=0)) @ vectors.mT)
    return torch.block_diag(*parts)


def clipped(problem: lq.LQRProblem, loss: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Tensor:
    """J' Q+ J + R with the positive part of every sample's block, by autograd and eigh."""
    J = dense_jacobian(problem.origin.layers[0].program.model, X)
    f = problem.origin.outputs
    Q = torch.func.hessian(lambda v: loss(v.reshape(f.shape), y))(f.flatten())
    return J.mT @ positive(Q) @ J + 0.1 * torch.eye(J.shape[1], dtype=F64)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_steps_are_exact_by_every_method(name: str) -> None:
    loss, y = FUNCTIONS[name], Y.abs()
    problem = quiet(loss, y)
    H = clipped(problem, loss, y)
    # Double backward, an eigendecomposition and sums of 28 terms, in float64.
    torch.testing.assert_close(problem.hessian.to_dense(), H, rtol=1e-10, atol=1e-12)
    step = -torch.linalg.solve(H, problem.gradient)
    for method in ("auto", "dual", "low_rank", "cg"):
        options = {"rtol": 1e-12} if method == "cg" else {}
        solution = lq.solve(problem, method, **options)
        assert solution.status.ok
        # The condition number is about 100.
        torch.testing.assert_close(solution.step, step, rtol=1e-8, atol=1e-10)


def test_a_function_that_is_not_convex_is_clipped_with_a_word_and_newton_keeps_it() -> None:
    layers = lq.split(mlp(4, 5, WIDTH))
    options = {"loss": vae, "damping": 0.0}
    with pytest.warns(UserWarning, match=r"vae.* is indefinite.*Gauss-Newton takes its positive"):
        lq.LQRProblem.from_network(layers, X, Y, **options)
    newton = lq.LQRProblem.from_network(layers, X, Y, metric="newton", **options)
    f = newton.origin.outputs
    Q = torch.func.hessian(lambda v: vae(v.reshape(f.shape), Y))(f.flatten())
    torch.testing.assert_close(newton.Q[-1].to_dense(), Q, rtol=1e-12, atol=1e-14)


def test_what_couples_samples_keeps_its_hessian_and_says_so() -> None:
    problem = quiet(paired)
    f = problem.origin.outputs
    Q = torch.func.hessian(lambda v: paired(v.reshape(f.shape), Y))(f.flatten())
    torch.testing.assert_close(problem.Q[-1].to_dense(), Q, rtol=1e-12, atol=1e-14)
    assert lq.solve(problem).status.ok
    with pytest.raises(ValueError, match=r"paired.*couples samples"):
        lq.gaussian_process.Laplace(problem, prior_precision=1.0)


def dense_of(problem: lq.LQRProblem) -> Tensor:
    return problem.hessian.to_dense()


USES: dict[str, Callable[[lq.LQRProblem], Any]] = {
    "fit": lambda p: lq.fit(lq.Diagonal(p), p),
    "probes": lambda p: lq.fit(lq.Diagonal(p), p, probes="curvature"),
    "sub-sample": lambda p: SubsampledDual(p).to_dense(),
    "map": lq.probe.cross_layer,
    "posterior": lambda p: lq.gaussian_process.Laplace(p, prior_precision=1.0).predict(X),
    "evidence": lq.gaussian_process.choose_prior,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ["huber", "vae"])
def test_what_needs_a_factor_takes_it(name: str, use: str) -> None:
    USES[use](quiet(FUNCTIONS[name]))


def test_a_posterior_takes_a_mean_of_negative_log_likelihoods() -> None:
    problem = quiet(distance)
    laplace = lq.gaussian_process.Laplace(problem, prior_precision=0.1 * N)
    H, J = clipped(problem, distance, Y), problem.output_jacobian.to_dense()
    expected = J @ torch.linalg.solve(N * H, J.mT)
    # By the dual: I + G has a condition number of about 1e3.
    torch.testing.assert_close(
        laplace.predict(X).covariance_matrix, expected, rtol=1e-8, atol=1e-10
    )
    assert "a function" in repr(laplace)


@pytest.mark.filterwarnings("ignore:.*is indefinite.*:UserWarning")
@pytest.mark.parametrize("structure", ["ekronecker", "kronecker", "diagonal"])
@pytest.mark.parametrize("name", ["huber", "vae"])
def test_an_optimizer_refreshes(name: str, structure: str) -> None:
    model = mlp(4, 5, WIDTH)
    optimizer = lq.LLQR(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        loss=FUNCTIONS[name],
        metric="gauss_newton",
        structure=structure,
    )
    optimizer.refresh(X, Y)
    assert optimizer.counts.refreshes == 1


def test_divergences_have_a_factor() -> None:
    def hellinger(a: Tensor, b: Tensor) -> Tensor:
        p, q = (v.log_softmax(1) / 2 for v in (a, b))
        return 2 * (1 - (p + q).exp().sum(1)).mean()

    labels = torch.arange(N) % WIDTH
    layers = lq.split(mlp(4, 5, WIDTH))
    problem, fisher = (
        lq.LQRProblem.from_network(layers, X, labels, loss="cross_entropy", metric=m, damping=0.1)
        for m in (Divergence(hellinger), "fisher")
    )
    # Twice the squared Hellinger distance, whose Hessian is a quarter of the Fisher matrix.
    half = (dense_of(fisher) - 0.1 * torch.eye(fisher.size, dtype=F64)) / 2
    got = dense_of(problem) - 0.1 * torch.eye(problem.size, dtype=F64)
    torch.testing.assert_close(got, half, rtol=1e-9, atol=1e-12)
    solution = lq.solve(problem, "dual")
    assert solution.status.ok and solution.residual_norm < 1e-10


# ---- no curvature


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: -o[:, 0].mean(),  # -log p of a flow
        nn.L1Loss(),
        lambda o, t: -(o * t).sum(1).mean(),
    ],
)
def test_curvature_that_is_zero_is_said_once(loss: Any) -> None:
    layers = lq.split(mlp(4, 5, WIDTH))
    with pytest.warns(UserWarning, match=r"is zero.*metric='newton' or 'empirical_fisher'") as seen:
        lq.LQRProblem.from_network(layers, X, Y, loss=loss)
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="is zero") as seen:
        lq.StreamedProblem(layers, lq.StreamedProblem.chunks(X, Y, 3), loss=loss)
    assert len(seen) == 1
    for metric in ("newton", "empirical_fisher", lq.metrics.StateCosts({0: 1.0})):
        lq.LQRProblem.from_network(layers, X, Y, loss=loss, metric=metric)


def test_a_divergence_without_curvature_is_said() -> None:
    layers = lq.split(mlp(4, 5, WIDTH))
    metric = Divergence(lambda a, b: (a - b).pow(4).mean())
    with pytest.warns(UserWarning, match="divergence .* is zero"):
        lq.LQRProblem.from_network(layers, X, Y, loss="mse", metric=metric)


def test_one_flat_batch_of_many_is_no_word() -> None:
    y = Y.clone()
    y[:3] += 100  # Far out, where Huber's loss is linear.
    streamed = lq.StreamedProblem(
        lq.split(mlp(4, 5, WIDTH)), lq.StreamedProblem.chunks(X, y, 3), loss=nn.HuberLoss()
    )
    assert float(streamed.hessian.to_dense().trace()) > 1e-3 * streamed.size


# ---- torch's other losses


@pytest.mark.parametrize(
    "loss", [nn.GaussianNLLLoss(), nn.CosineEmbeddingLoss(), nn.CTCLoss(), nn.TripletMarginLoss()]
)
def test_losses_of_more_arguments_are_refused_with_the_remedy(loss: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"outputs and targets alone.*lambda outputs, targets"):
        quiet(loss)


def test_losses_without_second_derivatives_are_refused_with_the_remedy() -> None:
    labels = torch.arange(N) % WIDTH
    layers = lq.split(mlp(4, 5, WIDTH))
    loss = nn.MultiMarginLoss()
    for metric in ("gauss_newton", "newton"):
        with pytest.raises(ValueError, match=r"no second derivative.*empirical_fisher"):
            lq.LQRProblem.from_network(layers, X, labels, loss=loss, metric=metric)
    made = lq.LQRProblem.from_network(layers, X, labels, loss=loss, metric="empirical_fisher")
    assert lq.solve(made).status.ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    """Targets are taken in float32, too."""
    loss, y = FUNCTIONS[name], Y.abs()
    problem = quiet(loss, y.to(dtype))
    f, y = problem.origin.outputs.double(), y.to(dtype).double()
    expected = positive(torch.func.hessian(lambda v: loss(v.reshape(f.shape), y))(f.flatten()))
    rows = torch.eye(N * WIDTH)
    # At the same outputs; double backward in float32 loses three digits where roots are small.
    torch.testing.assert_close(
        problem.Q[-1].times_rows(rows).double(),
        expected,
        rtol=0,
        atol=1e-4 * float(expected.abs().max()),
    )


def test_functions_of_torch_are_the_named_losses() -> None:
    for function, kind in (
        (F.cross_entropy, lq.losses.CrossEntropy),
        (F.mse_loss, lq.losses.MeanSquaredError),
        (F.binary_cross_entropy_with_logits, lq.losses.BCEWithLogits),
        (F.nll_loss, lq.losses.NegativeLogLikelihood),
    ):
        assert type(lq.losses.get_loss(function)) is kind
