"""Sums, differences, products and quotients with every kind of broadcasting."""

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from rule_cases import Active, active, check, check_gram, node_of, normal

PAIRS = [
    *[((3, 4), (3, 4)), ((2, 1, 3), (4, 3)), ((3,), (2, 3)), ((4, 1), (1, 3)), ((), (2, 3))],
    *[((2, 3), ()), ((), ()), ((1, 1), (2, 3)), ((2, 3), (1,)), ((1, 4, 1), (2, 1, 3))],
]
OPERATIONS = [operator.add, operator.sub, operator.mul, torch.add, torch.sub, torch.mul]


@pytest.mark.parametrize("shapes", PAIRS)
@pytest.mark.parametrize("function", OPERATIONS)
def test_two_active(function, shapes):
    check(function, active(*shapes[0]), active(*shapes[1], seed=1))


@pytest.mark.parametrize("shapes", PAIRS)
@pytest.mark.parametrize("function", [*OPERATIONS, operator.truediv, torch.div])
def test_second_constant(function, shapes):
    check(function, active(*shapes[0]), normal(*shapes[1], seed=1).abs() + 0.5)


@pytest.mark.parametrize("shapes", PAIRS)
@pytest.mark.parametrize("function", OPERATIONS)
def test_first_constant(function, shapes):
    check(function, normal(*shapes[0]), active(*shapes[1], seed=1))


@settings(max_examples=30, deadline=None)
@given(npst.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3))
def test_broadcasting(shapes):
    first, second = shapes.input_shapes
    for function in (operator.add, operator.mul):
        check(function, active(*first), active(*second, seed=1), differences=False)


@pytest.mark.parametrize("number", [2, -0.5, 1, 0, True])
def test_numbers(number):
    for function in OPERATIONS[:3]:
        if number is True and function is operator.sub:
            continue  # torch refuses it
        check(function, active(2, 3), number)
        check(function, number, active(2, 3))
    check(operator.truediv, active(2, 3), number or 4)
    check(torch.Tensor.mul, active(2, 3), number)


def test_alpha_negation_and_identity():
    check(torch.add, active(2, 3), active(3), alpha=-0.5)
    check(torch.sub, active(2, 3), normal(3), alpha=2)
    check(torch.sub, normal(3), active(2, 3), alpha=2)
    check(operator.neg, active(2, 3))
    check(torch.Tensor.clone, active(2, 3))
    check(torch.Tensor.contiguous, active(2, 3))


@pytest.mark.parametrize("function", [operator.add, operator.sub, operator.mul])
def test_a_value_with_itself(function):
    value = normal(2, 3)
    node = node_of(function, Active(value), Active(value))
    v, c = normal(2, 2, 3, seed=1), normal(2, 2, 3, seed=2)
    slope = {operator.add: 2, operator.sub: 0, operator.mul: 2 * value}[function]
    torch.testing.assert_close(node.push([v, v]), v * slope)
    torch.testing.assert_close(sum(node.pull(c, [True] * 2, [None] * 2)), c * slope)


def test_other_constants():
    check(operator.mul, active(2, 3), torch.tensor([True, False, True]))
    check(operator.add, active(2, 3), torch.arange(3))
    check(operator.truediv, active(2, 3), torch.arange(1, 4))


def test_promotion_and_quotients_are_left_to_autograd():
    single = Active(normal(2, 3).float())
    for function in (operator.add, operator.mul, operator.truediv):
        node = node_of(function, single, normal(2, 3).abs() + 1)
        (pulled,) = node.pull_all([normal(1, 2, 3)], [True], [None])
        assert pulled.dtype == torch.float32
    check(operator.truediv, normal(2, 3), Active(normal(2, 3).abs() + 1), generic=True)
    check(operator.truediv, active(2, 3), Active(normal(3).abs() + 1), generic=True)


@given(st.sampled_from([(4, 3), (4, 2, 3)]), st.sampled_from([(3,), (1, 3), (1,), ()]))
@settings(max_examples=8, deadline=None)
def test_gram(batch, shape):
    for function in (operator.add, operator.mul):
        args = active(*batch), active(*shape, seed=1)
        check_gram(node_of(function, *args), (function, args, {}), 4, 1)
