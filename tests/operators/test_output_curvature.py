"""Q_T operators against matrices written out by hand."""

import pytest
import torch
from linear_operator import LinearOperator
from llqr_mf.operators.closure_curvature import ClosureCurvature
from llqr_mf.operators.diagonal_curvature import DiagonalCurvature
from llqr_mf.operators.outer_curvature import OuterCurvature
from llqr_mf.operators.softmax_curvature import SoftmaxCurvature
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

F64 = torch.float64
EPS = torch.finfo(F64).eps
N, P, C = 3, 2, 4


def random(*shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(sum(shape)))


def softmax_dense(logits, weights, class_dim=-1):
    """The blocks w (diag p - p p'), entry by entry of the flattened output."""
    place = torch.arange(logits.numel()).reshape(logits.shape).movedim(class_dim, -1)
    p = logits.movedim(class_dim, -1).softmax(-1)
    q = torch.zeros(logits.numel(), logits.numel(), dtype=logits.dtype)
    for w, row, at in zip(
        weights.flatten(), p.flatten(0, -2), place.flatten(0, -2).tolist(), strict=True
    ):
        for i, a in enumerate(at):
            for j, b in enumerate(at):
                q[a, b] = w * (row[i] * (i == j) - row[i] * row[j])
    return q


def plain():
    logits, w = random(N, C), torch.tensor([0.5, 0.0, 1.5], dtype=F64)
    return SoftmaxCurvature.from_logits(logits, w), softmax_dense(logits, w)


def sequence():
    logits, w = random(N, P, C), random(N, P).abs()
    return SoftmaxCurvature.from_logits(logits, w), softmax_dense(logits, w)


def sequence_class_first():
    logits, w = random(N, C, P), random(N, P).abs()
    return (
        SoftmaxCurvature.from_logits(logits, w, class_dim=1),
        softmax_dense(logits, w, class_dim=1),
    )


def image_class_first():
    logits, w = random(N, C, 2, 3), random(N, 2, 3).abs()
    return (
        SoftmaxCurvature.from_logits(logits, w, class_dim=1),
        softmax_dense(logits, w, class_dim=1),
    )


def diagonal():
    h = random(N, P, C).abs()
    return DiagonalCurvature(h.new_empty(0), diagonal=h), torch.diag(h.flatten())


def identity():
    h = torch.tensor(0.25, dtype=F64).expand(N, P, C)
    return DiagonalCurvature(h.new_empty(0), diagonal=h), 0.25 * torch.eye(N * P * C, dtype=F64)


def outer():
    v = random(N, C, 2)
    return (
        OuterCurvature(v.new_empty(0), vectors=v),
        torch.block_diag(*[x @ x.mT for x in v]),
    )


def closure():
    logits, w = random(N, P, C), random(N, P).abs()
    return (
        ClosureCurvature.from_function(lambda x: (w * x.logsumexp(-1)).sum(), logits),
        softmax_dense(logits, w),
    )


FACTORED = [
    plain,
    sequence,
    sequence_class_first,
    image_class_first,
    diagonal,
    identity,
    outer,
]
CASES = [*FACTORED, closure]


def close(a, b, *, size=N * P * C):
    """Equal up to the rounding of sums of `size` terms of the size of b's largest."""
    scale = max(float(b.abs().max()), torch.finfo(b.dtype).tiny)
    torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(b.dtype).eps * size * scale)


@pytest.mark.parametrize("case", CASES)
def test_products_are_the_matrix(case):
    q, dense = case()
    assert isinstance(q, LinearOperator)
    assert q.shape == dense.shape == (q.samples * q.width,) * 2
    close(q.to_dense(), dense)
    close(q.diagonal(), dense.diagonal())
    v = random(len(dense), 5)
    close(q @ v, dense @ v)
    close(q.mT @ v[:, 0], dense @ v[:, 0])


@pytest.mark.parametrize("case", CASES)
def test_scaled(case):
    q, dense = case()
    scaled = q.scaled(0.3)
    assert type(scaled) is type(q) and scaled.rank == q.rank
    close(scaled.to_dense(), 0.3 * dense)
    close(q.to_dense(), dense)
    for c in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="finite c > 0"):
            q.scaled(c)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("case", FACTORED)
def test_factor(case, scale):
    q, dense = case()
    if scale is not None:
        q, dense = q.scaled(scale), scale * dense
    r, n, d = q.rank, q.samples, q.width
    z = torch.eye(r * n, dtype=F64).reshape(r * n, r, n)
    factor = q.factor(z).mT
    close(factor @ factor.mT, dense)

    v = random(5, n * d)
    close(q.factor_t(v).reshape(5, -1), v @ factor)
    close(q.factor(q.factor_t(v)), v @ dense)
    assert q.factor_t(v).shape == (5, r, n)

    columns = q.factor_columns(0, r)
    assert columns.shape == (r, n, d)
    blocks = torch.einsum("rnd,rne->nde", columns, columns)
    close(torch.block_diag(*blocks), dense)
    # Column j of sample m alone is the unit vector z[j, m].
    own = factor.reshape(n, d, r, n)
    for m in range(n):
        torch.testing.assert_close(columns[:, m], own[m, :, :, m].mT, rtol=0, atol=0)
    torch.testing.assert_close(q.factor_columns(1, r), columns[1:], rtol=0, atol=0)
    assert q.factor_columns(r, r).shape == (0, n, d)
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        q.factor_columns(0, r + 1)


def test_closure_has_no_factor():
    q, _ = closure()
    assert q.rank is None
    v = torch.zeros(1, N * P * C, dtype=F64)
    for call in (lambda: q.factor(v), lambda: q.factor_t(v), lambda: q.factor_columns(0, 1)):
        with pytest.raises(NotImplementedError, match=r"no known factor.*only products"):
            call()


@pytest.mark.parametrize("case", CASES)
def test_transforms_and_gradients(case):
    q, dense = case()
    v, dv = random(len(dense)), random(len(dense), 1)[:, 0]
    out, tangent = torch.func.jvp(lambda x: q @ x, (v,), (dv,))
    close(out, dense @ v)
    close(tangent, dense @ dv)
    close(torch.func.vmap(lambda x: q @ x)(torch.stack([v, dv])), torch.stack([v, dv]) @ dense)
    close(torch.func.hessian(lambda x: x @ (q @ x))(v), 2 * dense)
    leaf = v.clone().requires_grad_()
    close(torch.autograd.grad((q @ leaf) @ dv, leaf)[0], dense @ dv)
    assert not (q @ v).requires_grad
    if q.rank is not None:
        pulled = torch.func.grad(lambda x: q.factor(q.factor_t(x[None])).squeeze(0) @ dv)(v)
        close(pulled, dense @ dv)


@pytest.mark.parametrize("case", CASES)
def test_passes_of_few_columns_agree(case):
    q, dense = case()
    q = type(q)(q._proto, **{**q._kwargs, "columns": 2})
    v = random(len(dense), 5)
    close(q @ v, dense @ v)


@pytest.mark.parametrize("case", FACTORED)
def test_bfloat16_vectors_are_multiplied_in_float32(case):
    q, dense = case()
    parts = {
        name: part.float() if isinstance(part, torch.Tensor) else part
        for name, part in q._kwargs.items()
    }
    low = type(q)(torch.empty(0, dtype=torch.bfloat16), **parts)
    v = random(len(dense), 2).bfloat16()
    out = low @ v
    assert out.dtype == low.dtype == torch.bfloat16
    # One rounding of the result to bfloat16 and none in between.
    torch.testing.assert_close(
        out.double(),
        dense @ v.double(),
        rtol=torch.finfo(torch.bfloat16).eps,
        atol=1e-5 * float(dense.abs().max()),
    )
    assert low.factor_t(v.mT).dtype == torch.bfloat16
    assert low.factor_columns(0, 1).dtype == torch.bfloat16


@pytest.mark.parametrize("class_dim", [-1, 1])
def test_softmax_of_bfloat16_logits_is_taken_in_float32(class_dim):
    logits, w = random(N, C, C).bfloat16(), torch.full((N, C), 0.1)
    low = SoftmaxCurvature.from_logits(logits, w, class_dim=class_dim)
    wide = SoftmaxCurvature.from_logits(logits.float(), w, class_dim=class_dim)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.probabilities, wide.probabilities, rtol=0, atol=0)
    torch.testing.assert_close(low.weights, wide.weights, rtol=0, atol=0)


def test_closure_of_a_function_linear_in_the_outputs_is_zero():
    q = ClosureCurvature.from_function(lambda x: 3 * x.mean(), random(N, C))
    assert not bool(q.to_dense().any())


def test_closure_differentiates_in_float32_or_better():
    seen = []

    def function(x):
        seen.append(x.dtype)
        return x.exp().mean()

    outputs = random(N, C).bfloat16()
    q = ClosureCurvature.from_function(function, outputs)
    assert set(seen) == {torch.float32}
    v = torch.ones(N * C, dtype=torch.bfloat16)
    torch.testing.assert_close(
        (q @ v).float(), outputs.float().exp().flatten() / (N * C), rtol=2**-8, atol=0
    )


def test_confident_softmax_keeps_relative_accuracy():
    """Entries of 1e-9 and below come with float32's own relative error, not its absolute one."""
    logits = torch.tensor([[0.0, 20.0, -3.0, 5.0], [30.0, 0.0, 0.0, 9.0]])
    w = torch.tensor([0.3, 0.7])
    q = SoftmaxCurvature.from_logits(logits, w)
    exact = SoftmaxCurvature.from_logits(logits.double(), w.double())
    # Softmax itself is accurate to a few eps times the spread of the logits (up to 33).
    rtol = 64 * torch.finfo(torch.float32).eps
    dense = exact.to_dense()
    torch.testing.assert_close(q.to_dense().double(), dense, rtol=rtol, atol=0)
    z = torch.eye(8).reshape(8, 4, 2)
    torch.testing.assert_close(q.factor(z).double(), exact.factor(z.double()), rtol=rtol, atol=0)
    # The double one is itself right: 1 - p as the sum of the other probabilities.
    p = logits[1].double().softmax(-1)
    tail = p[1:].sum()
    torch.testing.assert_close(dense[4, 4] / w[1].double(), p[0] * tail, rtol=1e-12, atol=0)
    # A constant shift of the logits costs nothing at all.
    assert not bool((q @ torch.full((8,), 1e6)).any())


def test_extreme_logits_are_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [float("-inf"), 1.0, 2.0]])
    q = SoftmaxCurvature.from_logits(logits, torch.ones(3))
    assert bool(q.to_dense().isfinite().all())
    assert bool(q.factor_columns(0, 3).isfinite().all())
    assert not bool(q.to_dense()[:3].any())
    assert not bool(q.to_dense()[6].any())


class Allocations(TorchDispatchMode):
    """Counts the bytes of all new storages, freed or not: an upper bound of the peak."""

    def __init__(self):
        super().__init__()
        self.seen, self.total, self.largest = [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            self.is_new(tensor)
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if self.is_new(tensor):
                size = tensor.untyped_storage().nbytes()
                self.total += size
                self.largest = max(self.largest, size)
        return out

    def is_new(self, tensor):
        if not isinstance(tensor, torch.Tensor):
            return False
        storage = tensor.untyped_storage()
        if any(storage.data_ptr() == old.data_ptr() for old in self.seen):
            return False
        self.seen.append(storage)
        return True


@pytest.mark.parametrize("class_dim", [-1, 1])
def test_many_classes_take_a_small_multiple_of_the_logits(class_dim):
    n, c = 256, 10_000
    one = n * c * 4
    logits = torch.zeros(n, c)
    with Allocations() as made:
        q = SoftmaxCurvature.from_logits(logits, torch.full((n,), 1 / n), class_dim=class_dim)
    # The softmax, and one index and one weight per sample.
    assert made.total <= 1.01 * one and made.largest == one
    v = torch.ones(1, n * c)
    for product in (q._rows, q.factor_t, lambda x: q.factor(x.reshape(1, n, c).mT)):
        with Allocations() as made:
            product(v)
        # At most seven elementwise results if none were freed on the way; nothing of N*C*C.
        assert made.total <= 7.1 * one and made.largest == one


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"one weight per position, \(3, 1\)"):
        SoftmaxCurvature(torch.empty(0), probabilities=torch.ones(3, 1, 2), weights=torch.ones(3))
    with pytest.raises(ValueError, match="axis 1 or -1"):
        SoftmaxCurvature.from_logits(torch.ones(3, 2), torch.ones(3), class_dim=0)
