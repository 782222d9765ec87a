"""States of structures: exact copies, and what would make M wrong is refused by name."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from small_models import mlp, normal
from structure_cases import MAKERS
from structure_cases import case as made

from llqr_mf.preconditioners import Diagonal, EKronecker, Kronecker, LowRank, Scalar, Sum

LEARNED = [kind for kind in MAKERS if kind != "identity"]


def through_a_file(x, **options):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, **options)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda M: pickle.loads(pickle.dumps(M)),
    "torch.save": lambda M: through_a_file(M, weights_only=False),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", MAKERS)
def test_copies_are_exact_and_independent(kind, how):
    M = made(kind, "mlp")
    other = COPIES[how](M)
    rows = normal(2, M.shape[0])
    wanted = M.times_rows(rows)
    assert torch.equal(other.times_rows(rows), wanted)
    assert {n: t.dtype for n, t in other.tensors.items()} == {
        n: t.dtype for n, t in M.tensors.items()
    }
    if M.tensors:
        # Parts of the copy are its own, and share their tensors with the whole.
        other.scale_(2.0)
        assert torch.equal(M.times_rows(rows), wanted)
        torch.testing.assert_close(other.times_rows(rows), 2 * wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_state_names_its_version_and_another_is_refused(kind):
    M = made(kind, "mlp")
    state = through_a_file(M.state_dict(), weights_only=True)
    assert state["version"] == 1
    M.load_state_dict(state)
    for other in (0, 2, None, "1"):
        with pytest.raises(ValueError, match=f"version {other}"):
            M.load_state_dict({**state, "version": other})
    with pytest.raises(ValueError, match="version list"):
        M.load_state_dict([state])


def refused(M, name, change, match):
    """A state with one tensor changed is refused, with that tensor's name; M stays."""
    state = copy.deepcopy(M.state_dict())
    state["tensors"][name] = change(state["tensors"][name])
    held = {n: t.clone() for n, t in M.tensors.items()}
    with pytest.raises(ValueError, match=match) as caught:
        M.load_state_dict(state)
    assert str(caught.value).startswith(f"'{name}'") and ": " in str(caught.value)
    assert all(torch.equal(t, held[n]) for n, t in M.tensors.items())


def spoilt(value):
    def change(t):
        t = t.clone()
        t.view(-1)[-1] = value
        return t

    return change


@pytest.mark.parametrize("kind", LEARNED)
def test_every_tensor_is_checked(kind):
    M = made(kind, "mlp")
    for name, tensor in M.tensors.items():
        for bad in (float("nan"), float("inf"), -float("inf")):
            refused(M, name, spoilt(bad), "NaN or infinity")
        refused(M, name, lambda t: t.new_zeros(*t.shape, 2), "shape")
        refused(M, name, lambda t: t.to(torch.bfloat16), "bfloat16")
        refused(M, name, lambda t: t.to(torch.int64), "int64")
        refused(M, name, lambda t: t.to(torch.complex128), "complex128")
        refused(M, name, lambda t: t.tolist(), "no dense tensor")
        matrix = any(f".{what}" in name for what in ("factor", "core", "basis"))
        # The rows of a low-rank basis span all parameters: see below.
        if matrix and tensor.ndim == 2 and not name.endswith(".basis"):
            refused(M, name, lambda t: t + 2 * t.norm() * torch.ones_like(t).triu(1), "is not")
        elif not matrix or tensor.ndim == 1:
            refused(M, name, lambda t: -t, "not positive|negative")
            refused(M, name, spoilt(0.0), "not positive")


@pytest.mark.parametrize("kind", ["kronecker", "low_rank", "direct_sum", "scaled", "sum"])
def test_an_indefinite_matrix_is_refused(kind):
    M = made(kind, "mlp")
    names = [n for n, t in M.tensors.items() if (".factor" in n or ".core" in n) and t.ndim == 2]
    for name in names:

        def change(t):
            values, vectors = torch.linalg.eigh(t)
            values[0] = -1e-3 * values[-1]
            return (vectors * values) @ vectors.mT

        refused(M, name, change, "not positive definite")
    assert names or kind == "scaled"


@pytest.mark.parametrize("kind", ["ekronecker", "scaled", "low_rank"])
def test_a_basis_that_is_not_orthonormal_is_refused(kind):
    M = made(kind, "mlp")
    names = [n for n in M.tensors if ".basis" in n]
    for name in names:
        if kind == "low_rank":
            # The rows span all parameters, so that the first of them is named.
            state = copy.deepcopy(M.state_dict())
            state["tensors"][name] = 2 * state["tensors"][name]
            with pytest.raises(ValueError, match="basis' is not orthogonal"):
                M.load_state_dict(state)
        else:
            refused(M, name, lambda t: 1.01 * t, "not orthogonal")
    assert names


@pytest.mark.parametrize("condition", [1e3, 1e7, 1e12])
@pytest.mark.parametrize("kind", [Kronecker, LowRank])
def test_what_rounding_makes_of_a_definite_matrix_is_accepted(kind, condition):
    """A float32 state of a narrow spectrum comes back, bit for bit, whatever its least value."""
    M = kind(mlp(6, 6, 3, dtype=torch.float32))
    name = "0.weight.factor0" if kind is Kronecker else M.core_name
    n = len(M.tensors[name])
    q = torch.linalg.qr(normal(n, n, seed=1))[0]
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), n, dtype=torch.float64)
    matrix = (q * values) @ q.mT
    M.tensors[name].copy_((matrix + matrix.mT) / 2)
    other = kind(mlp(6, 6, 3, dtype=torch.float32))
    other.load_state_dict(through_a_file(M.state_dict(), weights_only=True))
    assert torch.equal(other.tensors[name], M.tensors[name])


def test_narrower_states_load_and_wider_ones_do_not():
    narrow, wide = (Diagonal(mlp(4, 3, dtype=d)) for d in (torch.float32, torch.float64))
    wide.load_state_dict(narrow.state_dict())
    with pytest.raises(ValueError, match=r"'0\.weight\.diagonal' is torch\.float64"):
        narrow.load_state_dict(wide.state_dict())


@pytest.mark.parametrize("kind", [Scalar, Diagonal, Kronecker, EKronecker])
def test_fresh_structures_load_their_own_state(kind):
    M = kind(mlp(4, 3))
    M.load_state_dict(M.state_dict())


def test_a_weight_of_a_sum_that_is_not_positive_is_refused():
    like = mlp(4, 3)
    M = Sum([Diagonal(like), Kronecker(like)], weights=[0.5, 2.0])
    refused(M, "weights", lambda t: t * torch.tensor([1.0, -1.0]), "not positive")
