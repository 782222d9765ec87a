"""On a CUDA device everything equals the CPU in float64, and nothing of the device is touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import llqr_mf as lq

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def mlp() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 4))
    return model, torch.randn(7, 6, dtype=torch.float64), torch.randint(0, 4, (7,))


def conv() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.GELU(),
        nn.Dropout(0.0),
        nn.Flatten(),
        nn.Linear(48, 4),
    )
    return model, torch.randn(5, 1, 6, 6, dtype=torch.float64), torch.randint(0, 4, (5,))


def transformer() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
    model = nn.Sequential(
        nn.Embedding(11, 8),
        nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
        nn.Linear(8, 11),
    )
    return model, torch.randint(0, 11, (3, 5)), torch.randint(0, 11, (3, 5))


@pytest.mark.parametrize("make", [mlp, conv, transformer])
@pytest.mark.parametrize("method", ["cg", "dual"])
def test_steps_equal_those_of_the_cpu(make: object, method: str) -> None:
    torch.manual_seed(0)
    model, x, y = make()  # type: ignore[operator]
    model = model.double()
    steps = []
    for device in ("cpu", "cuda"):
        model = model.to(device)
        problem = lq.LQRProblem.from_network(
            lq.split(model), x.to(device), y.to(device), loss="cross_entropy", damping=1e-2
        )
        solution = lq.solve(problem, method, rtol=1e-11)
        assert solution.status.ok and solution.step.device.type == device
        steps.append(solution.step.cpu())
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-8, atol=1e-10)


def test_the_random_state_of_the_device_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).cuda()
    x, y = torch.randn(6, 4, device="cuda"), torch.randint(0, 3, (6,), device="cuda")
    before = torch.cuda.get_rng_state()
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy")
    lq.solve(problem, "cg", rtol=1e-3)
    assert torch.equal(torch.cuda.get_rng_state(), before)
