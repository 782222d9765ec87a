"""Class probabilities of Gaussian logits, beside quadrature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import F64, normal

from llqr_mf.gaussian_process import bernoulli_probabilities, class_probabilities, predictive


def quadrature(mean, variance, nodes=80):
    """E[sigmoid(f)] by Gauss-Hermite."""
    x, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    f = mean.unsqueeze(-1) + variance.sqrt().unsqueeze(-1) * x
    return (torch.sigmoid(f) * w).sum(-1) / w.sum()


def covariances(m, c, seed=0):
    root = normal(m, c, c, seed=seed)
    return root @ root.mT


def test_one_logit():
    mean, covariance = normal(6, 1, seed=1) * 2, covariances(6, 1)
    expected = quadrature(mean[:, 0], covariance[:, 0, 0])
    drawn = bernoulli_probabilities(mean, covariance, samples=100_000, seed=2)[:, 0]
    # The standard deviation of a number in [0, 1] is 1/2 at most.
    assert (drawn - expected).abs().max() < 4.5 * 0.5 / 100_000**0.5
    probit = bernoulli_probabilities(mean, covariance, method="probit")[:, 0]
    # MacKay's formula is good to about 0.02.
    assert (probit - expected).abs().max() < 0.025


def test_two_classes_are_one_logit():
    """softmax(f)_1 = sigmoid(f_1 - f_0), whose variance sees the covariance."""
    mean, covariance = normal(5, 2, seed=3), covariances(5, 2, seed=4)
    difference = mean[:, 1] - mean[:, 0]
    variance = covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
    made = class_probabilities(mean, covariance, samples=100_000, seed=5)
    error = 4.5 * 0.5 / 100_000**0.5
    assert (made[:, 1] - quadrature(difference, variance)).abs().max() < error
    assert (made.sum(-1) - 1).abs().max() < 1e-12


def test_no_covariance_is_softmax():
    mean, none = normal(4, 3), torch.zeros(4, 3, 3, dtype=F64)
    for method in ("monte_carlo", "probit"):
        made = class_probabilities(mean, none, method=method, samples=3)
        torch.testing.assert_close(made, torch.softmax(mean, -1))


def test_more_variance_is_less_confident():
    mean = torch.tensor([[2.0, 0.0, -1.0]], dtype=F64)
    eye = torch.eye(3, dtype=F64).unsqueeze(0)
    for method in ("monte_carlo", "probit"):
        made = [class_probabilities(mean, c * eye, method=method)[0, 0] for c in (0.0, 4.0, 100.0)]
        assert made[0] > made[1] > made[2] > 1 / 3


def test_draws_do_not_depend_on_the_step(monkeypatch):
    mean, covariance = normal(4, 3), covariances(4, 3)
    one = class_probabilities(mean, covariance, samples=50, seed=1)
    monkeypatch.setattr(predictive, "DRAWN_ELEMENTS", 36)
    torch.testing.assert_close(class_probabilities(mean, covariance, samples=50, seed=1), one)
    assert not torch.equal(class_probabilities(mean, covariance, samples=50, seed=2), one)


def test_bad_arguments():
    mean, covariance = normal(4, 3), covariances(4, 3)
    with pytest.raises(ValueError, match="choose 'monte_carlo'"):
        class_probabilities(mean, covariance, method="laplace_bridge")
    with pytest.raises(ValueError, match=r"give \(M, C\) and \(M, C, C\)"):
        class_probabilities(mean, covariance[:, :, 0])
    for samples in (0, 2.0, True):
        with pytest.raises(ValueError, match="samples is"):
            bernoulli_probabilities(mean, covariance, samples=samples)
