"""Whether samples are apart is found out through complex values, too."""

import copy

import pytest
import torch
from oracle import dense_jacobian
from small_models import normal, seeded
from torch import nn

import llqr_mf as lq
from llqr_mf.output_sweep import samples_are_apart

X, Y = normal(6, 4), normal(6, 8)


def filtered(h):
    return torch.fft.irfft(torch.fft.rfft(h) * 1.5, n=8).tanh()


def rotated(h):
    pairs = torch.view_as_complex(h.reshape(-1, 4, 2))
    return torch.view_as_real(pairs * pairs.conj().exp()).flatten(1)


def across(h):
    return torch.fft.irfft2(torch.fft.rfft2(h, dim=(0, 1)) * 1.5, s=h.shape, dim=(0, 1)).roll(1, 0)


class Net(nn.Module):
    def __init__(self, through):
        super().__init__()
        self.body, self.through = nn.Linear(4, 8), through

    def forward(self, x):
        return self.through(self.body(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("through", [filtered, rotated, across])
def test_a_dual_step_through_complex_values(through, dtype):
    model = seeded(lambda: Net(through)).to(dtype)
    problem = lq.LQRProblem.from_network(
        lq.split(model), X.to(dtype), Y.to(dtype), loss="mse", damping=0.1
    )
    assert samples_are_apart(problem) == (through is not across)
    exactly = copy.deepcopy(model).double()
    J = dense_jacobian(exactly, X)
    r = (exactly(X) - Y).detach().reshape(-1)
    H = 2 / Y.numel() * J.mT @ J + 0.1 * torch.eye(J.shape[1], dtype=J.dtype)
    exact = -torch.linalg.solve(H, 2 / Y.numel() * J.mT @ r)
    # A residual of rtol, times the condition of H, which is under 100.
    rtol = 1e-10 if dtype == torch.float64 else 1e-4
    for method in ("dual", "auto"):
        step = lq.solve(problem, method=method, rtol=rtol).step
        assert (step - exact).norm() <= 100 * rtol * exact.norm()
