"""The optimizer on a CUDA device does what it does on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from optimizer.cases import backward, batch, model, weights, wrap
from small_models import relative

from llqr_mf.optimizer import Recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def run(device, step, state=None):
    net = model().to(device)
    optimizer = wrap(net, step=step, refresh_every=2, recipe=Recipe(samples=None))
    if state is not None:
        optimizer.load_state_dict(state)
    for i in range(4):
        x, y = (t.to(device) for t in batch(seed=i, n=12))
        if step == "subspace":
            optimizer.step(x, y)
            continue
        if optimizer.refresh_due:
            optimizer.refresh(x, y)
        backward(net, x, y)
        optimizer.step()
    return weights(net).cpu(), optimizer


@pytest.mark.parametrize("step", ["base", "subspace"])
def test_steps_and_checkpoints_equal_those_of_the_cpu(step):
    ends = {device: run(device, step) for device in ("cpu", "cuda")}
    # Eigenvectors of close eigenvalues differ between the two; M hardly does.
    assert relative(ends["cuda"][0], ends["cpu"][0]) < 1e-6
    assert ends["cuda"][1].structure.device.type == "cuda"
    state = copy.deepcopy(ends["cuda"][1].state_dict())
    assert run("cuda", step, state)[1].counts.steps == 8
