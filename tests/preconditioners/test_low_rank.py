"""What only LowRank does: a basis across layers."""

import pytest
import torch
from small_models import F64, mlp, normal
from structure_cases import case, dense
from torch.testing import assert_close

from llqr_mf.preconditioners import LowRank


def span(rows):
    """The projector on the span of rows."""
    basis = torch.linalg.svd(rows, full_matrices=False)[2]
    return basis.mT @ basis


def test_basis_is_orthonormal_and_spans_the_rows():
    M = LowRank(mlp(3, 4, 2), rank=5)
    rows = normal(3, M.shape[0])
    M.set_basis(rows)
    assert_close(M.basis() @ M.basis().mT, torch.diag(torch.tensor([1.0, 1, 1, 0, 0]).double()))
    assert_close(M.basis().mT @ M.basis(), span(rows))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_dependent_rows_are_dropped_and_small_ones_are_not(dtype):
    M = LowRank(mlp(3, 4, 2), rank=5)
    rows = normal(3, M.shape[0]).to(dtype)
    rows[1] *= 1e-4
    dependent = torch.cat([rows, rows[:1] - rows[2:], torch.zeros_like(rows[:1])])
    M.set_basis(dependent)
    assert int(M.basis().any(1).sum()) == 3
    # A row 1e-4 as long keeps 1e-4 times the digits of its dtype.
    tolerance = 1e5 * torch.finfo(dtype).eps
    expected = span(rows.double() / rows.double().norm(dim=1, keepdim=True))
    assert_close(M.basis().mT @ M.basis(), expected, rtol=0, atol=tolerance)


def test_set_basis_carries_the_core_over():
    M = case("low_rank", "mlp")
    before, held = dense(M), M.basis()
    wider = torch.cat([held[:3] + 0.1 * held[[1, 2, 0]], normal(1, M.shape[0], seed=7)])
    M.set_basis(wider)
    assert_close(M.to_dense(), before)
    root = M.flat().sqrt()
    M.set_basis(normal(4, M.shape[0], seed=8))
    inner = before / root / root.unsqueeze(1)
    assert_close(M.core, M.basis() @ inner @ M.basis().mT)
    M.set_basis(torch.zeros(0, M.shape[0]).double())
    assert_close(M.to_dense(), M.flat().diag())


def test_rows_of_zeros_count_for_nothing():
    M = case("low_rank", "mlp")  # three rows of four
    (chart,) = M.charts()
    chart.put(7 * torch.eye(4, dtype=F64).flatten() + 1)
    assert_close(M.core[3], torch.tensor([0.0, 0, 0, 1]).double(), rtol=0, atol=0)
    assert_close(M.logdet(), torch.linalg.slogdet(dense(M)).logabsdet)
    assert_close(M.inverse() @ dense(M), torch.eye(M.shape[0], dtype=F64))


def test_blend_of_equal_bases_is_the_mean_of_both():
    M = case("low_rank", "mlp")
    other = M.clone()
    (chart,) = other.charts()
    chart.put(4 * chart.get())
    expected = (dense(M) + dense(other)) / 2
    M.blend_(other, 0.5)
    assert_close(M.to_dense(), expected)


def test_bad_rows_diagonals_and_ranks_change_nothing():
    M, before = case("low_rank", "mlp"), case("low_rank", "mlp")
    n = M.shape[0]
    for rows in (normal(5, n), normal(2, n - 1), normal(n)):
        with pytest.raises(ValueError, match="rows have shape"):
            M.set_basis(rows)
    with pytest.raises(ValueError, match="NaN"):
        M.set_basis(normal(2, n) / 0)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        diagonal = torch.ones(n, dtype=F64)
        diagonal[3] = bad
        with pytest.raises(ValueError, match="positive and finite"):
            M.set_diagonal(diagonal)
    with pytest.raises(ValueError, match="flat step"):
        M.set_diagonal(torch.ones(n + 1, dtype=F64))
    with pytest.raises(ValueError, match="rank"):
        LowRank(mlp(3, 2), rank=0)
    assert all(torch.equal(t, before.tensors[name]) for name, t in M.tensors.items())
