"""The authors' recipe is what torch's own SGD does on the dense objective."""

from __future__ import annotations

import pytest
import torch
from fitting.dense_fit import problem
from small_models import mlp, normal, relative
from tqdm import tqdm

import llqr_mf as lq
from llqr_mf.fitting import fit
from llqr_mf.fitting.authors_ekronecker import AuthorsEKronecker
from llqr_mf.fitting.momentum_fit import Momentum, fit_by_momentum
from llqr_mf.fitting.objective import ProbeObjective
from llqr_mf.preconditioners import Diagonal, EKronecker, Kronecker


def shapes(one: lq.LQRProblem) -> dict[str, torch.Size]:
    return {name: part.shape for name, part in one.unflatten(one.gradient).items()}


def recipe(one, tensors, apply, *, lr=1e-3, clip=5.0, least=None):
    """The steps by torch.optim.SGD; tensors by name to their last values."""
    H, g = one.hessian.to_dense(), one.gradient
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    optimizer = torch.optim.SGD(leaves.values(), lr=lr, momentum=0.9)
    for _ in range(50):
        optimizer.zero_grad()
        x = apply(leaves, one.unflatten(g))
        (x @ H @ x / 2 - g @ x).backward()
        for leaf in leaves.values():
            leaf.grad *= min(1.0, clip / float(leaf.grad.norm()))
        optimizer.step()
        if least is not None:
            with torch.no_grad():
                for leaf in leaves.values():
                    leaf.clamp_(min=least)
    return {n: leaf.detach() for n, leaf in leaves.items()}


def diagonal(leaves, parts):
    return torch.cat([(leaves[f"{n}.diagonal"] * p).reshape(-1) for n, p in parts.items()])


def authors(leaves, parts):
    made = []
    for name, G in parts.items():
        D = leaves[f"{name}.d"]
        if G.ndim == 2:
            out, inner = leaves[f"{name}.q0"], leaves[f"{name}.q1"]
            G = out @ (D * (out.mT @ G @ inner)) @ inner.mT
        else:
            G = D * G
        made.append(G.reshape(-1))
    return torch.cat(made)


@pytest.mark.parametrize("clip", [5.0, 1e-3])
@pytest.mark.parametrize("apply, make", [(diagonal, Diagonal), (authors, AuthorsEKronecker)])
def test_the_steps_clip_and_average(apply, make, clip) -> None:
    one = problem(0)
    M = make(one)
    old = {n: t.clone() for n, t in M.tensors.items()}
    report = fit(M, [one, problem(1)], held_out=[], method="momentum", clip=clip)
    assert report.accepted and report.iterations == 50
    wanted = recipe(one, old, apply, clip=clip, least=1e-8 if make is Diagonal else None)
    for name, tensor in M.tensors.items():
        assert relative(tensor, 0.95 * old[name] + 0.05 * wanted[name]) < 1e-12
    g = one.gradient
    assert report.fit_objective == pytest.approx(float(one.objective(-(M @ g))), rel=1e-12)
    assert report.fit_objective_before == pytest.approx(float(one.objective(-g)), rel=1e-12)


def test_a_diagonal_is_clipped_at_every_step() -> None:
    one = problem(0, damping=10.0)  # momentum carries entries from 3 past zero
    M = Diagonal(one)
    M.scale_(3.0)
    old = {n: t.clone() for n, t in M.tensors.items()}
    fit(M, one, method="momentum", ema=0.0, learning_rate=5.0)
    wanted = recipe(one, old, diagonal, lr=5.0, least=1e-8)
    assert float(min(t.min() for t in wanted.values())) == 1e-8
    for name, tensor in M.tensors.items():
        assert relative(tensor, wanted[name]) < 1e-9


def test_matrices_stay_definite_here() -> None:
    one = problem(0, damping=10.0)
    M, A = Kronecker(one), AuthorsEKronecker(one)
    recipe = Momentum(learning_rate=1.0, ema=0.0)
    for each in (M, A):
        each.scale_(3.0)
        made = ProbeObjective([one], [one.gradient.unsqueeze(0)], each, tqdm(disable=True))
        fit_by_momentum(each, made, recipe=recipe, floor=1e-6)
    assert float(torch.linalg.eigvalsh(M.to_dense()).min()) > 0
    assert float(torch.linalg.eigvalsh(A.to_dense()).min()) < 0


def test_bases_are_not_learned_but_the_authors_are() -> None:
    one = problem(0)
    E, A = EKronecker(one), AuthorsEKronecker(one)
    for M in (E, A):
        assert fit(M, one, method="momentum").accepted
    eye = torch.eye(4, dtype=torch.float64)
    assert torch.equal(E.tensors["0.weight.basis0"], eye)
    assert not torch.equal(A.tensors["0.weight.q0"], eye)


def test_the_authors_structure() -> None:
    one = problem(0)
    M = AuthorsEKronecker(one)
    for i, tensor in enumerate(M.tensors.values()):
        tensor.copy_(normal(*tensor.shape, seed=i))
    v = normal(31, seed=9)
    wanted = authors(M.tensors, one.unflatten(v))
    assert relative(M @ v, wanted) < 1e-12
    dense = M.to_dense()
    assert relative(dense, dense.mT) < 1e-12
    assert float(torch.linalg.eigvalsh(dense).min()) < 0  # as its docstring warns
    with pytest.raises(NotImplementedError):
        M.inverse()
    with pytest.raises(NotImplementedError):
        M.logdet()


def test_a_vocabulary_has_no_basis() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(7, 3)

    names = set(AuthorsEKronecker(Tied()).tensors)
    assert names == {"embed.weight.q1", "embed.weight.d"}
    assert set(AuthorsEKronecker(mlp(2, 3)).tensors) == {
        *("0.weight.q0", "0.weight.q1", "0.weight.d", "0.bias.d"),
    }


def test_a_gradient_whose_square_overflows_is_clipped_and_not_dropped():
    """Targets scale a squared error's gradient g, by which its objective is scaled twice."""
    falls = []
    for scale in (1e10, 1e12):
        net = mlp(4, 5, 3, dtype=torch.float32)
        x, y = normal(8, 4, dtype=torch.float32), (normal(8, 3, seed=2) * scale).float()
        one = lq.LQRProblem.from_network(lq.split(net), x, y, loss="mse", damping=1e-2)
        report = fit(Diagonal(net), one, method="momentum", exact=False, learning_rate=1e-2)
        assert report.accepted
        falls.append(report.fit_objective / report.fit_objective_before)
    assert falls[0] > 1.1 and falls[1] == pytest.approx(falls[0], rel=1e-4)
