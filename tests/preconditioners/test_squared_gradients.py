"""The diagonal of the curvature in a basis, against dense algebra."""

import math

import pytest
import torch
from small_models import F64, relative
from statistics_cases import EXACT, flat_sites, problem_of, seed, turned

from llqr_mf.gram import closed_form_gram
from llqr_mf.output_sweep import samples_are_apart
from llqr_mf.preconditioners import EKronecker
from llqr_mf.preconditioners.squared_gradients import squared_gradients as squares_of


@pytest.mark.parametrize("metric", ["gauss_newton", "fisher_mc"])
@pytest.mark.parametrize("name", ["mlp", "conv_eval", "resnet_eval", "pre_norm", "words"])
def test_diagonal_is_exact(name, metric):
    problem = problem_of(name, metric)
    squares = squares_of(problem, probes=1)
    assert relative(problem.flatten(squares), problem.hessian.to_dense().diagonal()) < EXACT


@pytest.mark.parametrize("kernels", ["matrix", "tensor"])
@pytest.mark.parametrize("biases", ["joined", "diagonal"])
@pytest.mark.parametrize("name", ["mlp", "conv_eval", "post_norm", "words"])
def test_diagonal_in_a_basis_is_exact(name, biases, kernels):
    problem = problem_of(name)
    structure = EKronecker(problem, biases=biases, kernels=kernels)
    V = turned(structure, problem)
    expected = (V * (problem.hessian.to_dense() @ V)).sum(0)
    squares = squares_of(problem, structure, probes=1)
    assert relative(flat_sites(structure, squares), expected) < EXACT


def test_a_basis_on_the_vocabulary():
    """A structure made from bare tensors does not know that a side is one."""
    problem = problem_of("words")
    named = {name: torch.empty(shape, dtype=F64) for name, shape in problem_shapes(problem)}
    structure = EKronecker(named)
    assert structure.bases(structure.sites[0])[0] is not None
    V = turned(structure, problem)
    expected = (V * (problem.hessian.to_dense() @ V)).sum(0)
    assert relative(flat_sites(structure, squares_of(problem, structure)), expected) < EXACT


def problem_shapes(problem):
    return zip(problem.layout.names, problem.layout.shapes, strict=True)


def test_chunks_change_nothing(monkeypatch):
    """One column at a time, and a few numbers of per-sample gradients at a time."""
    whole = problem_of("conv_eval")
    structure = EKronecker(whole)
    turned(structure, whole)
    expected = squares_of(whole, structure)
    draws = squares_of(whole, structure, samples=5)
    monkeypatch.setattr("llqr_mf.preconditioners.matrix_reads.ELEMENTS", 20)
    monkeypatch.setattr("llqr_mf.preconditioners.squared_gradients.ELEMENTS", 20)
    single = problem_of("conv_eval", columns=1)
    small = squares_of(single, structure)
    for name, value in expected.items():
        assert relative(small[name], value) < EXACT
    for name, value in squares_of(single, structure, samples=5).items():
        assert relative(value, draws[name]) < EXACT


@pytest.mark.parametrize(
    "name", ["conv_train", "tied", "grouped", "similarity", "length_first", "recurrent"]
)
def test_what_has_no_closed_form_is_estimated(name, monkeypatch):
    """Every entry within 4 standard errors, those of squares of sums of random signs.

    (v_i)^2 with v = J'L z has the variance of at most twice its squared mean.
    """
    problem, count = problem_of(name), 4000
    # Not all probes at a time.
    elements = 700 * problem.size
    monkeypatch.setattr("llqr_mf.preconditioners.squared_gradients.ELEMENTS", elements)
    exact = problem.hessian.to_dense().diagonal()
    error = problem.flatten(squares_of(problem, probes=count)) - exact
    assert (error.abs() <= 4 * exact * math.sqrt(2 / count) + 1e-14).all()
    estimated = {
        "conv_train": ("conv1", "norm1", "conv2"),
        "tied": ("embed",),
        "grouped": ("0.weight",),
        "similarity": ("inner",),
        "length_first": ("inner",),
        "recurrent": ("cell",),
    }[name]
    parts, dense = problem.unflatten(error), problem.unflatten(exact)
    for each in problem.names:
        # A bias before train-mode BatchNorm has no curvature at all, to rounding.
        if (name, each) not in {("conv_train", "conv1.bias"), ("conv_train", "conv2.bias")}:
            off = parts[each].abs().max() > 1e-9 * dense[each].abs().max()
            assert off == each.startswith(estimated), each


def test_draws_are_unbiased():
    """Means over seeds within 4 standard errors of the exact squares, rotated."""
    problem = problem_of("pre_norm")
    structure = EKronecker(problem)
    turned(structure, problem)
    exact = flat_sites(structure, squares_of(problem, structure))
    draws = torch.stack(
        [
            flat_sites(structure, squares_of(problem, structure, samples=2, generator=seed(i)))
            for i in range(300)
        ]
    )
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() <= 4 * error + 1e-14).all()
    assert float(draws.std(0).sum()) > 0


# ---- samples


@pytest.mark.parametrize(
    "name, apart", [("similarity", False), ("recurrent", False), ("mlp", True)]
)
def test_samples_that_meet_have_no_gram_matrix(name, apart):
    """`F.linear(z, z)` compares samples, whatever Linear's rule says of its input alone."""
    problem = problem_of(name).with_damping(2.0)
    assert samples_are_apart(problem) == apart
    assert (closed_form_gram(problem) is not None) == apart
