"""A tensor is overwritten after a view of it was made: the view's readers see the new values."""

import pytest
import torch
from oracle import dense_jacobian
from small_models import normal
from torch import nn

import llqr_mf as lq

# Torch itself refuses what chunk, split and unbind would add.
VIEWS = {
    "view": lambda h: h.view(2, 2, -1),
    "view_as": lambda h: h.view_as(h),
    "reshape": lambda h: h.reshape(2, -1),
    "reshape_as": lambda h: h.reshape_as(h),
    "flatten": lambda h: h.flatten(),
    "unflatten": lambda h: h.unflatten(1, (2, -1)),
    "ravel": lambda h: h.ravel(),
    "transpose": lambda h: h.transpose(0, 1),
    "permute": lambda h: h.permute(1, 0),
    "movedim": lambda h: h.movedim(0, 1),
    "swapaxes": lambda h: h.swapaxes(0, 1),
    "t": lambda h: h.t(),
    "adjoint": lambda h: h.adjoint(),
    "squeeze": lambda h: h.squeeze(),
    "unsqueeze": lambda h: h.unsqueeze(0),
    "expand": lambda h: h.expand(3, -1, -1),
    "expand_as": lambda h: h.expand_as(h),
    "broadcast_to": lambda h: h.broadcast_to(3, 4, 6),
    "torch.broadcast_to": lambda h: torch.broadcast_to(h, (3, 4, 6)),
    "select": lambda h: h.select(1, 2),
    "narrow": lambda h: h.narrow(1, 0, 3),
    "unfold": lambda h: h.unfold(1, 3, 1),
    "diagonal": lambda h: h.diagonal(),
    "getitem": lambda h: h[:, 1:4],
    "tensor_split": lambda h: h.tensor_split(2, 1)[0],
    "detach": lambda h: h.detach(),
    "contiguous": lambda h: h.contiguous(),
    "positive": lambda h: h.positive(),
    "to": lambda h: h.to(torch.float64),
    "type_as": lambda h: h.type_as(h),
    "double": lambda h: h.double(),
    "cpu": lambda h: h.cpu(),
    "data": lambda h: h.data,
    "real": lambda h: h.real,
    "mT": lambda h: h.mT,
    "T": lambda h: h.T,
}


class Net(nn.Module):
    def __init__(self, view):
        super().__init__()
        self.linear, self.view = nn.Linear(3, 6), view

    def forward(self, x):
        h = self.linear(x)
        seen = self.view(h)
        h.mul_(0.5).sub_(1.0)
        return torch.stack([h.sin().sum(1), h.square().sum(1), seen.square().sum().expand(4)], 1)


@pytest.mark.parametrize("name", VIEWS)
def test_readers_of_a_view_see_what_was_written(name):
    torch.manual_seed(0)
    model, x = Net(VIEWS[name]).double(), normal(4, 3)
    problem = lq.LQRProblem.from_network(lq.split(model), x, normal(4, 3, seed=1), loss="mse")
    assert torch.allclose(problem.origin.outputs, model(x), rtol=1e-14)
    J = dense_jacobian(model, x)
    assert torch.allclose(problem.output_jacobian.to_dense(), J, rtol=1e-12, atol=1e-14)
