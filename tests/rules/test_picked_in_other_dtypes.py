"""Gram matrices of networks that put out another dtype than their weights'."""

import pytest
import torch
from oracle import dense_jacobian
from small_models import F64, normal, seeded
from torch import nn

import llqr_mf as lq
from llqr_mf.gram import closed_form_gram, cross_gram, gram_diagonal
from llqr_mf.output_sweep import required_factor

N = 12


class Cast(nn.Module):
    """Tokens, frequent and rare, and logits in a dtype of their own."""

    def __init__(self, dtype):
        super().__init__()
        self.embed, self.head, self.dtype = nn.Embedding(30, 6), nn.Linear(6, 3), dtype

    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens).mean(1))).to(self.dtype)


@pytest.mark.parametrize("weights, logits", [(F64, torch.float32), (torch.float32, F64)])
def test_the_gram_matrix_is_in_the_wider_dtype(weights, logits):
    """As exact as the narrower of the two allows: sums of a few dozen products."""
    model = seeded(lambda: Cast(logits), dtype=weights)
    tokens = (normal(N, 4, seed=1).abs() * 20).long() % 30
    problem = lq.LQRProblem.from_network(
        lq.split(model), tokens, torch.arange(N) % 3, loss="cross_entropy", damping=0.5
    )
    factor = required_factor(problem, "these tests")
    eye = torch.eye(3 * N, dtype=factor.dtype).reshape(3 * N, 3, N)
    jacobian = dense_jacobian(seeded(lambda: Cast(F64)), tokens)
    rows = factor.factor(eye).double().reshape(3 * N, -1) @ jacobian
    expected = rows @ rows.mT / 0.5
    found = closed_form_gram(problem)
    assert found.dtype == F64
    close = {"rtol": 1e-4, "atol": 1e-6 * float(expected.max())}
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(gram_diagonal(problem), expected.diagonal(), **close)
    chosen = torch.tensor([3, 20, 1])
    torch.testing.assert_close(cross_gram(problem, chosen), expected[:, chosen], **close)
    for method in ("dual", "auto"):
        assert lq.solve(problem, method, rtol=1e-5).residual_norm <= 1e-5
