"""Every structure on every layout, in a random state, against its dense matrix.

Sizes are below 150 and the condition numbers of random states below 1e3, so float64 algebra is
right to about 1e-12; tolerances are torch's for float64 (rtol 1e-7) unless they say otherwise.
"""

import io

import pytest
import torch
from small_models import F64, mlp, normal
from structure_cases import LAYOUTS, MAKERS, case, dense, generator, randomise
from torch.testing import assert_close

from llqr_mf.preconditioners import Diagonal, Kronecker, LowRank, Scaled, Sum

CASES = [(s, layout) for s in MAKERS for layout in LAYOUTS]
every = pytest.mark.parametrize(("structure", "layout"), CASES)
LEARNED = [(s, layout) for s, layout in CASES if s != "identity"]
learned = pytest.mark.parametrize(("structure", "layout"), LEARNED)


def rows(M, k=3, seed=1):
    return normal(k, M.shape[0], seed=seed)


# ---- the matrix


@every
def test_product_is_that_of_the_dense_matrix(structure, layout):
    M = case(structure, layout)
    expected, v = dense(M), rows(M)
    assert_close(M.to_dense(), expected)
    assert_close(M @ v.mT, expected @ v.mT)
    assert_close(M @ v[0], expected @ v[0])


@every
def test_symmetric_and_positive_definite(structure, layout):
    M = case(structure, layout).to_dense()
    assert_close(M, M.mT, rtol=1e-13, atol=1e-13)
    assert float(torch.linalg.eigvalsh(M)[0]) > 1e-3


@every
def test_starts_at_the_identity_unless_weighted(structure, layout):
    M = MAKERS[structure](LAYOUTS[layout]())
    scale = 2.5 if structure == "sum" else 1.0
    assert_close(M.to_dense(), scale * torch.eye(M.shape[0], dtype=F64))


@every
def test_inverse_logdet_and_diagonal(structure, layout):
    M = case(structure, layout)
    matrix = dense(M)
    assert_close(M.diagonal(), matrix.diagonal())
    assert_close(M.logdet(), torch.linalg.slogdet(matrix).logabsdet)
    if structure == "sum":
        with pytest.raises(NotImplementedError, match="cg"):
            M.inverse()
        return
    inverse = M.inverse()
    assert_close(inverse @ matrix, torch.eye(M.shape[0], dtype=F64))
    assert_close(inverse.logdet(), -M.logdet())
    if structure == "identity":
        return
    M.scale_(3.0)  # the inverse is a snapshot
    assert_close(inverse @ matrix, torch.eye(M.shape[0], dtype=F64))


@every
def test_parts_are_rows_by_name(structure, layout):
    M = case(structure, layout)
    v = rows(M)
    expected = M.split(M.times_rows(v))
    for way in (M.times_parts, M.precondition):
        made = way(M.split(v))
        assert made.keys() == expected.keys()
        for name, part in made.items():
            assert_close(part, expected[name], rtol=0, atol=0)


@every
def test_any_dtype_goes_in_and_comes_out(structure, layout):
    M = case(structure, layout)
    v = {name: part.bfloat16() for name, part in M.split(rows(M)).items()}
    expected = M.precondition({name: part.double() for name, part in v.items()})
    for name, part in M.precondition(v).items():
        assert part.dtype == torch.bfloat16
        assert_close(part, expected[name].bfloat16(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"\.to\("):
        M @ rows(M)[0].float()


@pytest.mark.parametrize("structure", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_have_float32_tensors(structure, dtype):
    wide = case(structure, "transformer")
    M = MAKERS[structure](LAYOUTS["transformer"]().to(dtype))
    assert {M.dtype, *(t.dtype for t in M.tensors.values())} == {torch.float32}
    for name, tensor in M.tensors.items():
        tensor.copy_(wide.tensors[name])
    v = rows(M).float()
    # Sums of some 100 terms of size one, each rounded to 6e-8.
    assert_close((M @ v.mT).double(), wide @ v.mT.double(), rtol=1e-5, atol=2e-5)
    if structure != "sum":
        back = M.inverse() @ (M @ v.mT)
        assert_close(back, v.mT, rtol=1e-4, atol=1e-3)
    assert_close(M.logdet().double(), wide.logdet(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("structure", MAKERS)
def test_algebra_of_linear_operator(structure):
    M = case(structure, "mlp")
    matrix, v = dense(M), rows(M).mT
    other = case("diagonal", "mlp", seed=3)
    assert_close((M + other) @ v, (matrix + dense(other)) @ v)
    assert_close((M @ other) @ v, matrix @ dense(other) @ v)
    assert_close((-2 * M) @ v, -2 * matrix @ v)
    assert_close(M.mT @ v, matrix @ v)
    assert_close(M[3:7, :5].to_dense(), matrix[3:7, :5])


@pytest.mark.parametrize("structure", MAKERS)
def test_product_is_differentiable_in_its_argument(structure):
    M = case(structure, "mixed")
    v, w = rows(M, 2).requires_grad_(), rows(M, 2, seed=5)
    (gradient,) = torch.autograd.grad((M.times_rows(v) * w).sum(), v)
    assert_close(gradient, M.times_rows(w))


def test_a_part_that_is_missing_or_unknown_is_named():
    M = Diagonal({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"\['b'\].*zeros"):
        M.precondition({"a": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match=r"\['c'\]"):
        M.precondition({n: torch.zeros(1, 2) for n in "abc"})


# ---- state


@every
def test_state_goes_through_a_file_bit_by_bit(structure, layout):
    M, other = case(structure, layout), MAKERS[structure](LAYOUTS[layout]())
    held = dict(other.tensors)
    file = io.BytesIO()
    torch.save(M.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for name, tensor in other.tensors.items():
        assert tensor is held[name]
        assert torch.equal(tensor, M.tensors[name])
    v = rows(M)
    assert torch.equal(other.times_rows(v), M.times_rows(v))
    assert M.memory_bytes == sum(8 * t.numel() for t in M.tensors.values())
    first = {name.rpartition(".")[0] for name in M.layout.names} | {""}
    for name in M.tensors:
        assert any(name.startswith(path) for path in first)


@learned
def test_a_state_that_does_not_fit_changes_nothing(structure, layout):
    M, other = case(structure, layout), case(structure, layout, seed=9)
    state = other.state_dict()
    name, tensor = list(state["tensors"].items())[-1]
    rest = {n: t for n, t in state["tensors"].items() if n != name}
    bad = {
        "structure": state | {"kind": "other"},
        "differ": state | {"tensors": rest},
        name: state | {"tensors": rest | {name: tensor.new_zeros(2, 7)}},
        "wider": state | {"tensors": rest | {name: tensor.to(torch.complex128)}},
        "fit": {"kind": M.kind},
    }
    before = M.clone()
    for match, given in bad.items():
        with pytest.raises(ValueError, match=match):
            M.load_state_dict(given)
    assert all(torch.equal(t, before.tensors[n]) for n, t in M.tensors.items())


@learned
def test_clone_and_assign_are_copies(structure, layout):
    M, other = case(structure, layout), case(structure, layout, seed=9)
    copy, before, target = M.clone(), M.to_dense(), other.to_dense()
    M.assign_(other)
    assert_close(copy.to_dense(), before, rtol=0, atol=0)
    for one in (copy, other):
        one.scale_(2.0)
    assert_close(M.to_dense(), target, rtol=0, atol=0)
    assert_close(copy.to_dense(), 2 * before)
    assert_close(other.to_dense(), 2 * target)


@learned
def test_scale(structure, layout):
    M = case(structure, layout)
    before = M.to_dense()
    M.scale_(0.25)
    assert_close(M.to_dense(), before / 4)
    for c in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive"):
            M.scale_(c)
    assert_close(M.to_dense(), before / 4)


@every
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_blend_stays_positive_definite_and_ends_at_the_other(structure, layout, weight):
    M, other = case(structure, layout), case(structure, layout, seed=9)
    target = other.to_dense()
    M.blend_(other, weight)
    assert float(torch.linalg.eigvalsh(M.to_dense())[0]) > 1e-3
    assert_close(other.to_dense(), target, rtol=0, atol=0)
    if weight == 1:
        assert_close(M.to_dense(), target)


@pytest.mark.parametrize("structure", ["scalar", "diagonal", "identity"])
def test_blend_of_linear_structures_is_the_mean(structure):
    M, other = case(structure, "mixed"), case(structure, "mixed", seed=9)
    expected = 0.7 * dense(M) + 0.3 * dense(other)
    M.blend_(other, 0.3)
    assert_close(M.to_dense(), expected)


@pytest.mark.parametrize("structure", MAKERS)
def test_blend_and_assign_refuse_what_is_unlike(structure):
    M, before = case(structure, "mlp"), case(structure, "mlp")
    shorter = MAKERS[structure](mlp(3, 4, 2))
    unlike = Diagonal(mlp(3, 4, 4, 2)) if structure != "diagonal" else Kronecker(mlp(3, 4, 4, 2))
    for other in (shorter, unlike):
        with pytest.raises(ValueError, match="options"):
            M.blend_(other, 0.5)
        with pytest.raises(ValueError, match="options"):
            M.assign_(other)
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="weight"):
            M.blend_(before, weight)
    assert all(torch.equal(t, before.tensors[n]) for n, t in M.tensors.items())


# ---- charts


def with_charts(test):
    return pytest.mark.parametrize(
        ("structure", "layout", "i"),
        [(s, x, i) for s, x in LEARNED for i in range(len(MAKERS[s](LAYOUTS[x]()).charts()))],
    )(test)


def coordinates(chart, seed=4):
    return torch.randn(len(chart.get()), dtype=F64, generator=generator(seed))


@with_charts
def test_chart_is_affine(structure, layout, i):
    M = case(structure, layout)
    chart, v = M.charts()[i], rows(M)
    phi, psi = coordinates(chart), coordinates(chart, 5)
    assert_close(chart.times(chart.get(), v) + chart.rest(v), M.times_rows(v))
    assert_close(chart.times(2 * phi - psi, v), 2 * chart.times(phi, v) - chart.times(psi, v))
    rest = chart.rest(v)
    chart.put(phi)
    assert_close(chart.rest(v), rest)
    # A core has coordinates on rows of zeros too, which `put` leaves out: they have no effect.
    assert_close(M.times_rows(v), chart.times(phi, v) + rest)


@with_charts
def test_pull_is_the_adjoint_of_times(structure, layout, i):
    M = case(structure, layout)
    chart = M.charts()[i]
    v, w, phi = rows(M), rows(M, seed=2), coordinates(chart)
    assert_close((w * chart.times(phi, v)).sum(), chart.pull(v, w) @ phi)


@with_charts
def test_put_of_get_changes_nothing_and_get_is_a_copy(structure, layout, i):
    M, before = case(structure, layout), case(structure, layout)
    chart = M.charts()[i]
    chart.put(chart.get())
    chart.get().zero_()
    assert all(torch.equal(t, before.tensors[n]) for n, t in M.tensors.items())


@with_charts
def test_project_makes_positive_definite_and_keeps_what_is(structure, layout, i):
    M = case(structure, layout)
    chart = M.charts()[i]
    assert torch.equal(chart.project(chart.get(), 1e-6), chart.get())
    phi = coordinates(chart)
    projected = chart.project(phi, 1e-2)
    assert_close(chart.project(projected, 1e-3), projected, rtol=1e-12, atol=1e-12)
    chart.put(projected)
    least = float(torch.linalg.eigvalsh(M.to_dense())[0])
    assert least > 1e-4
    if chart.elementwise:
        assert bool((projected > 0).all())
        assert torch.equal(projected[phi > 1], phi[phi > 1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("structure", ["scalar", "diagonal", "ekronecker"])
def test_the_floor_of_an_elementwise_chart_is_relative_to_each_tensor(structure, layout):
    M = case(structure, layout)
    positive = {name: t for name, t in M.tensors.items() if ".basis" not in name}
    for i, tensor in enumerate(positive.values()):
        tensor.mul_(10.0 ** (i % 5 - 2))
    least = {name: (0.1 * t.mean()).expand(t.shape) for name, t in positive.items()}
    (chart,) = M.charts()
    chart.put(chart.project(-chart.get(), 0.1))
    for name, tensor in positive.items():
        assert_close(tensor, least[name])


@with_charts
def test_mass_weighs_the_frobenius_norm(structure, layout, i):
    M = case(structure, layout)
    # Exact where the two diagonals beside a low rank or an inner structure are constant.
    for part in getattr(M, "structures", (M,)):
        if isinstance(part, LowRank):
            part.set_diagonal(torch.full_like(part.flat(), 0.7))
            part.set_basis(normal(part.rank, len(part.flat()), seed=3))
    if isinstance(M, Scaled):
        for tensor in M.diagonal_part.tensors.values():
            tensor.fill_(0.7)
    chart = M.charts()[i]
    phi = chart.project(coordinates(chart), 0.0)  # symmetric where a matrix is meant
    linear = chart.times(phi, torch.eye(M.shape[0], dtype=F64))
    assert_close(chart.mass() @ phi.square(), linear.square().sum())


def test_charts_of_a_sum_hold_its_other_terms():
    M = case("sum", "mlp")
    assert isinstance(M, Sum)
    assert len(M.charts()) == 3
    before = dense(M.structures[1])
    M.charts()[0].put(2 * M.charts()[0].get())
    assert_close(dense(M.structures[1]), before, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every
def test_equals_the_cpu_on_a_device(structure, layout):
    M = case(structure, layout)
    other = MAKERS[structure](LAYOUTS[layout]().cuda())
    other.load_state_dict(M.state_dict())
    v, w = rows(M), rows(M, seed=2)
    assert_close(other.times_rows(v.cuda()).cpu(), M.times_rows(v))
    assert_close(other.logdet().cpu(), M.logdet())
    assert_close(other.diagonal().cpu(), M.diagonal())
    if structure != "sum":
        assert_close(other.inverse().times_rows(v.cuda()).cpu(), M.inverse().times_rows(v))
    for chart, theirs in zip(M.charts(), other.charts(), strict=True):
        assert_close(theirs.pull(v.cuda(), w.cuda()).cpu(), chart.pull(v, w))
        phi = coordinates(chart)
        assert_close(theirs.project(phi.cuda(), 0.1).cpu(), chart.project(phi, 0.1))


def test_the_seeds_of_two_cases_differ():
    like = LAYOUTS["mlp"]()
    a, b = (randomise(Kronecker(like), generator(seed)) for seed in (0, 9))
    assert not torch.equal(dense(a), dense(b))
