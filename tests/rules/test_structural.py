"""Calls that are linear in what moves, with constants among the parts."""

import operator

import pytest
import torch
import torch.nn.functional as F
from rule_cases import Active, active, check, node_of, normal

from llqr_mf.rules.structural import LinearMapNode

T = torch.Tensor
INDEX = torch.tensor([2, 0, 2])
MASK = torch.tensor([True, False, True, True])

CASES = {
    "flatten": (torch.flatten, (2, 3, 4), (1,), {}),
    "reshape": (T.reshape, (2, 3, 4), (4, -1), {}),
    "permute": (T.permute, (2, 3, 4), (2, 0, 1), {}),
    "transpose": (T.transpose, (2, 3, 4), (-1, -2), {}),
    "squeeze": (T.squeeze, (2, 1, 4), (1,), {}),
    "unsqueeze": (T.unsqueeze, (2, 3), (0,), {}),
    "sum": (T.sum, (2, 3, 4), (), {}),
    "sum dims": (T.sum, (2, 3, 4), ((0, -1),), {"keepdim": True}),
    "mean": (torch.mean, (2, 3, 4), (1,), {}),
    "chunk": (torch.chunk, (4, 5), (3, 1), {}),
    "split": (T.split, (4, 5), ([1, 3, 1], 1), {}),
    "unbind": (torch.unbind, (3, 2), (1,), {}),
    "getitem int": (operator.getitem, (4, 3), (1,), {}),
    "getitem slices": (operator.getitem, (4, 3, 2), ((slice(1, None), ..., None, 0),), {}),
    "getitem index": (operator.getitem, (4, 3), ((slice(None), INDEX),), {}),
    "getitem mask": (operator.getitem, (4, 3), (MASK,), {}),
    "index_select": (torch.index_select, (4, 3), (0, INDEX), {}),
    "roll": (torch.roll, (4, 3), (1, 0), {}),
    "flip": (torch.flip, (4, 3), ([0, 1],), {}),
    "expand": (T.expand, (1, 3), (4, -1), {}),
    "repeat": (T.repeat, (2, 3), (2, 2), {}),
    "tril": (torch.tril, (4, 4), (), {}),
    "narrow": (torch.narrow, (4, 3), (0, 1, 2), {}),
    "unflatten": (T.unflatten, (2, 6), (1, (2, 3)), {}),
    "to": (T.to, (2, 3), (torch.float64,), {}),
    "avg_pool1d": (F.avg_pool1d, (2, 2, 5), (2,), {}),
    "avg_pool2d": (F.avg_pool2d, (2, 2, 5, 5), (2,), {"padding": 1}),
    "adaptive_avg_pool2d": (F.adaptive_avg_pool2d, (2, 2, 5, 4), ((2, 3),), {}),
    "unfold": (F.unfold, (2, 2, 4, 4), (2,), {}),
    "pixel_shuffle": (F.pixel_shuffle, (2, 4, 2, 2), (2,), {}),
    "pad": (F.pad, (2, 2, 4), ((1, 2),), {}),
    "pad reflect": (F.pad, (2, 2, 4), ((1, 2),), {"mode": "reflect"}),
    "pad circular": (F.pad, (2, 2, 4, 4), ((1, 2, 1, 1),), {"mode": "circular"}),
    "pad replicate": (F.pad, (2, 2, 4), ((1, 0),), {"mode": "replicate"}),
    # A learned temperature or gate has no axes.
    "scalar reshape": (T.reshape, (), (1, 1), {}),
    "scalar view": (T.view, (), (1,), {}),
    "scalar unsqueeze": (T.unsqueeze, (), (0,), {}),
    "scalar expand": (T.expand, (), (3, 2), {}),
    "scalar repeat": (T.repeat, (), (2, 3), {}),
    "scalar getitem": (operator.getitem, (), (None,), {}),
    "scalar sum": (T.sum, (), (), {}),
    "scalar mean": (torch.mean, (), (), {}),
    "scalar flatten": (torch.flatten, (), (), {}),
    "scalar squeeze": (T.squeeze, (), (), {}),
    "scalar to": (T.to, (), (torch.float64,), {}),
    "sum to a scalar": (torch.sum, (3,), (0,), {}),
    "unbind to scalars": (torch.unbind, (3,), (), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_linear_maps(name):
    function, shape, args, kwargs = CASES[name]
    assert isinstance(check(function, active(*shape), *args, **kwargs), LinearMapNode)


def test_scalars_are_stacked():
    assert isinstance(check(torch.stack, [active(), normal(), active(seed=2)]), LinearMapNode)


@pytest.mark.parametrize("function", [torch.cat, torch.stack])
def test_joined_with_constants(function):
    a, b, constant = active(2, 3), active(2, 3, seed=1), normal(2, 3, seed=2)
    for parts in ([a, b], [a, constant], [constant, a, constant, b], (b,)):
        assert isinstance(check(function, parts, dim=1), LinearMapNode)
        check(function, parts)


def test_pad_with_a_value_is_generic():
    check(F.pad, active(2, 3), (1, 1), value=2.0, generic=True)
    check(F.pad, active(2, 3), (1, 1), "constant", 0.0)


def test_a_cast_changes_the_dtype_of_products():
    single = normal(2, 3).float()
    node = node_of(T.to, Active(single), torch.float64)
    (pushed,) = node.push_all([normal(2, 2, 3).float()])
    (pulled,) = node.pull_all([normal(2, 2, 3)], [True], [None])
    assert (pushed.dtype, pulled.dtype) == (torch.float64, torch.float32)
    node = node_of(T.chunk, Active(single), 2, 1)
    (pulled,) = node.pull_all([None, normal(2, 2, 1).float()], [True], [None])
    assert not pulled[..., :2].any()
    assert node_of(T.to, Active(single), torch.int64).moves == []
