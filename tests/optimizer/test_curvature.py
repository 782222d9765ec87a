"""Which loss, metric, structure and recipe go together: said at construction, true at a refresh."""

from __future__ import annotations

import warnings
from itertools import product

import pytest
from optimizer.cases import batch, model, sgd
from small_models import normal

import llqr_mf as lq
from llqr_mf.metrics import Fisher, StateCosts, metric_names
from llqr_mf.optimizer import Recipe

STRUCTURES = ["ekronecker", "kronecker", "diagonal", "scalar", "low_rank", "identity"]
LEARN = ["closed_form", "cg", "momentum"]


def power(outputs, targets):
    """Convex, twice differentiable, of no distribution."""
    return ((outputs - targets).square() + 0.1).pow(0.75).mean()


def targets_of(loss):
    if loss == "cross_entropy":
        return batch()[1]
    y = normal(8, 3, seed=4)
    return (y > 0).to(y) if loss == "bce_with_logits" else y


LOSSES = {"cross_entropy": "cross_entropy", "mse": "mse", "bce_with_logits": "bce_with_logits"}
LOSSES["function"] = power


def made(loss, metric, structure, learn, **options):
    net = model()
    if structure == "low_rank":
        options["rank"] = 2
    recipe = Recipe(learn=learn)
    base = sgd(net.parameters())
    return lq.LLQR(
        *(net, base), loss=loss, metric=metric, structure=structure, recipe=recipe, **options
    )


@pytest.mark.parametrize("metric", [None, *metric_names()])
@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_accepted_is_learned(loss, metric):
    """The constructor refuses exactly what no refresh could do, and the rest is learned."""
    inputs, targets = batch()[0], targets_of(loss)
    for structure, learn in product(STRUCTURES, LEARN):
        try:
            optimizer = made(LOSSES[loss], metric, structure, learn)
        except ValueError as error:
            assert ": " in str(error)
            about_loss = loss == "function" and metric in ("fisher", "fisher_mc", "kl")
            about_loss |= loss == "function" and metric in ("reverse_kl", "renyi")
            about_curves = metric == "newton" and structure != "identity"
            about_curves &= structure != "scalar" or learn == "cg"
            about_curves &= learn != "momentum" or structure == "low_rank"
            about_recipe = structure == "low_rank" and learn == "closed_form"
            assert about_loss or about_curves or about_recipe, error
            continue
        if structure == "identity":
            assert not optimizer.refresh(inputs, targets)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a function may have curvature that is not positive
            learned = optimizer.refresh(inputs, targets)
        assert learned, (structure, learn, optimizer.counts)


@pytest.mark.parametrize("structure", ["ekronecker", "kronecker", "diagonal", "scalar"])
@pytest.mark.parametrize("mode", ["base", "subspace"])
def test_a_function_trains_with_the_defaults(structure, mode):
    net = model()
    optimizer = lq.LLQR(
        *(net, sgd(net.parameters())), loss=power, structure=structure, step=mode, refresh_every=2
    )
    inputs, targets = batch()[0], targets_of("function")
    losses = []
    for _ in range(6):
        if mode == "subspace":
            losses.append(float(optimizer.step(inputs, targets)))
            continue
        if optimizer.refresh_due:
            assert optimizer.refresh(inputs, targets)
        optimizer.zero_grad()
        value = power(net(inputs), targets)
        value.backward()
        losses.append(float(value.detach()))
        optimizer.step()
    assert losses[-1] < losses[0] and optimizer.counts.skipped == 0
    assert optimizer.counts.refreshes == 3


def test_the_metric_that_none_stands_for_is_said():
    net = model()
    for loss, name in (("cross_entropy", "Fisher"), ("mse", "Fisher"), (power, "GaussNewton")):
        assert f"metric: {name}" in repr(lq.LLQR(net, sgd(net.parameters()), loss=loss))


@pytest.mark.parametrize("metric", ["fisher", "fisher_mc", "kl", "reverse_kl", "renyi", Fisher()])
@pytest.mark.parametrize("options", [{}, {"step": "subspace"}, {"structure": "scalar"}])
def test_a_function_names_no_distribution(metric, options):
    """And the message names metrics that do work."""
    net = model()
    with pytest.raises(ValueError, match=r"leave metric out.*'gauss_newton'") as caught:
        lq.LLQR(net, sgd(net.parameters()), loss=power, metric=metric, **options)
    for name in ("gauss_newton", "empirical_fisher", "squared_error"):
        assert f"'{name}'" in str(caught.value)
        optimizer = lq.LLQR(net, sgd(net.parameters()), loss=power, metric=name, **options)
        inputs, targets = batch()[0], targets_of("function")
        if options.get("step"):
            optimizer.step(inputs, targets)
        assert optimizer.refresh(inputs, targets)


@pytest.mark.parametrize("metric", ["newton", StateCosts({0: 0.1})])
def test_curvature_that_closed_forms_leave_out_is_refused(metric):
    for structure, learn in product(["ekronecker", "kronecker", "diagonal"], ["closed_form", "cg"]):
        with pytest.raises(ValueError, match=rf"'{structure}' knows nothing.*gauss_newton"):
            made("mse", metric, structure, learn)
    with pytest.raises(ValueError, match="'low_rank' knows nothing"):
        made("mse", metric, "low_rank", "momentum")
    for structure in ("scalar", "identity"):
        optimizer = made("mse", metric, structure, "closed_form", step="subspace")
        optimizer.step(batch()[0], targets_of("mse"))
        assert optimizer.counts.skipped == 0 and optimizer.counts.steps == 1
