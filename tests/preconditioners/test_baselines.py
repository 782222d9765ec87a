"""Preconditioners in closed form, against their formulas in dense algebra."""

import pytest
import torch
from small_models import F64, network, normal, relative, seeded
from statistics_cases import EXACT, MORE, problem_of, seed
from torch import nn

import llqr_mf as lq
from llqr_mf.preconditioners import Diagonal, EKronecker
from llqr_mf.preconditioners import baselines as base
from llqr_mf.preconditioners.probes import curvature_probes, gradient_probes
from llqr_mf.preconditioners.statistics import layer_factors

LAM = 0.03


def damped(name, damping=LAM):
    return problem_of(name).with_damping(damping)


def dense_curvature(problem):
    return problem.with_damping(0.0).hessian.to_dense()


def block(problem, matrix, site):
    """The rows and columns of one site, in its own order."""
    start, places = 0, {}
    for name, size in zip(problem.layout.names, problem.layout.sizes, strict=True):
        places[name] = torch.arange(start, start + size)
        start += size
    shapes = dict(zip(problem.layout.names, problem.layout.shapes, strict=True))
    index = site.gather({n: places[n].reshape(1, *shapes[n]) for n in site.parameters}).flatten()
    return matrix[index][:, index]


def kron(factors):
    made = torch.ones(1, 1, dtype=F64)
    for factor in factors:
        made = torch.kron(made, factor if factor.ndim == 2 else factor.diag())
    return made


def basis_of(structure, site):
    eyes = [torch.eye(n, dtype=F64) for n in site.sides]
    held = structure.bases(site)
    return kron([eye if basis is None else basis for eye, basis in zip(eyes, held, strict=True)])


# ---- from curvature


def test_scaled_identity_is_the_best_multiple():
    problem = damped("mlp")
    made, g = base.scaled_identity(problem), problem.gradient
    values = problem.objective(torch.stack([-s * (made @ g) for s in (0.999, 1.0, 1.001)], dim=1))
    assert values[1] < values[0] and values[1] < values[2]
    assert len({float(c) for c in made.tensors.values()}) == 1


def test_jacobi_inverts_the_diagonal():
    problem = damped("pre_norm")
    made = base.jacobi(problem, probes=1)
    assert isinstance(made, Diagonal)
    assert relative(made.flat(), 1 / problem.hessian.to_dense().diagonal()) < EXACT


def test_jacobi_takes_each_layers_own_damping():
    problem = damped("mlp", [0.1, 0.5, 0.2, 0.3, 0.4])
    expected = 1 / problem.hessian.to_dense().diagonal()
    assert relative(base.jacobi(problem).flat(), expected) < EXACT
    override = 1 / (dense_curvature(problem).diagonal() + 7)
    assert relative(base.jacobi(problem, damping=7.0).flat(), override) < EXACT


@pytest.mark.parametrize("options", [{}, {"biases": "diagonal"}, {"kernels": "tensor"}])
@pytest.mark.parametrize("name", ["mlp", "conv_eval", "words"])
def test_kfac_is_its_formula(name, options):
    """Each factor plus its share of the damping; vectors by the diagonal."""
    problem = damped(name)
    made = base.kfac(problem, **options)
    factors, H = layer_factors(problem, made), dense_curvature(problem)
    M = made.to_dense()
    for site in made.sites:
        if len(site.sides) == 1:
            expected = (1 / (block(problem, H, site).diagonal() + LAM)).diag()
        else:
            sides = [s if s.ndim == 2 else s.diag() for s in factors[site.name].sides]
            means = torch.stack([s.trace() / len(s) for s in sides])
            order = len(sides)
            # The shares multiply to lambda and are in the ratio of the mean eigenvalues.
            shares = LAM ** (1 / order) * means / means.prod() ** (1 / order)
            damped_sides = [
                s + e * torch.eye(len(s), dtype=F64) for s, e in zip(sides, shares, strict=True)
            ]
            expected = torch.linalg.inv(kron(damped_sides))
        assert relative(block(problem, M, site), expected) < EXACT


def test_kfac_shares_the_damping_by_pi():
    problem = damped("mlp")
    made = base.kfac(problem)
    G, A = layer_factors(problem)["4.weight"].sides
    pi = (A.trace() / len(A) / (G.trace() / len(G))).sqrt()
    left, right = made.factors(made.sites[-1])
    root = LAM**0.5
    assert relative(torch.linalg.inv(left), G + root / pi * torch.eye(len(G), dtype=F64)) < EXACT
    assert relative(torch.linalg.inv(right), A + root * pi * torch.eye(len(A), dtype=F64)) < EXACT


def test_kfac_is_exact_for_one_linear_layer_and_squared_error():
    """Its output's curvature is the same for every sample, so the block is G (x) A.

    The damping enters as lambda^(1/2) on each side: 1e-8 of unit-sized factors.
    """
    model, x = seeded(lambda: nn.Linear(4, 3)), normal(9, 4, seed=1)
    problem = lq.LQRProblem.from_network(
        lq.split(model), x, normal(9, 3, seed=2), loss="mse", damping=1e-16
    )
    exact = torch.linalg.solve(dense_curvature(problem), problem.gradient)
    assert relative(base.kfac(problem) @ problem.gradient, exact) < 1e-6
    assert relative(base.ekfac(problem) @ problem.gradient, exact) < 1e-8


@pytest.mark.parametrize(
    "name, options",
    [
        ("mlp", {}),
        ("conv_eval", {"kernels": "tensor"}),
        ("post_norm", {"biases": "diagonal"}),
        ("words", {"max_state": 2}),
    ],
)
def test_ekfac_is_the_diagonal_in_the_factors_eigenbases(name, options):
    problem = damped(name)
    made = base.ekfac(problem, probes=1, **options)
    assert isinstance(made, EKronecker)
    factors, H = layer_factors(problem, made), dense_curvature(problem)
    M = made.to_dense()
    for site in made.sites:
        V, own = basis_of(made, site), block(problem, H, site)
        diagonal = (V * (own @ V)).sum(0)
        expected = (V / (diagonal + LAM)) @ V.mT
        assert relative(block(problem, M, site), expected) < EXACT
        if site.name not in factors:
            continue
        for side, held in zip(factors[site.name].sides, made.bases(site), strict=True):
            if held is not None:
                turned = held.mT @ side @ held
                assert relative(turned.diagonal().diag(), turned) < 1e-12


def test_ekfac_is_no_worse_than_kfac():
    """In Frobenius norm the diagonal in a basis is the best that has that basis."""
    problem = damped("conv_eval")
    exact = base.ekfac(problem)
    factors, H = layer_factors(problem, exact), dense_curvature(problem)
    for name, each in factors.items():
        site = each.site
        own, V = block(problem, H, site), basis_of(exact, site)
        spectrum = (1 / exact.spectrum(site) - LAM).flatten()
        assert (own - (V * spectrum) @ V.mT).norm() <= (own - kron(each.sides)).norm(), name


def test_a_weight_without_factors_takes_the_partial_traces_of_its_block():
    """A grouped convolution, within 4 standard errors of the traces' square sums."""
    problem, count = damped("grouped"), 4000
    made = base.kfac(problem, kernels="matrix", biases="diagonal", probes=count, damping=1.0)
    site = made.sites[0]
    assert site.sides == (4, 9) and site.name not in layer_factors(problem, made)
    own = block(problem, dense_curvature(problem), site).reshape(4, 9, 4, 9)
    rows, columns = torch.einsum("aibi->ab", own), torch.einsum("aiaj->ij", own)
    sides = [rows, columns / rows.trace()]
    means = [s.trace() / len(s) for s in sides]
    expected = [
        torch.linalg.inv(s + m / (means[0] * means[1]).sqrt() * torch.eye(len(s), dtype=F64))
        for s, m in zip(sides, means, strict=True)
    ]
    # 4 (2 / 4000)^(1/2) is 0.09, of factors that the damping shrinks.
    for factor, right in zip(made.factors(site), expected, strict=True):
        assert relative(factor, right) < 0.09
    dense = base.ekfac(problem, probes=64).to_dense()
    assert float(torch.linalg.eigvalsh(dense)[0]) > 0


def test_bases_of_curvature_probes_diagonalise_the_partial_traces():
    problem = damped("mlp")
    rows = curvature_probes(problem, 50, seed(0))
    structure = EKronecker(problem)
    base.moment_bases(structure, rows)
    for site in structure.sites:
        x = site.gather(structure.split(rows))
        for side, held in enumerate(structure.bases(site)):
            moved = x.movedim(side + 1, 1).reshape(len(x), site.sides[side], -1)
            turned = held.mT @ torch.einsum("kai,kbi->ab", moved, moved) @ held
            assert relative(turned.diagonal().diag(), turned) < 1e-12


def test_kfac_bases_keep_what_m_is_on_average():
    """The spectrum is carried over: c I stays c I."""
    problem = damped("mlp")
    structure = EKronecker(problem)
    structure.scale_(3.0)
    base.kfac_bases(problem, structure, samples=3)
    assert relative(structure.to_dense(), 3 * torch.eye(problem.size, dtype=F64)) < EXACT


# ---- from gradients


@pytest.mark.parametrize("kernels", ["matrix", "tensor"])
def test_shampoo_is_its_formula(kernels):
    problem = damped("conv_eval")
    rows = gradient_probes(problem, 4)
    made = base.shampoo(rows, problem, damping=1e-3, kernels=kernels)
    parts = made.split(rows)
    for site in made.sites:
        x, order = site.gather(parts), len(site.sides)
        assert site.bias is None
        for side, factor in enumerate(made.factors(site)):
            moved = x.movedim(side + 1, 1).reshape(len(x), site.sides[side], -1)
            moment = torch.einsum("kai,kbi->ab", moved, moved) / 4
            if order == 1:
                moment = moment.diagonal().diag()
            shifted = moment + 1e-3 * torch.linalg.eigvalsh(moment)[-1] * torch.eye(
                len(moment), dtype=F64
            )
            root = factor if factor.ndim == 2 else factor.diag()
            inverse = torch.linalg.matrix_power(root, 2 * order)
            # A condition number of 1e3 of the moment.
            assert relative(inverse @ shifted, torch.eye(len(moment), dtype=F64)) < 1e-9


def test_a_parameter_without_entries():
    like = {"weight": torch.empty(3, 2, dtype=F64), "nothing": torch.empty(0, dtype=F64)}
    rows = normal(5, 6)
    for made in (base.shampoo(rows, like), base.soap(rows, like)):
        assert made.to_dense().shape == (6, 6)


def test_shampoos_exponent():
    problem = damped("mlp")
    rows = gradient_probes(problem, 4)
    whole = base.shampoo(rows, problem, exponent=0.5, biases="joined", damping=1e-2)
    half = base.shampoo(rows, problem, exponent=0.25, biases="joined", damping=1e-2)
    assert relative(half.to_dense() @ half.to_dense(), whole.to_dense()) < EXACT


@pytest.mark.parametrize("biases", ["diagonal", "joined"])
def test_soap_is_adam_in_shampoos_bases(biases):
    problem = damped("conv_eval")
    rows = gradient_probes(problem, 4)
    made = base.soap(rows, problem, damping=1e-4, biases=biases)
    parts, M = made.split(rows), made.to_dense()
    for site in made.sites:
        V, x = basis_of(made, site), site.gather(parts).flatten(1)
        second = (x @ V).square().mean(0)
        expected = (V / (second.sqrt() + 1e-4)) @ V.mT
        assert relative(block(problem, M, site), expected) < EXACT
    reference = EKronecker(problem, biases=biases)
    base.moment_bases(reference, rows)
    for site in made.sites:
        for a, b in zip(made.bases(site), reference.bases(site), strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


# ---- edges


def test_a_dead_layer_gets_the_damping_alone():
    model, x, y = network("mlp")
    with torch.no_grad():
        model[4].weight.zero_()
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy", damping=LAM)
    for made in (base.kfac(problem), base.ekfac(problem), base.jacobi(problem)):
        parts = problem.unflatten(made @ torch.ones(problem.size, dtype=F64))
        torch.testing.assert_close(parts["0.weight"], torch.full((5, 4), 1 / LAM, dtype=F64))
    zeros = torch.zeros(3, problem.size, dtype=F64)
    torch.testing.assert_close(
        base.shampoo(zeros, problem).to_dense(), torch.eye(problem.size, dtype=F64)
    )


@pytest.mark.parametrize("name", ["conv_train", "tied", "recurrent", "grouped", "similarity"])
@pytest.mark.parametrize("make", [base.kfac, base.ekfac, base.jacobi])
def test_positive_definite_in_float32_and_the_same_for_the_same_seed(name, make):
    model, inputs, targets = MORE[name]() if name in MORE else network(name)
    given = inputs.float() if inputs.is_floating_point() else inputs
    problem = lq.LQRProblem.from_network(
        lq.split(model.float()), given, targets, loss="cross_entropy", damping=1e-6
    )
    made = make(problem, samples=2, probes=8, generator=seed(4))
    again = make(problem, samples=2, probes=8, generator=seed(4))
    for key, tensor in made.tensors.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, again.tensors[key])
        if ".factor" in key and tensor.ndim == 2:
            assert float(torch.linalg.eigvalsh(tensor.double())[0]) > 0, key
        elif ".basis" not in key:
            assert bool((tensor > 0).all()), key


def test_messages():
    problem = damped("mlp")
    whole = problem.with_damping(torch.eye(problem.size, dtype=F64))
    rows = gradient_probes(problem, 2)
    flat = problem_of("mlp").with_damping(0.0)
    for call, message in [
        (lambda: base.kfac(whole), "give damping="),
        (lambda: base.jacobi(flat), "damping is 0.0"),
        (lambda: base.ekfac(problem, damping=float("nan")), "damping is nan"),
        (lambda: base.shampoo(rows, problem, damping=0.0), "damping is 0.0"),
        (lambda: base.soap(rows, problem, damping=-1.0), "damping is -1.0"),
        (lambda: base.kfac(damped("grouped"), probes=0), "probes is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert relative(base.kfac(whole, damping=LAM).to_dense(), base.kfac(problem).to_dense()) == 0


def test_curvlinops_agrees_on_ekfac():
    """`EKFACLinearOperator` with fisher_type="type-2": V diag(s) V' in our scaling."""
    curvlinops = pytest.importorskip("curvlinops")
    model, x, y = network("mlp")
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy", damping=1.0)
    inverse = base.ekfac(problem).inverse()
    peer = curvlinops.EKFACLinearOperator(
        *(model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)]),
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    eye = torch.eye(problem.size, dtype=F64)
    assert relative(inverse.to_dense() - eye, peer @ eye) < 1e-9
