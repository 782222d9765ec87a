"""Which problems have a likelihood, its scale, and the memory of a Gram matrix by products."""

from __future__ import annotations

import pytest
import torch
from llqr_mf.solvers import dual
from memory import LiveBytes
from small_models import F64, mlp, normal, relative, seeded
from torch import nn

import llqr_mf as lq
from llqr_mf.gaussian_process import Laplace

DELTA = 0.3
ROWS = normal(6, 4, seed=1), normal(4, 4, seed=2)
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("metric", ["fisher_mc", "empirical_fisher"])
def test_only_the_exact_fisher(metric, loss):
    targets = LABELS if loss == "cross_entropy" else normal(6, 3, seed=3)
    layers = lq.split(mlp(4, 6, 3))
    made = [
        lq.LQRProblem.from_network(layers, ROWS[0], targets, loss=loss, metric=metric),
        lq.StreamedProblem(layers, [(ROWS[0], targets)], loss=loss, metric=metric),
    ]
    for problem in made:
        with pytest.raises(ValueError, match="which is not the curvature of the likelihood"):
            Laplace(problem, prior_precision=1.0, noise=0.1 if loss == "mse" else None)
    exact = lq.LQRProblem.from_network(layers, ROWS[0], targets, loss=loss, metric="fisher")
    Laplace(exact, prior_precision=1.0, noise=0.1 if loss == "mse" else None)


def test_probabilities_as_targets():
    """S makes a sum of sample likelihoods of the mean, or there is none."""
    layers = lq.split(mlp(4, 6, 3))
    one = nn.functional.one_hot(LABELS, 3).to(F64)
    hard = lq.LQRProblem.from_network(layers, ROWS[0], LABELS, loss="cross_entropy")
    expected = Laplace(hard, prior_precision=DELTA).predict(ROWS[1]).covariance_matrix

    def of(targets, streamed):
        if streamed:
            parts = lq.StreamedProblem.chunks(ROWS[0], targets, 4)
            return lq.StreamedProblem(layers, parts, loss="cross_entropy")
        return lq.LQRProblem.from_network(layers, ROWS[0], targets, loss="cross_entropy")

    uneven = one * torch.tensor([[1.0], [2.0], [1.0], [0.5], [1.0], [3.0]], dtype=F64)
    for streamed in (False, True):
        with pytest.raises(ValueError, match="normalise them"):
            Laplace(of(uneven, streamed), prior_precision=DELTA)
        made = Laplace(of(one, streamed), prior_precision=DELTA, rtol=1e-13)
        assert made.scale == pytest.approx(6.0)
        assert relative(made.predict(ROWS[1]).covariance_matrix, expected) < 1e-10
    # Alike, they are probabilities times a number, which the scale takes out.
    double = Laplace(of(2 * one, False), prior_precision=DELTA)
    assert double.scale == pytest.approx(3.0)
    assert relative(double.predict(ROWS[1]).covariance_matrix, expected) < 1e-10


class Twice(nn.Module):
    """One square matrix read twice: no closed form."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(300, 300), nn.Linear(300, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))))


def test_memory_of_a_gram_matrix_by_products(monkeypatch):
    """A few columns of size P at a time, about four vectors of size P for each."""
    model = seeded(Twice, dtype=torch.float32)
    x, y = (normal(20, width, seed=width, dtype=torch.float32) for width in (300, 3))
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="mse", damping=1.0)
    P = problem.size
    monkeypatch.setattr(dual, "PASS_ELEMENTS", 4 * P, raising=False)
    with LiveBytes() as memory:
        laplace = Laplace(problem, prior_precision=1.0, noise=0.1)
    print(f"Gram matrix by products: peak {memory.peak / 4 / P:.1f} P")
    assert laplace.method == "dual" and memory.peak < 4 * 4 * 6 * P
