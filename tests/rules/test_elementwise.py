"""Every elementwise function that has the rule, and what must not have it."""

import operator

import pytest
import torch
import torch.nn.functional as F
from rule_cases import Active, active, check, node_of, normal

from llqr_mf.rules.base import RULES
from llqr_mf.rules.elementwise import ElementwiseNode, elementwise

REGISTERED = [
    function
    for function, rule in RULES.items()
    if rule is elementwise and function is not F.hardsigmoid
]
POSITIVE = {"log", "sqrt", "rsqrt", "log1p"}
KINKED = [F.relu, torch.relu, F.relu6, F.leaky_relu, F.hardtanh, F.hardswish, F.elu]


def name(function):
    return getattr(function, "__name__", str(function))


@pytest.mark.parametrize("function", REGISTERED, ids=name)
def test_every_registered_function(function):
    x = normal(2, 5)
    x = x.abs() + 0.3 if name(function) in POSITIVE else x
    extra = (-0.5, 0.7) if name(function) == "clamp" else ()
    node = check(function, Active(x), *extra)
    assert isinstance(node, ElementwiseNode)


@pytest.mark.parametrize("function", [*KINKED, torch.abs], ids=name)
def test_at_a_kink_as_autograd(function):
    x = torch.tensor([0.0, -0.0, 6.0, 3.0, -3.0, 1.0, -1.0], dtype=torch.float64)
    check(function, Active(x), differences=False)


def test_hardsigmoid():
    """Torch rounds its slope of 1/6 to float32 and has no second backward for it."""
    x = torch.tensor([-4.0, -3.0, -1.0, 0.5, 3.0, 5.0], dtype=torch.float64)
    node, slope = node_of(F.hardsigmoid, Active(x)), ((x > -3) & (x < 3)) / 6
    v = normal(2, 6)
    torch.testing.assert_close(node.push([v]), v * slope, rtol=1e-7, atol=0.0)
    torch.testing.assert_close(node.pull(v, [True], [None])[0], node.push([v]))
    assert node.curvature(v[0]) is None


@pytest.mark.parametrize("options", [{"approximate": "tanh"}, {"approximate": "none"}])
def test_options(options):
    check(F.gelu, active(2, 3), **options)
    check(F.softplus, active(2, 3), beta=2.0, threshold=1.0)
    check(F.elu, active(2, 3), alpha=0.3)
    check(F.leaky_relu, active(2, 3), 0.2)


@pytest.mark.parametrize("exponent", [2, 3, 0.5, -1, 1, 0])
def test_powers(exponent):
    x = Active(normal(2, 3).abs() + 0.5)
    for function in (operator.pow, torch.pow, torch.Tensor.pow):
        assert isinstance(check(function, x, exponent), ElementwiseNode)


def test_powers_of_and_to_tensors_are_generic():
    base = Active(normal(2, 3).abs() + 0.5)
    check(operator.pow, 2.0, active(2, 3), generic=True)
    check(torch.pow, base, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), generic=True)
    check(torch.pow, base, active(3), generic=True)


def test_a_clamp_that_broadcasts_is_generic():
    check(torch.clamp, active(1, 3), min=normal(4, 3), generic=True, differences=False)
    check(torch.clamp, normal(4, 3), min=active(3), generic=True, differences=False)
    check(torch.clamp, active(4, 3), max=0.4)


def test_a_piecewise_linear_function_has_no_curvature():
    assert node_of(F.relu, active(2, 3)).curvature(normal(2, 3)) is None
    assert node_of(F.tanh, active(2, 3), second=False).curvature(normal(2, 3)) is None


@pytest.mark.parametrize("function", [torch.tanh, F.gelu, F.silu], ids=name)
def test_bfloat16(function):
    x = normal(8, 16).bfloat16()
    node, wide = node_of(function, Active(x)), node_of(function, Active(x.double()))
    v = normal(2, 8, 16, seed=1).bfloat16()
    found, expected = node.push([v]), wide.push([v.double()])
    assert found.dtype == torch.bfloat16
    assert float((found.double() - expected).norm() / expected.norm()) < 2**-6
