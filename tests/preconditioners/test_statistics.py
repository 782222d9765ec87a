"""Kronecker factors of a network's problem, against per-sample autograd."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from small_models import F64, assert_unchanged, mlp, network, normal, relative, seeded, state_of
from statistics_cases import EXACT, LABELS, MORE, Untied, problem_of, seed
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import llqr_mf as lq
from llqr_mf.output_sweep import terminal_factor
from llqr_mf.preconditioners import Kronecker
from llqr_mf.preconditioners.squared_gradients import squared_gradients as squares_of
from llqr_mf.preconditioners.statistics import layer_factors


def moments_by_hooks(model, inputs, L, sharing):
    """A (with a one at the end) and G of Linear, Conv2d and Embedding, from autograd alone."""
    model, met = copy.deepcopy(model), {}

    def keep(path):
        def hook(module, given, output):
            output.retain_grad()
            met[path] = (module, given[0].detach(), output)

        return hook

    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            module.register_forward_hook(keep(path))
    with sdpa_kernel(SDPBackend.MATH):
        output = model(inputs)
    n = len(output)
    G, A = {}, {}
    for column in L:
        output.backward(column.reshape(output.shape), retain_graph=True)
        for path, (module, _, y) in met.items():
            d = y.grad.clone()
            y.grad = None
            d = d.flatten(2).mT if isinstance(module, nn.Conv2d) else d.reshape(n, -1, d.shape[-1])
            if isinstance(module, nn.Embedding):
                d = d * (inputs != module.padding_idx).unsqueeze(-1)
            elif sharing == "reduce":
                d = d.sum(1, keepdim=True)
            outer = torch.einsum("nso,nsp->op", d, d) / d.shape[1]
            G[path] = G.get(path, 0) + outer
    for path, (module, x, _) in met.items():
        if isinstance(module, nn.Conv2d):
            x = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride).mT
        if isinstance(module, nn.Embedding):
            x = F.one_hot(x, module.num_embeddings) * (x != module.padding_idx).unsqueeze(-1)
        x = x.to(F64).reshape(n, -1, x.shape[-1])
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        if sharing == "reduce" and not isinstance(module, nn.Embedding):
            x = x.mean(1, keepdim=True)
        A[path] = torch.einsum("nsi,nsj->ij", x, x) / n
    return A, G


def columns_of(problem):
    """All columns of L, each of one sample alone: (r N, N D)."""
    factor = terminal_factor(problem)
    size = factor.rank * factor.samples
    return factor.factor(torch.eye(size, dtype=F64).reshape(size, factor.rank, factor.samples))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["mlp", "conv_eval", "resnet_eval", "pre_norm", "words"])
def test_factors_are_those_of_autograd(name, sharing):
    problem = problem_of(name)
    model, inputs, _ = MORE[name]() if name in MORE else network(name)
    A, G = moments_by_hooks(model, inputs, columns_of(problem), sharing)
    found = layer_factors(problem, sharing=sharing)
    A.pop("gate", None)  # One input: a vector.
    # The projections of attention are met by no hook.
    assert {f"{path}.weight" for path in A} <= set(found)
    for path in A:
        made, has_bias = found[f"{path}.weight"], f"{path}.bias" in problem.names
        size = len(A[path]) if made.site.bias else len(A[path]) - 1
        # A vocabulary side holds the diagonal; head of "words" has one, so its bias stays apart.
        for side, expected in ((made.inputs, A[path][:size, :size]), (made.outputs, G[path])):
            assert relative(side, expected if side.ndim == 2 else expected.diagonal()) < EXACT
        assert (made.site.bias is not None) == (has_bias and made.outputs.ndim == 2)


def test_a_kernel_on_its_own_side_gets_partial_traces():
    problem = problem_of("conv_eval")
    whole = layer_factors(problem, Kronecker(problem, biases="diagonal", kernels="matrix"))
    apart = layer_factors(problem, Kronecker(problem, biases="diagonal", kernels="tensor"))
    G, A = whole["conv2.weight"].sides
    A = A.reshape(2, 4, 2, 4)
    inner, kernel = torch.einsum("ikjk->ij", A), torch.einsum("ikil->kl", A)
    for made, expected in zip(
        apart["conv2.weight"].sides, (G, inner, kernel / kernel.trace()), strict=True
    ):
        assert relative(made, expected) < EXACT


def test_diagonal_sides_hold_the_diagonal():
    problem = problem_of("mlp")
    whole, thin = layer_factors(problem), layer_factors(problem, Kronecker(problem, max_side=4))
    for name, made in whole.items():
        for a, b in zip(thin[name].sides, made.sides, strict=True):
            torch.testing.assert_close(a, b if a.ndim == 2 else b.diagonal())
    assert [side.ndim for side in thin["4.weight"].sides] == [2, 1]


def test_a_tied_weight_has_the_partial_traces_of_the_sum():
    """The untied twin has the same factors for each use, and the tied weight their sum."""
    model, tokens, targets = network("tied")
    twin = lq.LQRProblem.from_network(
        lq.split(Untied(model)), tokens, targets, loss="cross_entropy", damping=0.0
    )
    uses = layer_factors(twin)
    parts = [uses[name].sides for name in ("embed.weight", "head.weight")]
    dense = sum(torch.kron(a.diag(), b) for a, b in parts).reshape(5, 4, 5, 4)
    rows, columns = layer_factors(problem_of("tied"))["embed.weight"].sides
    assert relative(rows, torch.einsum("iaia->i", dense)) < EXACT
    assert relative(columns, torch.einsum("iaib->ab", dense) / rows.sum()) < EXACT


@pytest.mark.parametrize("name", ["mlp", "conv_train"])
def test_drawn_factors_are_unbiased(name):
    """Within 4 standard errors of sum of every column of every sample, taken one by one."""
    problem = problem_of(name)
    model, inputs, _ = network(name)
    _, G = moments_by_hooks(model, inputs, columns_of(problem), "expand")
    path = "0" if name == "mlp" else "conv2"
    draws = torch.stack(
        [
            layer_factors(problem, samples=2, generator=seed(i))[f"{path}.weight"].outputs
            for i in range(300)
        ]
    )
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - G[path]).abs() <= 4 * error).all()


@pytest.mark.parametrize("name", ["conv_eval", "words"])
def test_chunks_change_nothing(name, monkeypatch):
    """One column at a time, and a few numbers of layer inputs at a time."""
    expected = layer_factors(problem_of(name))
    monkeypatch.setattr("llqr_mf.preconditioners.matrix_reads.ELEMENTS", 20)
    few = layer_factors(problem_of(name, columns=1))
    for each in expected:
        for a, b in zip(few[each].sides, expected[each].sides, strict=True):
            assert relative(a, b) < EXACT


# ---- bad input, and what must not move


def test_nothing_moves():
    model, inputs, targets = network("conv_train")
    problem = lq.LQRProblem.from_network(lq.split(model), inputs, targets, loss="cross_entropy")
    before = state_of(model)
    layer_factors(problem, samples=2)
    assert not squares_of(problem, samples=2, probes=2)["head.weight"].requires_grad
    assert_unchanged(model, before)


def test_messages():
    problem = problem_of("mlp")
    newton = problem_of("mlp", "newton")
    for call, message in [
        (lambda: layer_factors(newton), "known factor"),
        (lambda: squares_of(newton), "known factor"),
        (lambda: layer_factors(problem, sharing="mean"), "sharing is 'mean'"),
        (lambda: layer_factors(problem, samples=0), "samples is 0"),
        (lambda: squares_of(problem_of("tied"), probes=0), "probes is 0"),
        (lambda: layer_factors(problem_of("length_first"), sharing="reduce"), "sharing='expand'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# ---- a second opinion


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_curvlinops_agrees(kind, sharing):
    """`KFACLinearOperator` with fisher_type="type-2" is G (x) A in our scaling, mean for mean."""
    curvlinops = pytest.importorskip("curvlinops")
    if kind == "mlp":
        model, x = mlp(4, 5, 3), normal(4, 4, seed=1)
    else:
        layers = [nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)]
        model, x = seeded(lambda: nn.Sequential(*layers)), normal(4, 1, 4, 4, seed=1)
    problem = lq.LQRProblem.from_network(lq.split(model), x, LABELS, loss="cross_entropy")
    structure = Kronecker(problem)
    for name, made in layer_factors(problem, structure, sharing=sharing).items():
        for side, factor in enumerate(made.sides):
            structure.tensors[f"{name}.factor{side}"].copy_(factor)
    peer = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(x, LABELS)],
        fisher_type="type-2",
        kfac_approx=sharing,
        separate_weight_and_bias=False,
    )
    eye = torch.eye(problem.size, dtype=F64)
    assert relative(structure.to_dense(), peer @ eye) < EXACT
