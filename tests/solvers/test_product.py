"""Products in another dtype or on another device, and the memory and vectors of a solve."""

from __future__ import annotations

import pytest
import torch
from linear_operator.operators import DiagLinearOperator
from llqr_mf.operators.base import MatrixFreeOperator
from llqr_mf.solvers import dots, krylov
from llqr_mf.solvers.cg import cg
from llqr_mf.solvers.minres import minres
from llqr_mf.solvers.product import Product, Vectors
from llqr_mf.solvers.status import Code
from memory import LiveBytes
from torch import Tensor

ELSEWHERE = torch.device("cpu", 0)
"""Not equal to the device of CPU tensors, so that it stands for another device."""

PIECES = 2**21 * (torch.get_num_threads() + 1)
"""Two pieces in float64 per thread, and small change."""


class Diagonal(MatrixFreeOperator):
    """A diagonal matrix that writes its products into the buffer it is given."""

    symmetric = True

    def __init__(self, d: Tensor, *, columns: int | None = None) -> None:
        super().__init__(d, columns=columns)
        self.d = d

    def _sizes(self) -> tuple[int, int]:
        return len(self.d), len(self.d)

    def _rows(self, v: Tensor) -> Tensor:
        return v * self.d

    def _rows_into(self, v: Tensor, out: Tensor) -> Tensor:
        return torch.mul(v, self.d, out=out)


class InPlace:
    """The same as a callable with a buffer of its own."""

    def __init__(self, d: Tensor) -> None:
        self.d, self.out = d, torch.empty(1, len(d))

    def __call__(self, v: Tensor) -> Tensor:
        return torch.mul(v, self.d, out=self.out)


def vectors(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def block(k: int, n: int, dtype: torch.dtype, device: torch.device | None = None) -> Vectors:
    return Vectors((k, n), dtype, device or torch.device("cpu"))


# ---- one product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", [torch.device("cpu"), ELSEWHERE])
@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_product_of_tiny_and_zero_rows(
    dtype: torch.dtype,
    device: torch.device,
    in_pieces: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if in_pieces:
        monkeypatch.setattr(dots, "CPU_CHUNK", 16)
    d = vectors(40, dtype=torch.float32)
    v = vectors(3, 40, dtype=dtype) * torch.tensor([1.0, 1e-25, 0.0])[:, None].to(dtype)
    wanted = v.double() * d.double()
    for operator in (Diagonal(d), DiagLinearOperator(d), lambda v: v * d):
        product = Product(operator, torch.float32, torch.device("cpu"), block(3, 40, dtype, device))
        for square in (None, dots.row_dots(v, v)):
            out = product(v, square)
            assert out.dtype == dtype and out.device == v.device
            torch.testing.assert_close(out.double(), wanted, rtol=3e-7, atol=0)
            staged = dtype is torch.float64 or device is ELSEWHERE
            assert (out is product.result) == staged, "it is with the vectors"
        assert product.count == 2


def test_products_that_are_not_mixed_use_the_vectors_themselves() -> None:
    v = vectors(2, 10)
    seen = []
    product = Product(seen.append, torch.float64, v.device, block(2, 10, torch.float64))
    with pytest.raises(AttributeError):
        product(v)
    assert seen[0] is v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_partners_share_what_they_can_and_results_stay_apart(dtype: torch.dtype) -> None:
    v, d = vectors(1, 30, dtype=dtype), vectors(30, dtype=torch.float32)
    own = block(1, 30, dtype)
    first = Product(Diagonal(d), torch.float32, v.device, own)
    second = Product(Diagonal(2 * d), torch.float32, v.device, own, first)
    q, z = first(v), second(v)
    torch.testing.assert_close(z, 2 * q, rtol=1e-6, atol=0)
    assert (first.buffer is second.buffer) == (dtype is torch.float64)
    assert first.given is second.given


# ---- memory


@pytest.mark.parametrize("kind", ["in place", "matrix free"])
def test_float32_vectors_are_x_r_p_and_the_product(kind: str) -> None:
    n = 2**22
    d, b = torch.linspace(0.5, 1, n), torch.ones(n)
    operator = InPlace(d) if kind == "in place" else Diagonal(d)
    with LiveBytes() as memory:
        result = cg(operator, b, recurrence_dtype=torch.float32, rtol=1e-4)
    assert result.status.ok and result.iterations > 3
    made = 3 if kind == "in place" else 4
    # Two pieces in float64 are half of the 2^20 bytes that are left for the rest.
    assert memory.largest <= b.nbytes
    assert memory.peak <= made * b.nbytes + PIECES
    # The answer alone outlives the solve.
    assert sum(not held[0].expired() for held in memory.alive.values() if held[1] > 2**22) == 1


def test_a_callable_that_makes_its_products_holds_one_at_a_time() -> None:
    n = 2**21
    d, b = torch.linspace(0.5, 1, n), torch.ones(n)
    with LiveBytes() as memory:
        result = cg(
            lambda v: v * d,
            b,
            preconditioner=lambda r: r / d,
            recurrence_dtype=torch.float32,
            max_iterations=5,
            rtol=0.0,
        )
    assert result.products >= 2
    # x, r, p, A p and M r.
    assert memory.peak <= 5 * b.nbytes + PIECES


def test_minres_holds_one_product_at_a_time() -> None:
    n = 2**21
    d, b = torch.linspace(0.5, 1, n), torch.ones(n)
    with LiveBytes() as memory:
        minres(lambda v: v * d, b, recurrence_dtype=torch.float32, max_iterations=4, rtol=0.0)
    # x, r, two Lanczos vectors, z, two directions and A z.
    assert memory.peak <= 8 * b.nbytes + PIECES


def test_float64_vectors_of_a_float32_operator() -> None:
    n = 2**21
    d, b = torch.linspace(0.5, 1, n), torch.ones(n)
    inverse = Diagonal(1 / d)
    with LiveBytes() as memory:
        result = cg(Diagonal(d), b, preconditioner=inverse, rtol=1e-6)
    assert result.status.ok
    # x, r, p, A p and M r are twice as long; then what is multiplied, its product and the answer.
    assert memory.peak <= (5 * 2 + 3) * b.nbytes + PIECES


# ---- a start again


def test_an_undone_restart_gives_back_what_it_had() -> None:
    """Where vectors and products agree in dtype the answer is x itself until a run is undone."""
    d, b = torch.linspace(0.5, 1, 50, dtype=torch.float64), vectors(50)
    clean = cg(lambda v: v * d, b, rtol=1e-3)
    calls, seen = 0, []

    def drifting(v: Tensor) -> Tensor:
        """Off by a little at first, which asks for a restart; then by so much that it is worse."""
        nonlocal calls
        calls += 1
        if calls <= clean.iterations:
            return v * d * 1.01
        if calls == clean.iterations + 1:
            seen.append(v.clone())
            return v * d
        return v * d if calls == clean.iterations + 2 else v * d * 50

    result = cg(drifting, b, rtol=1e-3, max_iterations=clean.iterations + 1)
    assert result.codes[0] is not Code.CONVERGED
    assert torch.equal(result.x, seen[0][0])


# ---- vectors elsewhere


@pytest.mark.parametrize("shape", [(60,), (60, 3)])
@pytest.mark.parametrize("recurrence_dtype", [None, torch.float32])
@pytest.mark.parametrize("staged", [False, True])
def test_vectors_on_the_cpu_change_nothing(
    shape: tuple[int, ...],
    recurrence_dtype: torch.dtype | None,
    staged: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if staged:
        monkeypatch.setattr(krylov, "_device", lambda name: ELSEWHERE)
    b, d = vectors(*shape, dtype=torch.float32), torch.linspace(0.1, 1, 60)
    options = {
        "preconditioner": DiagLinearOperator(d**-0.5),
        "initial": 0.5 * b,
        "recurrence_dtype": recurrence_dtype,
        "rtol": 1e-5,
    }
    plain = cg(Diagonal(d), b, **options)
    moved = cg(Diagonal(d), b, vector_device="cpu", **options)
    assert plain.status.ok and torch.equal(plain.x, moved.x)
    assert torch.equal(plain.residual_norm, moved.residual_norm)
    assert plain.products == moved.products and moved.x.device == b.device


def test_vectors_on_no_device() -> None:
    with pytest.raises(ValueError, match="vector_device='nowhere'"):
        cg(lambda v: v, vectors(3), vector_device="nowhere")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("recurrence_dtype", [None, torch.float32])
def test_cuda_products_of_cpu_vectors(recurrence_dtype: torch.dtype | None) -> None:
    n = 2**20
    b, d = torch.ones(n, device="cuda"), torch.linspace(0.1, 1, n, device="cuda")
    plain = cg(Diagonal(d), b, recurrence_dtype=recurrence_dtype, rtol=1e-5)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    moved = cg(
        Diagonal(d),
        b,
        recurrence_dtype=recurrence_dtype,
        rtol=1e-5,
        vector_device="cpu",
        on_negative_curvature="direction",
    )
    assert moved.status.ok and moved.x.device == moved.residual_norm.device == b.device
    torch.testing.assert_close(moved.x, plain.x, rtol=1e-4, atol=1e-5)
    # Two buffers, or the answer, and what widening b in pieces takes.
    assert torch.cuda.max_memory_allocated() - before <= 2 * b.nbytes + 8 * n + 2**20
