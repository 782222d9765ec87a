"""What is said at construction, and what is held and timed after."""

from __future__ import annotations

import pytest
import torch
from optimizer.cases import batch, model, sgd, train, train_subspace, wrap
from small_models import NETWORKS, mlp, network
from torch import nn

import llqr_mf as lq
from llqr_mf.optimizer import Recipe


def table(optimizer):
    return {p.name: (p.structure, p.reason, p.trained) for p in optimizer.coverage.parameters}


def test_table():
    net = model()
    net[0].bias.requires_grad_(False)
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    base = sgd([net[0].weight, net[0].bias, net[2].weight, extra])
    rules = [("0.*", "diagonal"), ("*", None)]
    optimizer = wrap(net, base, structure=rules)
    assert table(optimizer) == {
        "0.weight": ("diagonal", "", True),
        "0.bias": (None, "frozen", False),
        "2.weight": (None, "identity", True),
        "2.bias": (None, "not in the base optimizer", False),
        "?": (None, "no parameter of the model", True),
    }
    assert [p.name for p in optimizer.coverage.passed_through] == ["2.weight", "?"]
    assert str(optimizer.coverage).splitlines() == [
        "parameter               shape  structure",
        "0.weight               (5, 4)  diagonal",
        "0.bias                   (5,)  - (frozen)",
        "2.weight               (3, 5)  - (identity)",
        "2.bias                   (3,)  - (not in the base optimizer)",
        "?                        (2,)  - (no parameter of the model)",
    ]


def test_strict_asks_only_for_what_is_trained():
    net = model()
    rules = [("*.weight", "kronecker"), ("*", None)]
    with pytest.raises(ValueError, match=r"strict: '0.bias' has no preconditioner \(identity\)"):
        wrap(net, structure=rules, strict=True)
    with pytest.raises(ValueError, match=r"strict: '0\.weight'"):
        wrap(net, structure="identity", strict=True)
    assert wrap(net, strict=True).coverage.passed_through == ()
    assert wrap(net, sgd([net[0].weight, net[2].weight]), structure=rules, strict=True)


def test_patterns_and_instances():
    net = model()
    rules = [("0.weight", "kronecker"), ("*.bias", "diagonal"), ("*", "ekronecker")]
    kinds = {name: kind for name, (kind, *_) in table(wrap(net, structure=rules)).items()}
    assert kinds == {
        **{"0.weight": "kronecker", "2.weight": "ekronecker"},
        **{"0.bias": "diagonal", "2.bias": "diagonal"},
    }
    M = lq.Kronecker(net, max_side=4)
    assert wrap(net, structure=M).structure is M
    assert wrap(net, structure="kronecker", max_side=4).structure.tensors.keys() == M.tensors.keys()


ERRORS = {
    "base": ({"base": "sgd"}, "base is a str"),
    "graft": ({"graft": "sign"}, "graft='sign'.*'layer', 'kl', 'none'"),
    "precondition": ({"precondition": "both"}, "precondition='both'"),
    "step": ({"step": "newton"}, "step='newton'"),
    "spread": ({"spread": 0}, "spread is 0"),
    "half a turn": ({"spread": 1.5}, "spread is 1.5: give a whole number"),
    "period": ({"refresh_every": 2.5}, "refresh_every is 2.5: give a whole number"),
    "no period": ({"refresh_every": 0}, "refresh_every gives 0"),
    "kl_limit": ({"kl_limit": 0.0}, "kl_limit is 0.0"),
    "recipe": ({"recipe": {"damping": 1.0}}, r"recipe is a dict: give lq.optimizer.Recipe"),
    "subspace": ({"subspace": {"memory": 2}}, r"subspace is a dict: .*Subspace"),
    "structure": ({"structure": "shampoo"}, "no structure 'shampoo'"),
    "option": ({"rank": 3}, "no option 'rank'"),
    "pattern": ({"structure": [("conv*", None), ("*", "diagonal")]}, "matches no trainable"),
    "no rule": ({"structure": [("0.*", "diagonal")]}, "no rule matches '2.weight'"),
    "loss": ({"loss": "hinge"}, "hinge"),
    "metric": ({"metric": "euclid"}, "euclid"),
    "cuts": ({"cuts": ["nowhere"]}, "nowhere"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_at_construction(case):
    options, message = ERRORS[case]
    net = model()
    given = {"base": sgd(net.parameters()), "loss": "cross_entropy", **options}
    with pytest.raises(ValueError, match=message):
        lq.LLQR(net, given.pop("base"), **given)


def test_bases_and_structures_that_do_not_fit():
    net = model()
    with pytest.raises(ValueError, match="base is an LLQR"):
        wrap(net, wrap(net))
    with pytest.raises(ValueError, match="LBFGS"):
        wrap(net, torch.optim.LBFGS(net.parameters()))
    with pytest.raises(ValueError, match="trains no parameter of model"):
        wrap(net, sgd(model().parameters()))
    with pytest.raises(ValueError, match=r"\['max_side'\] are options"):
        wrap(net, structure=lq.Kronecker(net), max_side=4)
    with pytest.raises(ValueError, match="other parameters"):
        wrap(net, structure=lq.Diagonal(mlp(4, 6, 3)))
    with pytest.raises(ValueError, match="another device"):
        wrap(net, structure=lq.Diagonal(model().to("meta")))


def test_weights_made_wider_ask_for_a_new_optimizer():
    net = model(dtype=torch.float32)
    optimizer = wrap(net)
    net.double()
    with pytest.raises(ValueError, match="dtype or their device changed"):
        optimizer.refresh(*batch())


def bytes_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("structure", ["ekronecker", "diagonal", "kronecker", "identity"])
@pytest.mark.parametrize("step", ["base", "subspace"])
def test_memory_usage_is_exact(structure, step):
    net = model(torch.float32)
    optimizer = wrap(net, torch.optim.AdamW(net.parameters()), structure=structure, step=step)
    run = train_subspace if step == "subspace" else train
    run(net, optimizer, 3, dtype=torch.float32)
    used = optimizer.memory_usage()
    weights = bytes_of(net.parameters())
    # Sides with bias: (5, 5) and (3, 6).
    numbers = {
        "ekronecker": 5 * 5 + 2 * 5**2 + 3 * 6 + 3**2,
        "kronecker": 2 * 5**2 + 3**2 + 6**2,
        "diagonal": 43,
        "identity": 0,
    }
    assert used["preconditioner"] == 4 * numbers[structure]
    assert used["factors"] == (used["preconditioner"] if structure == "kronecker" else 0)
    assert used["subspace"] == (2 * weights if step == "subspace" else 0)
    assert used["base"] == (0 if step == "subspace" else 2 * weights + 4 * 4)


@pytest.mark.parametrize("name", NETWORKS)
def test_state_is_bounded_by_default(name):
    net, x, y = network(name)
    optimizer = wrap(net)
    optimizer.refresh(x, y)
    used = optimizer.memory_usage()
    # One number more for every weight with a joined bias (see EKronecker).
    sites = len(optimizer.structure.sites)
    assert used["preconditioner"] <= 3 * bytes_of(net.parameters()) + 8 * sites
    assert used["factors"] == 0
    assert wrap(net, structure="diagonal").memory_usage()["preconditioner"] == bytes_of(
        net.parameters()
    )


def test_timings_by_phase():
    net = model()
    optimizer = wrap(net, recipe=Recipe())
    assert not any(optimizer.timings.values())
    train(net, optimizer, 2)
    other = wrap(net, step="subspace")
    other.step(*batch())
    spent = [{name for name, t in o.timings.items() if t > 0} for o in (optimizer, other)]
    assert spent == [{"refresh", "apply", "base"}, {"refresh", "subspace"}]
