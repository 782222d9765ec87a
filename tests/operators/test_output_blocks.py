"""A factor from products: the positive part of every sample's block, or a reason against it."""

from __future__ import annotations

import pytest
import torch
from llqr_mf.operators import output_blocks
from llqr_mf.operators.closure_curvature import ClosureCurvature
from llqr_mf.operators.diagonal_curvature import DiagonalCurvature
from llqr_mf.operators.outer_curvature import OuterCurvature
from llqr_mf.operators.output_blocks import positive_part
from small_models import F64, normal
from torch import Tensor

N, D = 6, 4


def known_by_products(dense: Tensor, samples: int = N) -> ClosureCurvature:
    return ClosureCurvature(
        dense.new_empty(0),
        samples=samples,
        width=len(dense) // samples,
        product=lambda v: v.to(dense.dtype) @ dense,
    )


def blocks(*, definite: bool, seed: int = 0) -> Tensor:
    made = normal(N, D, D, seed=seed)
    return made @ made.mT if definite else made + made.mT


def clipped(block: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(block)
    return (vectors * eigenvalues.clamp(min=0)) @ vectors.mT


def close(a: Tensor, b: Tensor) -> None:
    # An eigendecomposition in float64 and sums of D terms.
    torch.testing.assert_close(a, b, rtol=0, atol=1e-13 * float(b.abs().max()))


def test_definite_blocks_are_kept() -> None:
    dense = torch.block_diag(*blocks(definite=True))
    made = positive_part(known_by_products(dense), "Q")
    assert isinstance(made, OuterCurvature) and made.rank == D
    close(made.to_dense(), dense)
    z = torch.eye(N * D, dtype=F64).reshape(N * D, D, N)
    factor = made.factor(z).mT
    close(factor @ factor.mT, dense)


def test_indefinite_blocks_are_clipped_with_a_word() -> None:
    given = blocks(definite=False)
    least = float(torch.linalg.eigvalsh(given).min())
    q = known_by_products(torch.block_diag(*given))
    with pytest.warns(UserWarning, match=rf"Q is indefinite: its least eigenvalue is {least:.3g}"):
        made = positive_part(q, "Q")
    close(made.to_dense(), torch.block_diag(*map(clipped, given)))
    kept = positive_part(q, "Q", clip=False)
    assert kept is q and kept.rank is None and kept.unfactored == "Q is indefinite"


def test_rank_is_the_largest_of_any_sample() -> None:
    v = normal(N, D, 2)
    v[0, :, 1] = 0
    dense = torch.block_diag(*(v @ v.mT))
    made = positive_part(known_by_products(dense), "Q")
    assert made.rank == 2
    close(made.to_dense(), dense)


def test_a_diagonal_costs_no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_blocks, "BLOCK_WIDTH", 0)
    h = normal(N * D).abs()
    made = positive_part(known_by_products(h.diag()), "Q")
    assert isinstance(made, DiagonalCurvature)
    close(made.to_dense(), h.diag())
    h[3] = -1
    with pytest.warns(UserWarning, match="least eigenvalue is -1"):
        made = positive_part(known_by_products(h.diag()), "Q")
    close(made.to_dense(), h.clamp(min=0).diag())


@pytest.mark.parametrize("first", range(N))
@pytest.mark.parametrize("second", range(N))
def test_any_two_samples_that_are_coupled_are_seen(first: int, second: int) -> None:
    if first == second:
        return
    dense = torch.block_diag(*blocks(definite=True))
    i, j = first * D + 1, second * D + 2
    dense[i, j] = dense[j, i] = 1e-6
    q = known_by_products(dense)
    assert positive_part(q, "the Hessian") is q
    assert q.unfactored == "the Hessian couples samples"
    with pytest.raises(NotImplementedError, match="the Hessian couples samples"):
        q.factor_columns(0, 1)


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_samples_that_are_coupled_in_a_ring_are_seen(shift: int) -> None:
    """As by `roll`: patterns of even and odd rows do not see two."""
    eye = torch.eye(N * D, dtype=F64)
    ring = eye.roll(shift * D, 0)
    q = known_by_products(4 * eye + ring + ring.mT)
    assert positive_part(q, "Q").rank is None


def test_blocks_that_are_too_large_are_left_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = torch.block_diag(*blocks(definite=True))
    for name, limit in (("BLOCK_WIDTH", D - 1), ("BLOCK_ENTRIES", N * D**2 - 1)):
        with monkeypatch.context() as patch:
            patch.setattr(output_blocks, name, limit)
            q = known_by_products(dense)
            assert positive_part(q, "Q") is q
            assert f"D = {D} outputs" in q.unfactored
    monkeypatch.setattr(output_blocks, "PASS_ENTRIES", N * D * 3)
    close(positive_part(known_by_products(dense), "Q").to_dense(), dense)


def test_what_is_not_finite_is_refused() -> None:
    dense = torch.block_diag(*blocks(definite=True))
    dense[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Q has entries that are NaN.*empirical_fisher"):
        positive_part(known_by_products(dense), "Q")


def test_zero_is_marked() -> None:
    zero = torch.zeros(N * D, N * D, dtype=F64)
    made = positive_part(known_by_products(zero), "Q")
    assert made.flat == "Q" and made.rank is not None
    close(made.to_dense() + 1, zero + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_factored_in_float32(dtype: torch.dtype) -> None:
    dense = torch.block_diag(*blocks(definite=True)).float()
    low = ClosureCurvature(
        torch.empty(0, dtype=dtype), samples=N, width=D, product=lambda v: v.float() @ dense
    )
    made = positive_part(low, "Q")
    assert made.dtype == dtype and made.vectors.dtype == torch.float32
    rows = normal(3, N * D, dtype=torch.float32)
    # Rounding of float32 sums.
    torch.testing.assert_close(
        made.times_rows(rows), rows @ dense, rtol=0, atol=1e-5 * float(dense.abs().max())
    )
