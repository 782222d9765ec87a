"""`F.linear` for every shape of input and choice of what moves."""

import pytest
import torch
import torch.nn.functional as F
from rule_cases import Active, active, check, check_gram, node_of, normal

LEADS = [(), (1,), (4,), (2, 3), (2, 1, 3)]


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("moving", ["xwb", "xw", "wb", "w", "b", "x", "xb"])
def test_products(lead, moving):
    def choose(letter, tensor):
        return Active(tensor) if letter in moving else tensor

    if "b" not in moving:
        check(F.linear, choose("x", normal(*lead, 3)), choose("w", normal(2, 3)))
    b = choose("b", normal(2))
    check(F.linear, choose("x", normal(*lead, 3)), choose("w", normal(2, 3)), b)


def test_keyword_arguments():
    check(F.linear, active(4, 3), weight=active(2, 3), bias=active(2))


def test_one_dimensional_weight_is_generic():
    check(F.linear, active(4, 3), active(3), generic=True)


@pytest.mark.parametrize("lead", [(4,), (4, 3), (4, 2, 2), (4, 9)])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_gram(lead, index):
    args = active(*lead, 3), active(2, 3), active(2)
    check_gram(node_of(F.linear, *args), (F.linear, args, {}), 4, index)


def test_gram_in_chunks(monkeypatch):
    from llqr_mf.rules import gram

    monkeypatch.setattr(gram, "CHUNK_ELEMENTS", 40)
    args = active(4, 3, 3), active(5, 3)
    check_gram(node_of(F.linear, *args), (F.linear, args, {}), 4, 1)


def test_the_weight_cotangent_is_written_into_its_buffer():
    node = node_of(F.linear, active(4, 3), active(2, 3), active(2))
    buffers = [None, normal(3, 2, 3), normal(3, 2)]
    pulled = node.pull_all([normal(3, 4, 2)], [True] * 3, buffers)
    assert pulled[1] is buffers[1]
    assert pulled[2] is buffers[2]


def test_no_input_is_kept_for_a_frozen_weight():
    assert node_of(F.linear, active(4, 3), normal(2, 3), active(2)).x is None


def test_bfloat16():
    """Products of 64 terms carry errors of some 2**-8 of their size each."""
    half = [Active(normal(*shape).bfloat16()) for shape in [(8, 64), (16, 64), (16,)]]
    node = node_of(F.linear, *half)
    wide = node_of(F.linear, *[Active(a.value.double()) for a in half])
    tangents = [normal(2, *a.value.shape, seed=1).bfloat16() for a in half]
    c = normal(2, 8, 16).bfloat16()
    pairs = [
        (node.push(tangents), wide.push([t.double() for t in tangents])),
        *zip(
            node.pull(c, [True] * 3, [None] * 3),
            wide.pull(c.double(), [True] * 3, [None] * 3),
            strict=True,
        ),
        *list(
            zip(
                node.curvature(c[0])(tangents),
                wide.curvature(c[0].double())([t.double() for t in tangents]),
                strict=True,
            )
        )[:2],
    ]
    for found, expected in pairs:
        assert found.dtype == torch.bfloat16
        error = (found.double() - expected).norm() / expected.norm()
        assert float(error) < 2**-6
