"""What a curvature pass sets and puts back."""

import pytest
import torch
import torch.nn.functional as F
from oracle import plain_weight_norm
from torch import nn

from llqr_mf.network.modes import curvature_pass

CPU = torch.device("cpu")


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, m, v: F.batch_norm(x, m, v, training=True),
        lambda x, m, v: F.batch_norm(x, m, v, None, None, True, 0.5),
        F.instance_norm,
        lambda x, m, v: F.instance_norm(x, running_mean=m, running_var=v, momentum=0.5),
        lambda x, m, v: torch.batch_norm(x, None, None, m, v, True, 0.1, 1e-5, False),
    ],
)
def test_running_statistics_stay_and_the_value_is_the_same(call):
    x, mean, variance = normal(4, 3, 5), torch.zeros(3).double(), torch.ones(3).double()
    with curvature_pass(CPU):
        inside = call(x, mean, variance)
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(variance, torch.ones(3))
    assert torch.equal(inside, call(x, mean, variance))
    assert not torch.equal(mean, torch.zeros(3))


def test_evaluation_uses_the_statistics():
    x, mean, variance = normal(4, 3), normal(3), normal(3).abs() + 1
    with curvature_pass(CPU):
        inside = F.batch_norm(x, mean, variance)
    assert torch.equal(inside, F.batch_norm(x, mean, variance))


def test_everything_is_put_back_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="on purpose"), curvature_pass(CPU):
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.mha.get_fastpath_enabled()  # nobody needs to touch it
        torch.rand(3)
        raise RuntimeError("on purpose")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_padded_positions_of_an_encoder_are_those_of_training():
    """The fast path would put zeros there."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).double().eval()
    x, padding = normal(2, 3, 4), torch.tensor([[False, False, True], [False, True, True]])
    expected = encoder(x.requires_grad_(), src_key_padding_mask=padding).detach()
    with curvature_pass(CPU), torch.no_grad():
        found = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dim", [0, 1])
def test_weight_norm_is_replaced_by_one_that_differentiates_twice(dim):
    v, g = normal(4, 3).requires_grad_(), normal(4, 3).norm(dim=1 - dim, keepdim=True)
    with curvature_pass(CPU):
        w = torch._weight_norm(v, g, dim)
    torch.testing.assert_close(w, plain_weight_norm(v, g, dim))


def test_torchs_own_second_backward_of_weight_norm():
    """Why it is replaced. Skips where torch has been mended, so that the substitute can go."""
    v, g = normal(4, 3).requires_grad_(), normal(4, 1).abs()

    def second(function):
        (first,) = torch.autograd.grad(function(v, g, 0).sin().sum(), v, create_graph=True)
        return torch.autograd.grad(first.sum(), v)[0]

    if torch.allclose(second(torch._weight_norm), second(plain_weight_norm)):
        pytest.skip(f"torch {torch.__version__} differentiates weight norm twice rightly")
    assert torch.__version__ >= "2.6"
