"""What only Kronecker and EKronecker do; the rest is in test_structures.py."""

import pytest
import torch
from small_models import F64, mlp, normal
from structure_cases import LAYOUTS, case, dense, generator, places, randomise, site_places
from torch import nn
from torch.testing import assert_close

from llqr_mf.preconditioners import EKronecker, Kronecker
from llqr_mf.preconditioners.spd import clip_eigenvalues


def site_block(M, name):
    """The flat places of a site and its block of M."""
    (site,) = [site for site in M.sites if site.name == name]
    at = site_places(M, site)
    return site, at, M.to_dense()[at.unsqueeze(1), at]


# ---- Kronecker


def test_acts_as_G_V_A_with_the_bias_as_last_input():
    M = case("kronecker", "mlp")
    G, A = M.tensors["0.weight.factor0"], M.tensors["0.weight.factor1"]
    assert (G.shape, A.shape) == ((4, 4), (4, 4))
    weight, bias = normal(4, 3), normal(4, seed=1)
    parts = {
        n: torch.zeros(1, *s, dtype=F64)
        for n, s in zip(M.layout.names, M.layout.shapes, strict=True)
    }
    out = M.times_parts(parts | {"0.weight": weight[None], "0.bias": bias[None]})
    expected = G @ torch.cat([weight, bias[:, None]], dim=1) @ A
    assert_close(out["0.weight"][0], expected[:, :3])
    assert_close(out["0.bias"][0], expected[:, 3])


def test_vocabulary_and_large_sides_are_diagonal():
    M = Kronecker(LAYOUTS["transformer"](), max_side=11)
    shapes = {name: tuple(t.shape) for name, t in M.tensors.items()}
    assert shapes["embed.weight.factor0"] == (5,)
    assert shapes["embed.weight.factor1"] == (4, 4)
    assert shapes["attention.in_proj_weight.factor0"] == (12,)
    assert shapes["attention.in_proj_weight.factor1"] == (5, 5)  # with its bias
    assert shapes["norm.weight.diagonal"] == (4,)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_balance_keeps_the_matrix_and_evens_the_traces(layout):
    M = randomise(Kronecker(LAYOUTS[layout](), kernels="tensor"), generator())
    for i, tensor in enumerate(M.tensors.values()):
        tensor.mul_(10.0 ** (i % 5 - 2))
    before = M.to_dense()
    M.balance_()
    assert_close(M.to_dense(), before)
    for site in M.sites:
        means = [f.diagonal().mean() if f.ndim == 2 else f.mean() for f in M.factors(site)]
        if site.size:
            assert_close(torch.stack(means), means[0].expand(len(means)))


def test_blend_is_the_mean_of_balanced_factors_however_scale_is_shared():
    M, other = case("kronecker", "conv"), case("kronecker", "conv", seed=9)
    a, b = M.clone(), other.clone()
    for one in (a, b):
        one.balance_()
    expected = {name: 0.7 * t + 0.3 * b.tensors[name] for name, t in a.tensors.items()}
    other.tensors["conv1.weight.factor0"].mul_(64)
    other.tensors["conv1.weight.factor1"].div_(64)
    M.blend_(other, 0.3)
    for name, tensor in M.tensors.items():
        assert_close(tensor, expected[name])


def test_a_factor_that_is_not_positive_definite_is_named():
    M = case("kronecker", "mlp")
    M.tensors["2.weight.factor1"].neg_()
    for act in (M.inverse, M.logdet):
        with pytest.raises(ValueError, match=r"'2\.weight\.factor1' is not positive definite"):
            act()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_clipped_matrices_are_positive_definite_in_their_own_dtype(dtype):
    half = normal(30, 30)
    matrix = (half + half.mT).to(dtype)
    values, vectors = torch.linalg.eigh(matrix.double())
    clipped = clip_eigenvalues(matrix, 0.5)
    expected = (vectors * values.clamp(min=0.5)) @ vectors.mT
    assert_close(clipped, expected.to(dtype))
    # Without a floor, the least that rounding leaves.
    least = torch.linalg.eigvalsh(clip_eigenvalues(matrix, 0.0).double())[0]
    assert 0 < float(least) < 1e3 * torch.finfo(dtype).eps


def test_the_floor_is_relative_to_each_factor():
    M = case("kronecker", "mlp")
    M.tensors["0.weight.factor1"].mul_(1e6)
    (_, chart) = M.charts()
    means = [M.tensors[f"{i}.weight.factor1"].diagonal().mean() for i in (0, 2, 4)]
    chart.put(chart.project(-chart.get(), 0.1))
    for i, mean in zip((0, 2, 4), means, strict=True):
        factor = M.tensors[f"{i}.weight.factor1"]
        assert_close(factor, 0.1 * mean * torch.eye(len(factor), dtype=F64), atol=1e-9, rtol=1e-9)


# ---- EKronecker


def orthogonal(n, seed):
    return torch.linalg.qr(normal(n, n, seed=seed))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotation_is_orthogonal_and_comes_back(layout):
    M = case("ekronecker", layout)
    v = normal(2, M.shape[0])
    rotated = M.rotate(M.split(v))
    assert_close(sum(x.square().sum() for x in rotated.values()), v.square().sum())
    assert_close(M.join(M.rotate_back(rotated), v), v)
    for site in M.sites:
        assert rotated[site.name].shape == (2, *site.sides)


@pytest.mark.parametrize("structure", ["ekronecker", "ekronecker_tensor", "ekronecker_lean"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_set_bases_carries_the_diagonal_of_the_matrix_over(structure, layout):
    M = case(structure, layout)
    new = {
        s.name: [None if b is None else orthogonal(len(b), 3 + i) for i, b in enumerate(M.bases(s))]
        for s in M.sites
    }
    old = dense(M)
    M.set_bases(new)
    for site in M.sites:
        for held, given in zip(M.bases(site), new[site.name], strict=True):
            assert held is given is None or torch.equal(held, given)
        at = site_places(M, site)
        basis = torch.ones(1, 1, dtype=F64)
        for held, n in zip(M.bases(site), site.sides, strict=True):
            basis = torch.kron(basis, torch.eye(n, dtype=F64) if held is None else held)
        block = basis.mT @ old[at.unsqueeze(1), at] @ basis
        assert_close(M.spectrum(site).flatten(), block.diagonal())
        assert bool((M.spectrum(site) > 0).all())


def test_set_bases_with_none_keeps_what_is_there():
    M, before = case("ekronecker", "mlp"), case("ekronecker", "mlp")
    M.set_bases({"0.weight": [None, None]})
    assert torch.equal(M.to_dense(), before.to_dense())


def test_set_bases_refuses_before_anything_changes():
    M, before = case("ekronecker_lean", "mlp"), case("ekronecker_lean", "mlp")
    good = [orthogonal(4, 1), orthogonal(4, 2)]  # 3 inputs and the bias
    repeated = good[0].clone()
    repeated[:, 0] = repeated[:, 1]
    long = M.tensors["0.weight.basis1"] @ repeated.mT  # unit rows in the old basis, not columns
    bad = {
        "no weight": {"head.weight": good},
        "sides": {"0.weight": good[:1]},
        "shape": {"0.weight": [good[0], orthogonal(5, 2)]},
        "there is no '4.weight.basis1'": {"4.weight": [None, orthogonal(5, 2)]},
        "orthogonal": {"0.weight": [good[0], 1.01 * good[1]]},
        "'0.weight.basis0' must be orthogonal": {"0.weight": [repeated, good[1]]},
        "'0.weight.basis1' must be orthogonal": {"0.weight": [good[0], long]},
        "'0.weight.basis1' must be": {"0.weight": [good[0], good[1] * torch.nan]},
    }
    for match, given in bad.items():
        with pytest.raises(ValueError, match=match):
            M.set_bases({"0.weight": good} | given)
    assert all(torch.equal(t, before.tensors[n]) for n, t in M.tensors.items())


def test_blend_is_in_the_other_bases():
    M, other = case("ekronecker", "conv"), case("ekronecker", "conv", seed=9)
    carried = M.clone()
    carried.set_bases({s.name: other.bases(s) for s in M.sites})
    M.blend_(other, 0.3)
    assert_close(M.to_dense(), 0.7 * carried.to_dense() + 0.3 * other.to_dense())
    # With equal bases it is the mean itself, and those are not touched.
    again, half = M.clone(), M.clone()
    again.scale_(3.0)
    half.blend_(again, 0.5)
    assert_close(half.to_dense(), 2 * M.to_dense())


@pytest.mark.parametrize("max_state", [1, 2, 3, 5])
@pytest.mark.parametrize("biases", ["joined", "diagonal"])
def test_max_state_is_honoured(max_state, biases):
    layers = [
        nn.Linear(6, 6),
        nn.Linear(6, 8),
        nn.Linear(8, 12),
        nn.Linear(12, 4),
        nn.Conv2d(2, 3, 3),
    ]
    M = EKronecker(nn.Sequential(*layers, nn.Embedding(7, 5)), biases=biases, max_state=max_state)
    for site in M.sites:
        held = [t.numel() for n, t in M.tensors.items() if n.startswith(f"{site.name}.")]
        assert sum(held) <= max_state * site.size + 1
    square = [basis for basis in M.bases(M.sites[0]) if basis is not None]
    assert len(square) == {1: 0, 2: 1, 3: 2, 5: 2}[max_state]


def test_max_state_drops_the_larger_basis_first():
    M = EKronecker({"weight": torch.zeros(12, 6)}, max_state=3)
    assert [basis is None for basis in M.bases(M.sites[0])] == [True, False]


def test_a_site_has_its_parameters_in_rows():
    M = case("kronecker", "mlp")
    site, at, block = site_block(M, "2.weight")
    assert site.parameters == ("2.weight", "2.bias")
    assert at[4] == places(M)["2.bias"][0]
    assert_close(block, torch.kron(*M.factors(site)))


def test_models_of_one_module_have_bare_names():
    assert set(Kronecker(nn.Linear(2, 3)).tensors) == {"weight.factor0", "weight.factor1"}
    assert set(EKronecker(mlp(2, 3)).tensors) >= {"0.weight.basis1", "0.weight.spectrum"}


@pytest.mark.parametrize(
    "options", [{"biases": "join"}, {"kernels": "flat"}, {"max_side": -1}, {"max_state": 0.5}]
)
def test_unknown_options_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        EKronecker(mlp(4, 3), **options)
