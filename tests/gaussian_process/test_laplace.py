"""The Laplace posterior beside J* (J'HJ + delta I)^{-1} J*' from dense Jacobians."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from memory import LiveBytes
from oracle import dense_jacobian
from small_models import F64, TiedTransformer, mlp, normal, relative, seeded
from torch import nn

import llqr_mf as lq
from llqr_mf.gaussian_process import Laplace, posterior
from llqr_mf.gaussian_process import laplace as laplace_module
from llqr_mf.losses.nothing import Nothing
from llqr_mf.metrics.share import Share

DELTA, NOISE = 0.3, 0.2
TOLERANCE = 1e-10


def conv(classes=3):
    head = nn.Conv2d(4, 4, 2, stride=2), nn.Flatten(), nn.Linear(16, classes)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), *head)


class Centred(nn.Module):
    """Samples interact."""

    def forward(self, x):
        return x - x.mean(0)


def interacting():
    return nn.Sequential(nn.Linear(4, 5), Centred(), nn.Tanh(), nn.Linear(5, 3))


def batch_norm():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


IMAGES = normal(6, 2, 4, 4, seed=1), normal(4, 2, 4, 4, seed=2)
ROWS = normal(6, 4, seed=1), normal(4, 4, seed=2)
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])
TOKENS = torch.tensor([[0, 3, 1], [4, 4, 2]])

# Model, inputs, new inputs, targets, loss.
CASES = {
    "regression": (lambda: mlp(4, 6, 5, 1), *ROWS, normal(6, 1, seed=3), "mse"),
    "outputs": (lambda: mlp(4, 6, 3), *ROWS, normal(6, 3, seed=3), "mse"),
    "classes": (lambda: mlp(4, 6, 5, 3), *ROWS, LABELS, "cross_entropy"),
    "logits": (lambda: mlp(4, 6, 2), *ROWS, (normal(6, 2, seed=3) > 0).to(F64), "bce_with_logits"),
    "conv": (lambda: seeded(conv).eval(), *IMAGES, LABELS, "cross_entropy"),
    "interacting": (lambda: seeded(interacting), *ROWS, LABELS, "cross_entropy"),
    "tied": (
        lambda: seeded(TiedTransformer),
        *(TOKENS, torch.tensor([[1, 1, 3]]), (TOKENS + 1) % 5),
        "cross_entropy",
    ),
}


def output_curvature(outputs, targets, loss):
    """The Hessian of the summed negative log-likelihood in the flat outputs, by autograd."""
    width = outputs.shape[-1]

    def negative(flat):
        f = flat.reshape(outputs.shape)
        if loss == "mse":
            return (f - targets).square().sum() / (2 * NOISE)
        if loss == "bce_with_logits":
            return nn.functional.binary_cross_entropy_with_logits(f, targets, reduction="sum")
        return nn.functional.cross_entropy(
            f.reshape(-1, width), targets.reshape(-1), reduction="sum"
        )

    return torch.func.hessian(negative)(outputs.detach().flatten())


def dense(name):
    """Problem, new inputs, Lambda, J*, f*."""
    make, inputs, new, targets, loss = CASES[name]
    model = make()
    problem = lq.LQRProblem.from_network(lq.split(model), inputs, targets, loss=loss, damping=0.7)
    J = dense_jacobian(model, inputs)
    H = output_curvature(problem.origin.outputs, targets, loss)
    precision = J.mT @ H @ J + DELTA * torch.eye(J.shape[1], dtype=F64)
    held = {k: b.clone() for k, b in model.named_buffers()}
    with torch.no_grad():
        outputs = torch.func.functional_call(model, held, (new,))
    return problem, new, precision, dense_jacobian(model, new), outputs


def laplace_of(problem, name, method, **options):
    noise = NOISE if CASES[name][-1] == "mse" else None
    options = {"prior_precision": DELTA, **options}
    return Laplace(problem, noise=noise, method=method, rtol=1e-13, **options)


@pytest.mark.parametrize("method", ["dual", "cg"])
@pytest.mark.parametrize("name", CASES)
def test_predictive(name, method):
    problem, new, precision, J, outputs = dense(name)
    expected = J @ torch.linalg.solve(precision, J.mT)
    laplace = laplace_of(problem, name, method)
    assert laplace.method == method and laplace.prior_precision == pytest.approx(DELTA)
    made = laplace.predict(new)
    assert made.mean.shape == (outputs[:, 0] if name == "regression" else outputs.flatten(1)).shape
    assert relative(made.mean.flatten(), outputs.flatten()) < 1e-14
    assert relative(made.covariance_matrix, expected) < TOLERANCE
    assert relative(made.variance.flatten(), expected.diagonal()) < TOLERANCE
    v = normal(len(J), 2, seed=8)
    assert relative(made.lazy_covariance_matrix @ v, expected @ v) < TOLERANCE
    width = outputs[0].numel()
    samples = torch.arange(len(outputs))
    blocks = expected.unflatten(0, (-1, width)).unflatten(2, (-1, width))[samples, :, samples]
    assert relative(laplace._predicted(new)[1].blocks(), blocks) < TOLERANCE


@pytest.mark.parametrize("method", ["dual", "cg"])
@pytest.mark.parametrize("name", ["outputs", "classes"])
def test_draws_have_the_posterior_covariance(name, method):
    """J* u whitened by its covariance: mean squares within 4.5 standard errors, entries too."""
    problem, _, precision, J, _ = dense(name)
    laplace = laplace_of(problem, name, method)
    count = 3000 if method == "dual" else 500
    u = laplace.sample(count, seed=1)
    assert u.shape == (count, problem.size)
    root = torch.linalg.cholesky(J @ torch.linalg.solve(precision, J.mT))
    z = torch.linalg.solve_triangular(root, (u @ J.mT).mT, upper=False)
    assert z.mean(1).abs().max() < 4.5 / count**0.5
    second = z @ z.mT / count - torch.eye(len(z), dtype=F64)
    # Var of z_i z_j is 1, that of z_i^2 is 2.
    assert (second - second.diagonal().diag()).abs().max() < 4.5 / count**0.5
    assert second.diagonal().abs().max() < 4.5 * (2 / count) ** 0.5
    # And in all weights: |u|^2 is the trace of the covariance.
    inverse = torch.linalg.inv(precision)
    mean, spread = inverse.trace(), (2 * inverse.square().sum() / count) ** 0.5
    assert (u.square().sum(1).mean() - mean).abs() < 4.5 * spread


def test_draws_do_not_depend_on_their_number():
    problem, *_ = dense("classes")
    laplace = laplace_of(problem, "classes", "dual")
    first = laplace.sample(3, seed=5)
    torch.testing.assert_close(laplace.sample(40, seed=5)[:3], first, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(laplace.sample(3, seed=6), first)


def test_damping_is_a_prior():
    """None takes s times the damping, layer by layer too."""
    make, inputs, new, targets, loss = CASES["outputs"]
    model = make()
    layers = lq.split(model)
    damping = {layer.name: 0.01 * (t + 1) for t, layer in enumerate(layers)}
    problem = lq.LQRProblem.from_network(layers, inputs, targets, loss=loss, damping=damping)
    scale = targets.numel() / (2 * NOISE)
    of = {n: damping[layer.name] for layer in layers for n in layer.parameters}
    prior = torch.cat([torch.full((p.numel(),), of[n]) for n, p in model.named_parameters()])
    J, new_J = dense_jacobian(model, inputs), dense_jacobian(model, new)
    precision = J.mT @ J / NOISE + torch.diag(prior.to(F64)) * scale
    expected = new_J @ torch.linalg.solve(precision, new_J.mT)
    for method in ("dual", "cg"):
        laplace = Laplace(problem, noise=NOISE, method=method, rtol=1e-13)
        assert laplace.prior_precision == pytest.approx([of[n] * scale for n in problem.names])
        assert relative(laplace.predict(new).covariance_matrix, expected) < 1e-7
    u = Laplace(problem, noise=NOISE).sample(2000, seed=2) @ new_J.mT
    ratio = u.square().mean(0) / expected.diagonal()
    assert (ratio - 1).abs().max() < 4.5 * (2 / 2000) ** 0.5


@pytest.mark.parametrize("method", ["dual", "cg"])
def test_with_prior(method):
    problem, new, *_ = dense("outputs")
    one = laplace_of(problem, "outputs", method)
    other = Laplace(problem, prior_precision=2.0, noise=0.5, method=method, rtol=1e-13)
    moved = one.with_prior(2.0, 0.5)
    expected = other.predict(new).covariance_matrix
    assert relative(moved.predict(new).covariance_matrix, expected) < TOLERANCE
    assert (moved.noise, moved.scale) == (0.5, other.scale)
    assert one.noise == NOISE and one.prior_precision == pytest.approx(DELTA)


@pytest.mark.parametrize("name", ["outputs", "classes"])
def test_streamed(name):
    problem, new, precision, J, _ = dense(name)
    _, inputs, _, targets, loss = CASES[name]
    chunks = lq.StreamedProblem.chunks(inputs, targets, 4)
    streamed = lq.StreamedProblem(problem.origin.layers, chunks, loss=loss, damping=0.1)
    laplace = laplace_of(streamed, name, "auto")
    assert laplace.method == "cg"
    expected = J @ torch.linalg.solve(precision, J.mT)
    assert relative(laplace.predict(new).covariance_matrix, expected) < TOLERANCE
    u = laplace.sample(300, seed=4) @ J.mT
    ratio = u.square().mean(0) / expected.diagonal()
    assert (ratio - 1).abs().max() < 4.5 * (2 / 300) ** 0.5
    with pytest.raises(ValueError, match="StreamedProblem has batches"):
        laplace_of(streamed, name, "dual")


def test_probabilities():
    """Monte-Carlo probabilities are those of draws of the dense covariance."""
    problem, new, precision, J, outputs = dense("classes")
    laplace = laplace_of(problem, "classes", "dual")
    made = laplace.probabilities(new, samples=20_000, seed=1)
    root = torch.linalg.cholesky(J @ torch.linalg.solve(precision, J.mT))
    draws = outputs.flatten() + normal(20_000, len(root), seed=2) @ root.mT
    softmax = torch.softmax(draws.reshape(-1, *outputs.shape), -1)
    error = (2 * softmax.var(0) / 20_000).sqrt()
    assert ((made - softmax.mean(0)).abs() < 4.5 * error).all()
    assert torch.equal(made, laplace.probabilities(new, samples=20_000, seed=1))
    assert not torch.equal(made, torch.softmax(outputs, -1))
    probit = laplace.probabilities(new, method="probit")
    assert (probit.sum(-1) - 1).abs().max() < 1e-12 and (probit - made).abs().max() < 0.2
    logits, *_ = dense("logits")
    assert laplace_of(logits, "logits", "dual").probabilities(ROWS[1]).shape == (4, 2)


def test_bad_arguments():
    problem, new, *_ = dense("outputs")
    classes, *_ = dense("classes")
    with pytest.raises(ValueError, match="noise is missing"):
        Laplace(problem)
    for noise in (-1.0, 0.0, math.inf, True):
        with pytest.raises(ValueError, match="noise is"):
            Laplace(problem, noise=noise)
    with pytest.raises(ValueError, match=r"noise is 1\.0 and the loss is no 'mse'"):
        Laplace(classes, noise=1.0)
    with pytest.raises(ValueError, match="prior_precision is -1"):
        Laplace(classes, prior_precision=-1)
    with pytest.raises(ValueError, match="no damping: give prior_precision"):
        Laplace(classes.with_damping(0.0))
    with pytest.raises(ValueError, match="damping is an operator"):
        Laplace(classes.with_damping(torch.eye(classes.size, dtype=F64)))
    with pytest.raises(ValueError, match="choose 'auto'"):
        Laplace(classes, method="kron")
    layers, inputs = classes.origin.layers, ROWS[0]
    newton = lq.LQRProblem.from_network(
        layers, inputs, LABELS, loss="cross_entropy", metric="newton"
    )
    with pytest.raises(ValueError, match="the metric is Newton"):
        Laplace(newton)
    own = lq.LQRProblem.from_network(layers, inputs, LABELS, loss=Nothing())
    with pytest.raises(ValueError, match="no likelihood is known"):
        Laplace(own)
    function = lq.LQRProblem.from_network(
        layers, inputs, LABELS, loss=lambda o, t: (o.sum(1) - t).square().mean()
    )
    with pytest.raises(ValueError, match="nothing is known"):
        Laplace(function).probabilities(new)
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3, dtype=F64))
    with pytest.raises(ValueError, match="has weights"):
        Laplace(lq.LQRProblem.from_network(layers, inputs, LABELS, loss=weighted))
    with pytest.raises(ValueError, match="has no classes"):
        laplace_of(problem, "outputs", "dual").probabilities(new)
    for count in (0, 1.5, True):
        with pytest.raises(ValueError, match="count is"):
            laplace_of(classes, "classes", "dual").sample(count)


@pytest.mark.parametrize(
    "number", [torch.tensor, lambda x: torch.tensor(x, dtype=torch.float32), np.float32, np.float64]
)
def test_numbers_of_other_kinds(number):
    problem, *_ = dense("outputs")
    made = Laplace(problem, prior_precision=number(0.5), noise=number(0.25))
    assert (made.prior_precision, made.noise) == (0.5, 0.25) and type(made.noise) is float
    assert made.with_prior(number(2.0), number(0.5)).prior_precision == 2.0
    for wrong in (torch.ones(2), torch.tensor(True), "1", 1j):
        with pytest.raises(ValueError, match="give a positive number"):
            Laplace(problem, prior_precision=wrong, noise=0.1)
    with pytest.raises(ValueError, match="give a positive, finite number"):
        Laplace(problem, prior_precision=1.0, noise=number(-1.0))


@pytest.mark.parametrize("method", ["dual", "cg"])
@pytest.mark.parametrize("by_layer", [False, True])
def test_another_noise_keeps_the_prior(method, by_layer):
    problem, new, *_ = dense("outputs")
    if by_layer:
        names = [layer.name for layer in problem.origin.layers]
        problem = problem.with_damping({name: 0.1 * (t + 1) for t, name in enumerate(names)})
    first = Laplace(problem, noise=NOISE, method=method, rtol=1e-13)
    moved = first.with_prior(noise=0.5)
    assert moved.prior_precision == pytest.approx(first.prior_precision) and moved.noise == 0.5
    # The same prior as damping: R = delta / s.
    ratio = 0.5 / NOISE
    values = [v * ratio for v in problem.control_cost.block_values]
    owner = {n: layer.name for layer in problem.origin.layers for n in layer.parameters}
    damping = {owner[n]: v for n, v in zip(problem.names, values, strict=True)}
    damping = {layer.name: damping.get(layer.name, 1.0) for layer in problem.origin.layers}
    expected = Laplace(problem.with_damping(damping), noise=0.5, method=method, rtol=1e-13)
    assert relative(
        moved.predict(new).covariance_matrix, expected.predict(new).covariance_matrix
    ) < (1e-9)
    back = moved.with_prior(noise=NOISE).predict(new).covariance_matrix
    assert relative(back, first.predict(new).covariance_matrix) < 1e-9


def test_repr():
    problem, *_ = dense("outputs")
    made = repr(Laplace(problem, prior_precision=0.5, noise=0.25))
    assert made == (
        "Laplace(loss='mse', outputs=3, weights=51, prior_precision=0.5, noise=0.25, method='dual')"
    )
    classes, *_ = dense("classes")
    assert "loss='cross_entropy'" in repr(Laplace(classes, prior_precision=1.0))


def test_no_gram_matrix():
    """Samples interact and are many: auto takes cg, dual says why not."""
    model = seeded(interacting)
    n = 400
    problem = lq.LQRProblem.from_network(
        lq.split(model), normal(n, 4, seed=1), torch.arange(n) % 3, loss="cross_entropy"
    )
    assert Laplace(problem, prior_precision=1.0).method == "cg"
    with pytest.raises(ValueError, match="samples interact"):
        Laplace(problem, prior_precision=1.0, method="dual")


def test_a_solve_that_stops_says_so():
    problem, new, *_ = dense("classes")
    laplace = Laplace(problem, prior_precision=1e-3, method="cg", max_iterations=2)
    with pytest.warns(UserWarning, match="raise max_iterations"):
        assert laplace.predict(new).covariance_matrix.shape == (12, 12)


def test_memory(monkeypatch):
    """Nothing of size N C x P or M C x P at P = 1.1 M, and no P at all in the dual's prediction."""
    width, classes, samples, new = 1024, 5, 16, 12
    model = nn.Sequential(
        *(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()),
        nn.Linear(width, classes),
    )
    x, xs = (normal(n, 8, seed=n, dtype=torch.float32) for n in (samples, new))
    y = torch.arange(samples) % classes
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy")
    P = problem.size
    with LiveBytes() as memory:
        laplace = Laplace(problem, prior_precision=1.0)
        made = laplace.predict(xs)
        assert made.variance.shape == (new, classes)
        laplace.probabilities(xs, samples=10)
        assert made.covariance_matrix.shape == (new * classes,) * 2
    print(f"dual: peak {memory.peak / 4 / P:.2f} P")
    # The new inputs' linearisation is there as well; no weight's size.
    assert laplace.method == "dual" and memory.peak < 4 * P
    with LiveBytes() as memory:
        laplace.sample(1)
    print(f"a draw: peak {memory.peak / 4 / P:.2f} P")
    assert memory.peak < 4 * 12 * P
    monkeypatch.setattr(posterior, "PASS_ELEMENTS", 2 * P)
    by_cg = Laplace(problem, prior_precision=1.0, method="cg", rtol=0.1)
    covariance = by_cg.predict(xs).lazy_covariance_matrix
    peaks = []
    for count in (2, 6):
        with LiveBytes() as memory:
            covariance @ normal(new * classes, count, dtype=torch.float32)
        peaks.append(memory.peak / 4 / P)
    print(f"cg, two columns at a time: peaks {peaks} P")
    # x, r, p, A p, b and the answer, in float64 as two columns are few; no more for six.
    assert by_cg.posterior.columns == 2 and peaks[0] < 2 * 13 and peaks[1] < 1.05 * peaks[0]


def test_noise_of_a_batch_goes_with_the_root_of_its_weight():
    problem, *_ = dense("classes")
    part = lq.LQRProblem.from_network(
        *(problem.origin.layers, ROWS[0], LABELS),
        loss="cross_entropy",
        metric=Share(lq.metrics.GaussNewton(), terminal_share=0.25, state_share=1.0),
    )
    whole, quarter = torch.zeros(2, 2, problem.size, dtype=F64)
    laplace_module._add_noise_of(problem, whole, range(2), 0, 1)
    laplace_module._add_noise_of(part, quarter, range(2), 0, 1)
    assert whole.norm() > 0
    torch.testing.assert_close(quarter, whole / 2)
