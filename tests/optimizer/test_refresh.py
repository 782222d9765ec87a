"""When M is learned, and what it then is: against the baselines and dense running means."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from optimizer.cases import assert_same, backward, batch, model, sgd, train, train_subspace, wrap
from small_models import (
    NETWORKS,
    Oracle,
    assert_unchanged,
    mlp,
    network,
    output_hessian,
    relative,
    state_of,
)

import llqr_mf as lq
from llqr_mf.fitting.authors_ekronecker import AuthorsEKronecker
from llqr_mf.optimizer import Recipe, annealed, burn_in, refresh
from llqr_mf.optimizer.halves import at_least_two
from llqr_mf.optimizer.running_mean import RunningMean
from llqr_mf.preconditioners.baselines import ekfac, jacobi, kfac, scaled_identity
from llqr_mf.preconditioners.layerwise import Layerwise
from llqr_mf.preconditioners.probes import curvature_probes
from llqr_mf.preconditioners.statistics import layer_factors

DAMPING = 1e-2
EXACT = Recipe(samples=None, damping=DAMPING)
ROUNDING = 1e-10
"""Float64; inverses of curvatures with condition numbers below 1e4."""


def problem_of(net, x, y):
    layers = lq.split(net)
    options = {"loss": "cross_entropy", "metric": "fisher", "damping": DAMPING}
    return lq.LQRProblem.from_network(layers, x, y, **options)


def curvature(net, x, y):
    """J'QJ without damping, dense; for class targets Q is the loss's Hessian at the outputs."""
    oracle = Oracle(net, x)
    J = oracle.jacobian()
    return J.mT @ output_hessian(lambda z: F.cross_entropy(z, y), oracle.outputs) @ J


# ---- when


SCHEDULES = {
    "number": (4, 1, [0, 4, 8, 12, 16]),
    "annealed": (annealed(first=1, last=8, steps=6), 1, [0, 1, 2, 4, 8, 16]),
    "burn_in": (burn_in(4, every=1, then=5), 1, [0, 1, 2, 3, 4, 9, 14]),
    "spread": (6, 3, [0, 1, 2, 6, 7, 8, 12, 13, 14]),
    "spread over all": (2, 2, list(range(17))),
    "spread over more": (1, 3, list(range(17))),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("step", ["base", "subspace"])
def test_due(name, step):
    every, spread, wanted = SCHEDULES[name]
    net = model()
    optimizer = wrap(
        *(net, sgd(net.parameters(), lr=1e-3)),
        **{"structure": "diagonal", "refresh_every": every, "spread": spread, "step": step},
    )
    found = []
    for i in range(17):
        if optimizer.refresh_due:
            found.append(i)
            if step == "base":
                optimizer.refresh(*batch())
                assert not optimizer.refresh_due
        if step == "base":
            backward(net, *batch())
            optimizer.step()
        else:
            optimizer.step(*batch())
    assert found == wanted
    assert optimizer.counts.refreshes == len(wanted)
    assert optimizer._schedule.done == len(wanted) // spread


def test_a_late_refresh_counts_from_when_it_came():
    net = model()
    optimizer = wrap(net, structure="diagonal", refresh_every=5)
    for _ in range(3):
        backward(net, *batch())
        optimizer.step()
    assert optimizer.refresh(*batch())
    assert optimizer._schedule.due == 8


@pytest.mark.parametrize(
    "every", [0, -1, lambda step: 0, burn_in(2, every=0, then=4), burn_in(0, every=1, then=0)]
)
def test_periods_below_one(every):
    with pytest.raises(ValueError, match="refresh_every"):
        wrap(model(), refresh_every=every)


@pytest.mark.parametrize("numbers", [(0, 2, 3), (3, 2, 3), (1, 2, 0)])
def test_annealed_periods_grow(numbers):
    with pytest.raises(ValueError, match="need 1 <= first <= last"):
        annealed(**dict(zip(("first", "last", "steps"), numbers, strict=True)))


# ---- the first refresh is the baseline


BASELINES = {
    "diagonal": jacobi,
    "kronecker": lambda p: kfac(p, kernels="tensor"),
    "ekronecker": lambda p: ekfac(p, kernels="tensor", max_state=3.0),
    "scalar": scaled_identity,
}


@pytest.mark.parametrize("structure", BASELINES)
@pytest.mark.parametrize("name", ["mlp", "conv_eval", "pre_norm"])
def test_the_first_refresh_is_the_baseline(structure, name):
    net, x, y = network(name)
    options = {"kernels": "tensor"} if structure == "kronecker" else {}
    optimizer = wrap(net, structure=structure, recipe=replace(EXACT, probes=64), **options)
    assert optimizer.refresh(x, y)
    wanted = BASELINES[structure](problem_of(net, x, y))
    # Parameters without a closed form take random signs: of seed 0 in both.
    assert relative(optimizer.structure.to_dense(), wanted.to_dense()) < ROUNDING


# ---- the running mean


def shares(count, ema):
    """What refresh 1, 2, ... weigh in the mean after `count` of them."""
    weights = []
    for n in range(1, count + 1):
        whole = max(1 - ema, 1 / n)
        weights = [w * (1 - whole) for w in weights] + [whole]
    return weights


@pytest.mark.parametrize("ema", [0.0, 0.5, 0.8])
def test_diagonal_running_mean(ema):
    net = model()
    optimizer = wrap(net, structure="diagonal", recipe=replace(EXACT, ema=ema))
    batches = [batch(seed=i) for i in range(6)]
    diagonals = [curvature(net, *b).diagonal() for b in batches]
    for i, b in enumerate(batches):
        assert optimizer.refresh(*b)
        mean = sum(w * d for w, d in zip(shares(i + 1, ema), diagonals[: i + 1], strict=True))
        wanted = 1 / (mean + DAMPING)
        assert relative(optimizer.structure.to_dense().diagonal(), wanted) < ROUNDING


def test_kronecker_running_mean():
    """K-FAC of the mean factors; pi from their traces."""
    net = model()
    optimizer = wrap(net, structure="kronecker", recipe=replace(EXACT, ema=0.4))
    batches = [batch(seed=i) for i in range(3)]
    for b in batches:
        assert optimizer.refresh(*b)
    found = [layer_factors(problem_of(net, *b)) for b in batches]
    weights = shares(3, 0.4)
    for name in ("0.weight", "2.weight"):
        G, A = (
            sum(w * f[name].sides[side] for w, f in zip(weights, found, strict=True))
            for side in (0, 1)
        )
        pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
        eps = DAMPING**0.5
        inverses = [
            torch.linalg.inv(G + eps / pi * torch.eye(len(G), dtype=G.dtype)),
            torch.linalg.inv(A + eps * pi * torch.eye(len(A), dtype=A.dtype)),
        ]
        for side, wanted in enumerate(inverses):
            held = optimizer.structure.tensors[f"{name}.factor{side}"]
            assert relative(held, wanted) < ROUNDING


def test_ekronecker_running_mean():
    """The spectrum is the mean of curvatures in the new bases, those of the mean factors."""
    net = mlp(4, 3)
    optimizer = wrap(net, structure="ekronecker", recipe=replace(EXACT, ema=0.4), max_state=None)
    first, second = batch(seed=1), batch(seed=2)
    optimizer.refresh(*first)
    old = optimizer.structure.clone()
    optimizer.refresh(*second)
    M, (site,) = optimizer.structure, optimizer.structure.sites
    weight = max(1 - 0.4, 1 / 2)
    fresh = layer_factors(problem_of(net, *second), M)[site.name].sides
    past = 1 / old.spectrum(site) - DAMPING
    for side in (0, 1):
        V1, V2 = old.bases(site)[side], M.bases(site)[side]
        s = past.mean(1 - side)
        held = V1 @ (s * fresh[side].trace() / s.sum()).diag() @ V1.mT
        mixed = V2.mT @ held.lerp(fresh[side], weight) @ V2
        assert relative(mixed.diagonal().diag(), mixed) < 1e-7  # float32's eps^(1/2) is far off
    H2 = curvature(net, *second) + DAMPING * torch.eye(M.shape[0], dtype=M.dtype)
    mean = torch.linalg.inv(old.to_dense()).lerp(H2, weight)
    # Columns of V, in the flat layout: the site's rows, weight and bias together.
    units = torch.eye(M.shape[0], dtype=M.dtype)
    V = M.rotate(M.split(units))[site.name].flatten(1)
    wanted = (V * (mean @ V)).sum(0)
    assert relative(1 / M.spectrum(site).flatten(), wanted) < ROUNDING


@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_micro_batches_and_turns_are_the_whole_batch(ema):
    """A third of the batch at each of three turns, each of two micro-batches."""
    net = model()
    x, y = batch(n=12)
    recipe = replace(EXACT, ema=ema)
    whole, parts, turns, both = (
        wrap(net, structure="diagonal", recipe=recipe, spread=spread) for spread in (1, 1, 3, 3)
    )
    pieces = [(x[i : i + 2], y[i : i + 2]) for i in range(0, 12, 2)]
    for optimizer in (whole, parts, turns, both):  # a past of their own
        for i in range(optimizer._schedule.spread * 2):
            optimizer.refresh(*batch(seed=30 + i // optimizer._schedule.spread))
    whole.refresh(x, y)
    parts.refresh(None, batches=pieces)
    for i in range(3):
        turns.refresh(x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4])
        both.refresh(None, batches=pieces[2 * i : 2 * i + 2])
    assert {o._schedule.done for o in (whole, parts, turns, both)} == {3}
    for optimizer in (parts, turns, both):
        for name, held in optimizer.structure.tensors.items():
            assert relative(held, whole.structure.tensors[name]) < ROUNDING


# ---- fits


@pytest.mark.parametrize("step", ["base", "subspace"])
@pytest.mark.parametrize("learn", ["cg", "momentum"])
@pytest.mark.parametrize("structure", ["ekronecker", "kronecker", "diagonal", "scalar", "low_rank"])
def test_fits_hold_half_of_a_single_batch_out(step, learn, structure):
    net = model()
    recipe = Recipe(learn=learn, damping=DAMPING)
    optimizer = wrap(net, structure=structure, recipe=recipe, step=step)
    assert optimizer.last_fit is None
    x, y = batch(n=7)
    assert optimizer.step(x, y) if step == "subspace" else optimizer.refresh(x, y)
    report = optimizer.last_fit
    assert report.method == learn and report.held_out is not None
    assert optimizer.counts.kept == int(not report.accepted)
    if report.accepted:
        assert report.held_out < report.held_out_before


def test_a_fit_on_batches_fits_all_but_the_last():
    net = model()
    optimizer = wrap(net, structure="diagonal", recipe=Recipe(learn="cg", damping=DAMPING))
    batches = [batch(seed=i) for i in range(3)]
    optimizer.refresh(None, batches=batches)
    g = [problem_of(net, *b).gradient for b in batches]
    M = optimizer.structure.to_dense()
    H = [problem_of(net, *b).hessian.to_dense() for b in batches]
    J = [
        v @ (h @ v) / 2 - g_ @ v for g_, h, v in ((a, h, M @ a) for a, h in zip(g, H, strict=True))
    ]
    assert optimizer.last_fit.accepted
    assert optimizer.last_fit.held_out == pytest.approx(float(J[2]), rel=1e-8)
    assert optimizer.last_fit.objective == pytest.approx(float(J[0] + J[1]) / 2, rel=1e-8)


def test_a_refused_fit_leaves_what_the_closed_form_made(monkeypatch):
    net = model()
    fitted, plain = (
        wrap(net, recipe=Recipe(learn=learn, samples=None, damping=30.0))
        for learn in ("cg", "closed_form")
    )

    def refuse(M, problems, **options):
        """A fit to another damping, of which M becomes too small."""
        far = [p.with_damping(1e6) for p in problems[:-1]]
        return lq.fit(M, [*far, problems[-1]], **options)

    monkeypatch.setattr(refresh, "fit", refuse)
    x, y = batch()
    assert fitted.refresh(x, y) and plain.refresh(None, batches=at_least_two([(x, y)]))
    assert not fitted.last_fit.accepted
    assert fitted.counts.kept == 1 and "held-out" in fitted.counts.reason
    assert_same(fitted.structure.state_dict(), plain.structure.state_dict())


def test_low_rank_starts_in_the_span_of_the_curvature_as_d_sees_it():
    net = model()
    M, problem = lq.LowRank(net, rank=6), problem_of(net, *batch(n=16))
    recipe = Recipe(learn="cg", damping=DAMPING, samples=None)
    RunningMean(M, recipe, torch.Generator().manual_seed(3)).add(problem, 1.0)
    assert relative(M.flat(), jacobi(problem).to_dense().diagonal()) < ROUNDING
    probes = curvature_probes(problem, 6, torch.Generator().manual_seed(3)) * M.flat().sqrt()
    W = M.basis()
    assert relative(probes @ W.mT @ W, probes) < ROUNDING


def test_a_subspace_refresh_takes_the_steps_own_problem(monkeypatch):
    """One linearisation a step, refreshes included; and the exact damping of each."""
    net = model()
    optimizer = wrap(net, structure="diagonal", recipe=EXACT, step="subspace", refresh_every=1)
    made, real = [], optimizer._problem
    spy = lambda *args, **options: made.append(args[2]) or real(*args, **options)  # noqa: E731
    monkeypatch.setattr(optimizer, "_problem", spy)
    wanted = jacobi(problem_of(net, *batch()))
    optimizer.step(*batch())
    assert made == [0.0]
    assert relative(optimizer.structure.to_dense(), wanted.to_dense()) < ROUNDING


def test_authors_structure_by_their_recipe():
    net = model()
    optimizer = wrap(net, structure=AuthorsEKronecker(net), recipe=Recipe(learn="momentum"))
    assert optimizer.refresh(*batch()) and optimizer.last_fit.method == "momentum"


def test_what_cannot_be_learned_is_said_at_construction():
    net = model()
    with pytest.raises(ValueError, match=r"'low_rank' has no closed form.*learn='cg'"):
        wrap(net, structure="low_rank")
    with pytest.raises(ValueError, match=r"'low_rank' has no closed form"):
        wrap(net, structure=[("0.*", "low_rank"), ("*", "diagonal")])
    fixed = Layerwise(problem_of(net, *batch()))
    for learn in ("closed_form", "cg", "momentum"):
        with pytest.raises(ValueError, match="another structure"):
            wrap(net, structure=fixed, recipe=Recipe(learn=learn))
    for bad in ({"learn": "sgd"}, {"damping": 0.0}, {"ema": 1.0}, {"samples": 0}, {"probes": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Recipe(**bad)


def test_halves():
    x, mask, y = torch.arange(10).reshape(5, 2), torch.ones(3, 3), torch.arange(5)
    (first, second) = at_least_two([((x, mask, None), y)])
    assert torch.equal(torch.cat([first[0][0], second[0][0]]), x)
    assert first[0][1] is mask and first[0][2] is None
    assert (len(first[1]), len(second[1])) == (2, 3)
    assert at_least_two([(x, y), (x, y)]) == [(x, y), (x, y)]
    with pytest.raises(ValueError, match="two samples"):
        at_least_two([(x[:1], y[:1])])


# ---- what a refresh must not touch


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("learn", ["closed_form", "cg", "momentum"])
def test_nothing_but_m_changes(name, learn):
    net, x, y = network(name)
    optimizer = wrap(net, recipe=Recipe(learn=learn))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = state_of(net)
    assert optimizer.refresh(x, y)
    assert_unchanged(net, before)
    assert optimizer.base.state == {}


def test_runs_repeat_and_follow_the_seed():
    made = []
    for seed, run in ((0, train), (0, train), (1, train), (0, train_subspace)):
        net = model()
        step = "subspace" if run is train_subspace else "base"
        optimizer = wrap(net, seed=seed, recipe=Recipe(samples=1), refresh_every=2, step=step)
        torch.manual_seed(len(made))
        run(net, optimizer, 4)
        made.append(optimizer.structure.tensors["0.weight.spectrum"])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_a_mode_change_is_followed():
    """An evaluation-mode model at construction, as Hugging Face loads them, then training."""
    net, x, y = network("conv_train")
    optimizer = wrap(net.eval(), structure="diagonal")
    net.train()
    assert optimizer.refresh(x, y)
    fresh = wrap(net, structure="diagonal")
    fresh.refresh(x, y)
    assert_same(optimizer.structure.state_dict(), fresh.structure.state_dict())


def test_arguments():
    net = model()
    optimizer = wrap(net, structure="diagonal")
    x, y = batch()
    for args, options in (
        ((x,), {}),
        ((None,), {"batches": []}),
        ((x, y), {"batches": [(x, y)]}),
        ((x,), {"batches": [(x, y)]}),
    ):
        with pytest.raises(ValueError, match="give inputs and targets, or None and batches"):
            optimizer.refresh(*args, **options)
    net[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameters"):
        optimizer.refresh(x, y)
    assert optimizer.counts == lq.optimizer.Counts()
