"""Embedding and dropout."""

import pytest
import torch
import torch.nn.functional as F
from rule_cases import Active, active, check, check_gram, node_of, normal

from llqr_mf.rules.arithmetic import AffineNode
from llqr_mf.rules.embedding import EmbeddingNode

TOKENS = torch.tensor([[0, 1, 2], [3, 0, 0], [4, 4, 1], [2, 3, 0]])


@pytest.mark.parametrize("padding", [None, 0, -1])
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[0], TOKENS[0, 1], TOKENS.reshape(2, 2, 3)])
def test_embedding(tokens, padding):
    # Autograd leaves the padding row alone, which differences would move.
    node = check(F.embedding, tokens, active(5, 3), padding, differences=padding is None)
    assert isinstance(node, EmbeddingNode)


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:, 0], TOKENS.reshape(4, 3, 1)])
def test_gram(tokens, padding):
    args = tokens, active(5, 3), padding
    check_gram(node_of(F.embedding, *args), (F.embedding, args, {}), 4, 0)


def test_side_effects_are_refused():
    for options in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}):
        with pytest.raises(NotImplementedError, match=r"'here' uses max_norm.*switch them off"):
            node_of(F.embedding, TOKENS, active(5, 3), **options)


SHAPES = {F.dropout: (4, 3), F.dropout1d: (4, 3, 2), F.dropout2d: (4, 3, 2, 2)}


@pytest.mark.parametrize("function", SHAPES)
def test_dropout_draws_the_mask_that_the_call_would(function):
    x = normal(*SHAPES[function]).mT if function is F.dropout else normal(*SHAPES[function])
    torch.manual_seed(0)
    expected = function(x, 0.4)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    node = node_of(function, Active(x), 0.4)
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(node.result, expected)
    mask = expected / x
    v = normal(3, *x.shape, seed=1)
    torch.testing.assert_close(node.push([v]), v * mask)
    torch.testing.assert_close(node.pull(v, [True], [None])[0], v * mask)
    assert node.curvature(v[0]) is None


def test_dropout_that_is_off():
    assert isinstance(check(F.dropout, active(4, 3), 0.5, False), AffineNode)
    check(F.dropout, active(4, 3), p=0.5, training=False)
    check(F.dropout, active(4, 3), 0.0)
