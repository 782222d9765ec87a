"""Layers without curvature in a batch: M is 1/damping there, and other batches count in full."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from optimizer.cases import assert_same, backward, batch, model, snapshot, train, weights, wrap
from small_models import normal
from torch import nn

import llqr_mf as lq
from llqr_mf.errors import FactorizationError
from llqr_mf.optimizer import Recipe
from llqr_mf.optimizer.running_mean import _recovered
from llqr_mf.preconditioners import moments
from llqr_mf.preconditioners.spd import eigenvectors

DAMPING = 1e-3
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
STRUCTURES = ["ekronecker", "kronecker", "diagonal"]


class Experts(nn.Module):
    """The sign of the first input says which of two experts a sample goes to."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        chosen = (x[:, :1] > 0).to(x.dtype)
        mixed = chosen * torch.tanh(self.first(x)) + (1 - chosen) * torch.tanh(self.second(x))
        return self.head(mixed)


class Residual(nn.Module):
    """A branch that a gain of zero switches off, as ResNets and ViTs begin."""

    def __init__(self, width):
        super().__init__()
        self.branch, self.gain = nn.Linear(width, width), nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(x + self.gain * torch.tanh(self.branch(x)))


def zero_head(width):
    net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    nn.init.zeros_(net[2].weight)
    return net


def dead(width):
    net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))
    nn.init.constant_(net[0].bias, -100.0)
    return net


def switched_off(width):
    net = Residual(width)
    with torch.no_grad():
        net.gain.zero_()
    return net


NETS = {
    "zero head": (zero_head, ("0.weight", "0.bias")),
    "dead units": (dead, ("0.weight", "0.bias")),
    "gain of zero": (switched_off, ("branch.weight", "branch.bias")),
    "unused expert": (Experts, ("second.weight", "second.bias")),
}


def sided(width, sign, dtype, seed=3, n=16):
    """A batch that goes to one expert only."""
    x = normal(n, width, seed=seed, dtype=dtype)
    x[:, 0] = sign * x[:, 0].abs()
    return x, torch.arange(n) % 3


def on(structure, names, seed=5):
    """Rows that live on some parameters, and M times them there."""
    parts = {
        name: normal(2, *shape, seed=seed, dtype=structure.dtype) * (name in names)
        for name, shape in zip(structure.layout.names, structure.layout.shapes, strict=True)
    }
    made = structure.times_parts(parts)
    return {n: parts[n] for n in names}, {n: made[n] for n in names}


def roughly(dtype):
    """Some roundings of the precision that M is held in."""
    return 1e-12 if dtype == torch.float64 else 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
# LAPACK raises for NaN in small matrices, and gives NaN in large ones.
@pytest.mark.parametrize("width", [6, 64])
@pytest.mark.parametrize("case", NETS)
def test_training_goes_on_where_a_layer_has_no_curvature(case, width, structure, dtype):
    build, names = NETS[case]
    torch.manual_seed(0)
    net = build(width).to(dtype)
    optimizer = wrap(net, structure=structure, refresh_every=1, recipe=Recipe(damping=DAMPING))
    x, y = sided(width, 1, dtype)
    assert optimizer.refresh(x, y)
    parts, made = on(optimizer.structure, names)
    for name in names:
        scaled = made[name] * DAMPING
        torch.testing.assert_close(scaled, parts[name], rtol=0, atol=10 * roughly(dtype))
    for i in range(3):
        assert optimizer.refresh(*sided(width, -1 if i % 2 else 1, dtype, seed=i))
        backward(net, x, y)
        optimizer.step()
    assert optimizer.counts.refused == 0 and optimizer.counts.skipped == 0
    assert bool(weights(net).isfinite().all())
    assert all(bool(t.isfinite().all()) for t in optimizer.structure.tensors.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", ["ekronecker", "diagonal"])
@pytest.mark.parametrize("empty", ["first", "last"])
def test_a_batch_without_curvature_counts_as_zero_curvature(empty, structure, dtype):
    """M^{-1} - damping is half of what the other batch gives, in the bases of that batch."""
    torch.manual_seed(0)
    net, names = Experts(6).to(dtype), ("second.weight", "second.bias")
    recipe = Recipe(damping=DAMPING, samples=None)
    full, none = sided(6, -1, dtype), sided(6, 1, dtype)
    both, alone = (wrap(net, structure=structure, recipe=recipe) for _ in range(2))
    assert alone.refresh(*full)
    for given in [none, full] if empty == "first" else [full, none]:
        assert both.refresh(*given)
    key = "spectrum" if structure == "ekronecker" else "diagonal"
    held = [o.structure.tensors[f"second.weight.{key}"].double() for o in (both, alone)]
    mean, one = ((1 / t - DAMPING).clamp(min=0) for t in held)
    # c + damping was rounded; the largest of its entries is of order one.
    rounding = 10 * torch.finfo(both.structure.dtype).eps * float(one.max() + DAMPING)
    if structure == "ekronecker":
        for side in (0, 1):
            basis, own = (o.structure.tensors[f"second.weight.basis{side}"] for o in (both, alone))
            # Vectors of zero or equal curvature may turn among themselves.
            turned = own.mT.double() @ basis.double()
            assert float((turned.square().sum(0) - 1).abs().max()) < 1e-4
    rows, made = on(both.structure, names)
    inverse = alone.structure.inverse()
    wanted = {n: torch.zeros_like(p) for n, p in inverse.split(normal(2, inverse.shape[0])).items()}
    solved = {n: p.to(inverse.dtype) for n, p in {**wanted, **made}.items()}
    back = inverse.times_parts(solved)
    for name in names:
        # (M_alone^{-1} + damping) / 2 is M_both^{-1}.
        again = (back[name] + DAMPING * made[name]) / 2
        scale = float(rows[name].abs().max())
        limit = 1e-9 if dtype == torch.float64 else 2e-2
        assert float((again - rows[name]).abs().max()) < limit * scale
    torch.testing.assert_close(mean.max(), one.max() / 2, rtol=1e-3, atol=rounding)


def test_a_batch_without_curvature_leaves_the_bases():
    torch.manual_seed(0)
    net = Experts(6).double()
    optimizer = wrap(net, structure="ekronecker")
    assert optimizer.refresh(*sided(6, -1, torch.float64))
    held = optimizer.structure.clone().tensors
    assert optimizer.refresh(*sided(6, 1, torch.float64))
    for side in (0, 1):
        key = f"second.weight.basis{side}"
        assert torch.equal(optimizer.structure.tensors[key], held[key])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_inputs_of_any_scale_leave_m_finite_and_positive(structure, scale):
    """Squares that underflow count as no curvature, and large ones do not reach infinity."""
    net = model(torch.float32)
    optimizer = wrap(net, structure=structure, refresh_every=1, recipe=Recipe())
    x, y = batch(dtype=torch.float32)
    for _ in range(3):
        assert optimizer.refresh(x * scale, y), optimizer.counts.reason
    eye = torch.eye(optimizer.structure.shape[0])
    dense = optimizer.structure.times_rows(eye)
    assert bool(dense.isfinite().all()) and bool((dense.diagonal() > 0).all())


@pytest.mark.parametrize("how", ["raises", "is NaN", "is not orthogonal"])
def test_a_factorization_that_fails_refuses_the_refresh(how, monkeypatch):
    """And M is what it was, bit for bit."""
    net = model()
    optimizer = wrap(net, structure="ekronecker", refresh_every=1)
    train(net, optimizer, 2)
    real = torch.linalg.eigh

    def failing(matrix):
        values, vectors = real(matrix)
        if how == "raises":
            raise torch.linalg.LinAlgError("did not converge")
        return values, vectors * (float("nan") if how == "is NaN" else 2.0)

    before = snapshot(net, optimizer)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    made = optimizer.refresh(*batch(seed=4))
    monkeypatch.undo()
    assert not made and optimizer.counts.refused == 1
    before[-1]["schedule"]["due"] += 1
    assert_same(snapshot(net, optimizer), before)
    assert optimizer.refresh(*batch(seed=4))


@pytest.mark.parametrize("n", [3, 200])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_eigenvectors_of_what_is_not_finite_are_an_error(n, bad):
    matrix = torch.eye(n)
    matrix[0, n - 1] = matrix[n - 1, 0] = bad
    with pytest.raises(FactorizationError, match="'g' has no eigenvectors"):
        eigenvectors(matrix, "g")


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e308])
def test_eigenvectors_of_any_scale(scale):
    half = normal(5, 5, seed=1)
    gram = half @ half.mT
    gram = gram / gram.abs().max()
    vectors = eigenvectors(gram * scale, "g")
    turned = vectors.mT @ gram @ vectors
    # Orthogonal and diagonal to the rounding of a matrix of norm about one.
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(5).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(turned, turned.diagonal().diag(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scales", [(1e-200, 1e-160), (1e200, 1e160), (1e-200, 1e200)])
def test_damped_inverses_of_factors_whose_product_leaves_the_range(scales):
    """Scaling F_i by s_i, and lambda by their product, scales the inverses by 1 / s_i."""
    half = normal(4, 4, seed=2)
    factors = [half @ half.mT / 4, (half @ half.mT / 4)[:3, :3]]
    lam = 1e-3
    plain = moments.damped_inverses(factors, lam)
    product = scales[0] * scales[1]
    if not 0 < product < float("inf"):
        # The product itself is out of range: the shifts are then those of a product of one.
        scaled = moments.damped_inverses([f * s for f, s in zip(factors, scales, strict=True)], lam)
        assert all(bool(f.isfinite().all()) for f in scaled)
        return
    scaled = moments.damped_inverses(
        [f * s for f, s in zip(factors, scales, strict=True)], lam * product
    )
    for one, other, scale in zip(plain, scaled, scales, strict=True):
        torch.testing.assert_close(other * scale, one, rtol=1e-9, atol=0)


def test_a_fit_with_layers_without_curvature_is_finite():
    torch.manual_seed(0)
    net = zero_head(6).double()
    optimizer = wrap(net, structure="ekronecker", recipe=Recipe(learn="cg"), refresh_every=1)
    for i in range(3):
        optimizer.refresh(*sided(6, 1, torch.float64, seed=i))
        x, y = sided(6, 1, torch.float64, seed=i)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.counts.refused == 0 and bool(weights(net).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_of_the_damping_is_no_past(dtype):
    """1 / (1 / damping) - damping would be scaled up to the curvature of the next batch."""
    M = lq.EKronecker(model(dtype))
    site = M.sites[0]
    fresh = [torch.eye(n, dtype=dtype) for n in site.sides]
    for damping in torch.logspace(-6, 1, 50).tolist():
        M.spectrum(site).fill_(damping).reciprocal_()
        assert not any(bool(factor.any()) for factor in _recovered(M, site, fresh, damping))
        M.spectrum(site).fill_(1.5 * damping).reciprocal_()
        found = _recovered(M, site, fresh, damping)
        for factor, one in zip(found, fresh, strict=True):
            torch.testing.assert_close(factor, one, rtol=1e-5, atol=1e-6)
