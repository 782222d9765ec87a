"""Calls without a rule of their own, by autograd."""

import operator

import pytest
import torch
import torch.nn.functional as F
from rule_cases import Active, active, check, node_of, normal
from torch.nn.attention import SDPBackend, sdpa_kernel

from llqr_mf.rules import GenericNode


def several(x, y):
    return {"product": x @ y, "rest": (x.square(), x.detach(), 3)}


CASES = {
    "softmax": (F.softmax, [active(2, 3)], {"dim": -1}),
    "log_softmax": (F.log_softmax, [active(2, 3)], {"dim": -1}),
    "matmul": (operator.matmul, [active(2, 3), active(3, 2)], {}),
    "einsum": (torch.einsum, ["ij,kj->ik", active(2, 3), active(4, 3)], {}),
    "where": (torch.where, [torch.tensor([True, False]), active(3, 2), active(2)], {}),
    "masked_fill": (torch.Tensor.masked_fill, [active(2), torch.tensor([True, False]), 0.5], {}),
    "norm": (torch.linalg.vector_norm, [active(2, 3)], {}),
    "max_pool2d": (F.max_pool2d, [active(2, 2, 4, 4), 2], {}),
    "adaptive_max_pool1d": (F.adaptive_max_pool1d, [active(2, 2, 5), 2], {}),
    "instance_norm": (F.instance_norm, [active(2, 2, 5)], {}),
    "prelu": (F.prelu, [active(2, 3), active(3)], {}),
    "bilinear": (F.bilinear, [active(2, 3), active(2, 2), active(4, 3, 2), active(4)], {}),
    "cumsum": (torch.cumsum, [active(2, 3), 0], {}),
    "var": (torch.var, [active(2, 3)], {"dim": 1}),
    "round": (torch.round, [active(2, 3)], {}),
    "logsumexp": (torch.logsumexp, [active(2, 3), 1], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_products(name):
    function, args, kwargs = CASES[name]
    check(function, *args, generic=True, **kwargs)


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal):
    with sdpa_kernel(SDPBackend.MATH):
        args = [active(2, 2, 3, 2, seed=i) for i in range(3)]
        check(F.scaled_dot_product_attention, *args, is_causal=causal, generic=True)


def test_several_outputs():
    node = node_of(several, active(2, 3), active(3, 2))
    assert isinstance(node, GenericNode)
    assert node.moves == [True, True, False]
    v, c = normal(2, 2, 3, seed=1), normal(2, 2, 3, seed=2)
    x, y = node._inputs[0].detach(), node._inputs[1].detach()
    product, square = node.push_all([v, None])
    torch.testing.assert_close(product, v @ y)
    torch.testing.assert_close(square, 2 * x * v)
    pulled = node.pull_all([None, c], [True, True], [None, None])
    torch.testing.assert_close(pulled[0], 2 * x * c)
    assert pulled[1] is None
    curved = node.curvature_all([None, c[0]])([v, None])
    torch.testing.assert_close(curved[0], 2 * c[0] * v)


def test_constant_results():
    node = node_of(torch.argmax, active(2, 3))
    assert node.moves == []
    assert node.curvature_all([]) is None


def test_columns_one_by_one_where_vmap_fails():
    class Branching(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, grad):
            factor = 1.0 if float(grad.detach().abs().sum()) >= 0 else 0.0
            return factor * grad * ctx.saved_tensors[0].cos()

    check(Branching.apply, active(2, 3), generic=True)


def test_complex_numbers():
    """The inner product is the real part; float rules must not be taken."""
    x = Active(torch.complex(normal(3), normal(3, seed=1)))
    node = node_of(operator.mul, x, torch.complex(normal(3, seed=2), normal(3, seed=3)))
    assert isinstance(node, GenericNode)
    v, c = (torch.complex(normal(2, 3, seed=i), normal(2, 3, seed=i + 1)) for i in (4, 6))
    left = (c.conj() * node.push([v])).real.sum()
    right = (node.pull(c, [True], [None])[0].conj() * v).real.sum()
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(node.push([v]), v * (node.result / x.value))


def test_bfloat16():
    x = Active(normal(4, 8).bfloat16())
    node = node_of(F.softmax, x, dim=-1)
    wide = node_of(F.softmax, Active(x.value.double()), dim=-1)
    v = normal(2, 4, 8, seed=1).bfloat16()
    found, expected = node.push([v]), wide.push([v.double()])
    assert float((found.double() - expected).norm() / expected.norm()) < 2**-5
