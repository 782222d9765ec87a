"""Norms and products of gradients far from one: float32 squares neither vanish nor overflow."""

from __future__ import annotations

import pytest
import torch
from optimizer.cases import batch, flat, model, sgd, weights, wrap
from small_models import normal

from llqr_mf.network import split
from llqr_mf.optimizer.graft import clip_kl, graft_to_layers
from llqr_mf.optimizer.subspace import _units
from llqr_mf.preconditioners.baselines import scaled_identity
from llqr_mf.problem import LQRProblem

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SCALES = [1e-30, 1e-25, 1e-3, 1.0, 1e18, 1e30]


def parts(dtype, scale, seed=0):
    shapes = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 4)}
    return {
        name: (normal(*shape, seed=seed + i) * scale).to(dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }


def layer_norms(tensors):
    wide = {name: t.double() for name, t in tensors.items()}
    return torch.stack([flat([wide["a.weight"], wide["a.bias"]]).norm(), wide["b.weight"].norm()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("of_m", [1e-6, 1.0, 1e3])
def test_graft_keeps_norms_of_any_size(scale, of_m, dtype):
    gradients, made = parts(dtype, scale), parts(dtype, scale * of_m, seed=9)
    wanted = layer_norms(gradients)
    graft_to_layers(gradients, made)
    # Two roundings of every entry.
    rtol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer_norms(made), wanted, rtol=rtol, atol=0)


@pytest.mark.parametrize("scales", [(1e-25, 1e25), (1e25, 1e-25)])
def test_graft_over_more_than_the_range_of_a_float32_factor(scales):
    gradients, made = parts(torch.float32, scales[0]), parts(torch.float32, scales[1], seed=9)
    wanted = layer_norms(gradients)
    graft_to_layers(gradients, made)
    torch.testing.assert_close(layer_norms(made), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_graft_in_float64_has_its_whole_range(scale):
    gradients, made = parts(torch.float64, scale), parts(torch.float64, 1.0, seed=9)
    unit = layer_norms(parts(torch.float64, 1.0))
    graft_to_layers(gradients, made)
    in_units = {name: t / scale for name, t in made.items()}
    torch.testing.assert_close(layer_norms(in_units), unit, rtol=1e-12, atol=0)


def test_graft_of_a_layer_of_zeros_is_zero_and_leaves_the_others():
    gradients, made = parts(torch.float32, 1.0), parts(torch.float32, 1.0, seed=9)
    for name in ("a.weight", "a.bias"):
        gradients[name].zero_()
    graft_to_layers(gradients, made)
    torch.testing.assert_close(layer_norms(made), layer_norms(gradients), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e18, 1e30])
def test_kl_clipping_of_any_size(scale):
    rates, limit = dict.fromkeys(parts(torch.float32, 1.0), 0.1), 1e-3
    gradients, made = parts(torch.float32, scale), parts(torch.float32, scale)
    before = {name: t.double() for name, t in made.items()}
    size = sum(float((g.double().square()).sum()) for g in gradients.values()) * 0.01
    clip_kl(gradients, made, rates, limit)
    factor = min(1.0, (limit / size) ** 0.5)
    for name, t in made.items():
        # Entries that the factor takes to the least normal number lose digits there.
        torch.testing.assert_close(t.double(), before[name] * factor, rtol=1e-6, atol=1e-44)


def test_kl_clipping_that_overflows_is_no_step_of_zero():
    gradients, made = parts(torch.float64, 1e200), parts(torch.float64, 1e200)
    clip_kl(gradients, made, dict.fromkeys(made, 0.1), 1e-3)
    assert all(bool(t.isnan().all()) for t in made.values())


@pytest.mark.parametrize("graft", ["layer", "kl"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-25, 1e18])
def test_a_step_scales_with_its_gradient(scale, dtype, graft):
    """With a rate of 1 / scale the step is that of the gradient times one."""
    moved = []
    for factor in (1.0, scale):
        net = model(dtype)
        # The bound on the KL divergence is on lr^2 g'Mg, which is the same for both.
        optimizer = wrap(net, sgd(net.parameters(), lr=0.1 / factor), graft=graft)
        assert optimizer.refresh(*batch(dtype=dtype))
        before = weights(net).double()
        for i, p in enumerate(net.parameters()):
            p.grad = (normal(*p.shape, seed=i) * factor).to(dtype)
        optimizer.step()
        assert optimizer.counts.skipped == 0
        moved.append(weights(net).double() - before)
    # Weights of order one round a step of order 0.1 and entries of the gradient differ by rounding.
    atol = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(moved[1], moved[0], rtol=20 * torch.finfo(dtype).eps, atol=atol)
    assert float(moved[0].norm()) > 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e25, 1e35])
def test_unit_rows_of_any_size(scale):
    rows = (normal(2, 7) * scale).float()
    made = _units(torch.cat([rows, torch.zeros(1, 7)]))
    wanted = rows.double() / rows.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(made[:2].double(), wanted, rtol=1e-6, atol=1e-7)
    assert not made[2].any()


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12])
def test_the_best_multiple_of_the_identity_is_free_of_the_gradients_size(scale):
    """Targets scale the gradient of a squared error and not its curvature."""
    net = model(torch.float32)
    with torch.no_grad():
        net[2].weight.zero_(), net[2].bias.zero_()
    x, _ = batch(dtype=torch.float32)
    multiples = []
    for factor in (1.0, scale):
        y = (normal(8, 3, seed=4) * factor).float()
        problem = LQRProblem.from_network(split(net), x, y, loss="mse", damping=1e-3)
        multiples.append(next(iter(scaled_identity(problem).tensors.values())))
    torch.testing.assert_close(multiples[1], multiples[0], rtol=1e-5, atol=0)
