"""Convolutions of one to three dimensions, in every geometry."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import Active, active, check, check_gram, node_of, normal

from llqr_mf.rules.conv import ConvNode

FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_geometry(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    d, groups = draw(1, 3), draw(1, 2)
    kernel = tuple(draw(1, 3) for _ in range(d))
    stride, padding, dilation = ([draw(low, 2) for _ in range(d)] for low in (1, 0, 1))
    size = [draw(5, 6) if d < 3 else 5 for _ in range(d)]
    x = active(draw(1, 2), 2 * groups, *size)
    weight, bias = active(draw(1, 2) * groups, 2, *kernel, seed=1), None
    if data.draw(st.booleans()):
        bias = active(len(weight.value), seed=2)
    node = check(
        *(FUNCTIONS[d], x, weight, bias, stride, padding, dilation, groups), differences=False
    )
    assert isinstance(node, ConvNode)


@pytest.mark.parametrize("moving", ["xwb", "xw", "wb", "w", "b", "x", "xb"])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_moves(moving, groups):
    def choose(letter, tensor):
        return Active(tensor) if letter in moving else tensor

    weight = normal(4, 4 // groups, 2, 2)
    args = choose("x", normal(2, 4, 3, 4)), choose("w", weight), choose("b", normal(4))
    check(F.conv2d, *args, stride=2, padding=1, groups=groups)


def test_left_to_autograd():
    check(F.conv1d, active(2, 2, 5), active(3, 2, 3), padding="same", generic=True)
    check(F.conv1d, active(2, 5), active(3, 2, 3), generic=True)
    check(F.conv_transpose1d, active(2, 2, 5), active(2, 3, 3), generic=True)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize(
    ("d", "groups", "options"),
    [
        (1, 1, {"stride": 2, "padding": 1}),
        (2, 1, {"padding": (1, 0), "dilation": (1, 2), "stride": (2, 1)}),
        (2, 2, {"padding": 1}),
        (3, 1, {}),
    ],
)
def test_gram(index, d, groups, options):
    args = active(3, 2 * groups, *[4] * d), active(2 * groups, 2, *[2] * d), active(2 * groups)
    kwargs = {**options, "groups": groups}
    check_gram(node_of(FUNCTIONS[d], *args, **kwargs), (FUNCTIONS[d], args, kwargs), 3, index)


def test_channels_last():
    x = normal(2, 4, 5, 5).to(memory_format=torch.channels_last)
    check(F.conv2d, Active(x), active(4, 4, 3, 3), active(4), padding=1)
