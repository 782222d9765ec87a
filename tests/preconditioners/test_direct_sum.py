"""Structures side by side, the builder by names and patterns, sums and scalings."""

import pytest
import torch
from small_models import F64, mlp, normal
from structure_cases import LAYOUTS, case, dense, generator, randomise
from torch.testing import assert_close

from llqr_mf.preconditioners import (
    Diagonal,
    DirectSum,
    EKronecker,
    Identity,
    Kronecker,
    LowRank,
    Scalar,
    Scaled,
    Sum,
    structure,
)
from llqr_mf.preconditioners.direct_sum import KINDS

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


def like():
    return mlp(3, 4, 2)


@pytest.mark.parametrize("name", KINDS)
def test_one_name_makes_one_structure(name):
    assert type(structure(like(), name)) is KINDS[name]


def test_the_first_pattern_that_matches_wins():
    M = structure(like(), [("0.bias", None), ("*.bias", "scalar"), ("*", "ekron")])
    kinds = {type(part): part.layout.names for part in M.structures}
    assert kinds == {
        EKronecker: ("0.weight", "2.weight"),
        Identity: ("0.bias",),
        Scalar: ("2.bias",),
    }
    assert list(M.layout.names) == NAMES
    assert type(structure(like(), [("*.weight", "kronecker"), ("*", "kronecker")])) is Kronecker


def test_a_bias_is_joined_where_both_go_to_the_same_structure():
    M = structure(like(), [("0.*", "kronecker"), ("*.weight", "kronecker"), ("*", "diagonal")])
    (kron,) = [part for part in M.structures if isinstance(part, Kronecker)]
    assert {site.name: site.bias for site in kron.sites} == {"0.weight": "0.bias", "2.weight": None}


def test_options_go_to_the_structures_that_know_them():
    rules = [("0.*", "kronecker"), ("2.weight", "low_rank"), ("*", None)]
    M = structure(like(), rules, biases="diagonal", rank=3)
    kron, low, _ = M.structures
    assert isinstance(kron, Kronecker) and isinstance(low, LowRank)
    assert (len(kron.sites), low.rank) == (2, 3)
    with pytest.raises(ValueError, match=r"no option 'max_state'.*'rank'"):
        structure(like(), rules, max_state=3)


def test_rules_that_cannot_be_meant():
    bad = {
        "choose from.*'ekron'": "shampoo",
        "no structure 'x'": [("*", "x")],
        "'head.*' matches no trainable parameter": [("head.*", "ekron"), ("*", None)],
        "no rule matches '0.bias'": [("*.weight", "ekron")],
    }
    for match, rules in bad.items():
        with pytest.raises(ValueError, match=match):
            structure(like(), rules)


def test_frozen_parameters_are_no_part():
    model = like()
    model[0].weight.requires_grad_(False)
    assert structure(model, "ekron").layout.names == ("0.bias", "2.weight", "2.bias")
    with pytest.raises(ValueError, match="matches no trainable"):
        structure(model, [("0.weight", None), ("*", "ekron")])


def test_every_parameter_needs_exactly_one_structure():
    parts = [Diagonal({n: torch.zeros(s) for n, s in shapes.items()}) for shapes in (
        {"a": (2,), "b": (3, 2)}, {"b": (3, 2), "c": ()}, {"c": ()}, {"c": (1,)}
    )]  # fmt: skip
    whole = {"a": torch.zeros(2), "b": torch.zeros(3, 2), "c": torch.zeros(())}
    assert DirectSum(whole, [parts[2], parts[0]]).layout.names == ("a", "b", "c")
    for chosen, name in (((0,), "c"), ((0, 1), "b"), ((0, 3), "c")):
        with pytest.raises(ValueError, match=rf"exactly one structure: see \['{name}'\]"):
            DirectSum(whole, [parts[i] for i in chosen])
    with pytest.raises(ValueError, match=r"float32.*float64"):
        DirectSum({n: t.double() for n, t in whole.items()}, [parts[0], parts[2]])
    split = [Scalar({"l.weight": torch.zeros(2)}), Scalar({"l.bias": torch.zeros(2)})]
    with pytest.raises(ValueError, match=r"l\.scale"):
        DirectSum({"l.weight": torch.zeros(2), "l.bias": torch.zeros(2)}, split)


def test_the_order_of_the_structures_does_not_matter():
    M = case("direct_sum", "conv")
    turned = DirectSum(M, M.structures[::-1])
    assert_close(turned.to_dense(), M.to_dense(), rtol=0, atol=0)


def test_the_parts_share_their_tensors_with_the_whole():
    M = case("direct_sum", "mlp")
    M.load_state_dict(case("direct_sum", "mlp", seed=9).state_dict())
    assert_close(M.to_dense(), dense(M))
    assert_close(dense(M), case("direct_sum", "mlp", seed=9).to_dense())


def test_an_identity_part_refuses_a_scale_before_others_are_scaled():
    M = structure(like(), [("0.*", "diagonal"), ("*", None)])
    with pytest.raises(NotImplementedError, match="Scalar"):
        M.scale_(2.0)
    assert_close(M.to_dense(), torch.eye(M.shape[0], dtype=F64))


def test_coupled_charts_are_those_of_the_parts_side_by_side():
    M = structure(LAYOUTS["conv"](), [("conv*", "kronecker"), ("*", "diagonal")])
    charts = M.charts()
    assert [chart.elementwise for chart in charts] == [False, False]
    assert len(charts[0].get()) == sum(len(part.charts()[0].get()) for part in M.structures)
    diagonal = structure(LAYOUTS["conv"](), [("conv*", "ekron"), ("*", "diagonal")])
    (chart,) = diagonal.charts()
    assert chart.elementwise


# ---- Sum and Scaled


def test_sum_blends_to_the_mean_where_its_terms_do():
    def made(seed, weights):
        terms = [Diagonal(like()), Scalar(like())]
        return Sum([randomise(term, generator(seed)) for term in terms], weights=weights)

    M, other = made(0, [0.5, 2]), made(9, [3, 0.1])
    expected = 0.7 * dense(M) + 0.3 * dense(other)
    M.blend_(other, 0.3)
    assert_close(M.to_dense(), expected)


def test_sum_of_the_identity_and_another():
    M = Sum([Identity(like()), Kronecker(like())], weights=[0.1, 1])
    M.scale_(2)
    assert_close(M.to_dense(), 2.2 * torch.eye(M.shape[0], dtype=F64))


def test_sums_and_scalings_that_do_not_fit():
    model, other = like(), mlp(3, 4)
    with pytest.raises(ValueError, match="at least one"):
        Sum([])
    with pytest.raises(ValueError, match="DirectSum"):
        Sum([Diagonal(model), Diagonal(other)])
    with pytest.raises(ValueError, match="2 structures need"):
        Sum([Diagonal(model), Scalar(model)], weights=[1])
    with pytest.raises(ValueError, match="positive"):
        Sum([Diagonal(model)], weights=[-1])
    with pytest.raises(ValueError, match="same parameters"):
        Scaled(Diagonal(model), Scalar(other))
    with pytest.raises(TypeError, match="Diagonal"):
        Scaled(Scalar(model), Diagonal(model))
    with pytest.raises(ValueError, match="scaling"):
        Scaled(Diagonal(model), Scaled(Diagonal(model), Scalar(model)))


def test_the_dense_logdet_of_a_sum_has_a_limit():
    M = Sum([Diagonal({"a": torch.zeros(5000)})])
    with pytest.raises(NotImplementedError, match="4096"):
        M.logdet()


def test_identity_gives_back_what_it_was_given():
    M = Identity(like())
    parts = M.split(normal(2, M.shape[0]))
    assert all(M.precondition(parts)[name] is part for name, part in parts.items())
    with pytest.raises(NotImplementedError, match="Scalar"):
        M.scale_(2.0)
    assert M.memory_bytes == 0 and not M.charts()


def test_a_part_that_is_no_structure():
    M = Diagonal(mlp(4, 3))
    for make in (
        lambda: DirectSum(M, [M, 3]),
        lambda: Sum([M, torch.eye(15)]),
        lambda: Scaled(M, 0.5),
    ):
        with pytest.raises(TypeError, match="was given as a part"):
            make()
