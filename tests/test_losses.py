"""Losses against torch.nn.functional and dense Hessians by torch.func."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from llqr_mf.losses import (
    BCEWithLogits,
    CallableLoss,
    CrossEntropy,
    Loss,
    MeanSquaredError,
    get_loss,
    loss_names,
)

F64 = torch.float64
EPS = torch.finfo(F64).eps


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=rng(seed))


def close(a, b):
    """Equal up to rounding: 100 operations in a row on numbers as large as b's largest.

    Or as large as one: the oracles subtract probabilities from 1 on the way to small entries.
    """
    scale = max(1.0, float(b.abs().max()))
    torch.testing.assert_close(a, b, rtol=0, atol=100 * EPS * scale)


def hessian_of(function, outputs):
    return torch.func.hessian(function)(outputs).reshape(outputs.numel(), -1)


def check_against(loss, reference, outputs, targets):
    """Value, gradient and Hessian of a loss against a plain function of the outputs."""
    loss.check(outputs, targets)
    before = outputs.clone(), targets.clone()
    close(loss.value(outputs, targets), reference(outputs))
    gradient = loss.gradient(outputs, targets)
    assert gradient.shape == outputs.shape
    close(gradient, torch.func.grad(reference)(outputs))
    curvature = loss.hessian(outputs, targets)
    assert (curvature.samples, curvature.width) == (len(outputs), outputs[0].numel())
    close(curvature.to_dense(), hessian_of(reference, outputs))
    per_sample = loss.per_sample_gradients(outputs, targets)
    assert per_sample.shape == (len(outputs), outputs[0].numel())
    close(per_sample / loss.count(outputs, targets), gradient.reshape(len(outputs), -1))
    torch.testing.assert_close(outputs, before[0], rtol=0, atol=0)
    torch.testing.assert_close(targets, before[1], rtol=0, atol=0)


# ---- cross-entropy


@st.composite
def cross_entropies(draw):
    """A loss, torch's function of (N, C, ...) and a batch in one of the layouts."""
    n, classes = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    inner = draw(st.sampled_from([(), (1,), (3,), (2, 3)]))
    class_dim = draw(st.sampled_from([1, -1]))
    soft = draw(st.booleans())
    seed = draw(st.integers(0, 2**20))
    generator = rng(seed)
    weight = None
    if draw(st.booleans()):
        weight = torch.rand(classes, dtype=F64, generator=generator) + 0.1
    smoothing = draw(st.sampled_from([0.0, 0.1, 1.0]))
    ignore = draw(st.sampled_from([-100, -1] if soft else [-100, -1, 0]))
    shape = (n, classes, *inner) if class_dim == 1 else (n, *inner, classes)
    outputs = 3 * torch.randn(shape, dtype=F64, generator=generator)
    if soft:
        targets = torch.rand(shape, dtype=F64, generator=generator)
        targets = targets / targets.sum(class_dim, keepdim=True)
    else:
        targets = torch.randint(classes, (n, *inner), generator=generator)
        ignored = torch.rand(targets.shape, generator=generator) < 0.4
        targets = torch.where(ignored, ignore, targets)
        if ignore == 0 and classes == 1:
            ignore = -1
            targets = torch.where(ignored, ignore, targets)
        if bool((targets == ignore).all()):
            targets.view(-1)[0] = classes - 1
    options = {"weight": weight, "ignore_index": ignore, "label_smoothing": smoothing}

    def reference(x):
        x = x.movedim(class_dim, 1)
        y = targets.movedim(class_dim, 1) if soft else targets
        return F.cross_entropy(x, y, **options)

    return CrossEntropy(class_dim=class_dim, **options), reference, outputs, targets


@settings(max_examples=120, deadline=None)
@given(cross_entropies())
def test_cross_entropy_is_torchs_with_every_combination_of_options(case):
    check_against(*case)


def fisher_by_summing_classes(outputs, counted, class_dim):
    """The mean over counted positions of the sum over y of p(y) times grad grad' of -log p(y)."""
    place = torch.arange(outputs.numel()).reshape(outputs.shape).movedim(class_dim, -1)
    rows = outputs.movedim(class_dim, -1).flatten(0, -2)
    total = torch.zeros(outputs.numel(), outputs.numel(), dtype=outputs.dtype)
    for row, at, keep in zip(rows, place.flatten(0, -2), counted.flatten(), strict=True):
        for y in range(len(row) if keep else 0):
            g = torch.func.grad(lambda x, y=y: -x.log_softmax(0)[y])(row)
            total[at.unsqueeze(1), at] += row.softmax(0)[y] * torch.outer(g, g)
    return total / counted.sum()


@settings(max_examples=40, deadline=None)
@given(cross_entropies())
def test_cross_entropy_fisher_is_that_of_the_model(case):
    loss, _, outputs, targets = case
    soft = targets.is_floating_point()
    shape = outputs.movedim(loss.class_dim, -1).shape[:-1]
    counted = torch.ones(shape, dtype=torch.bool) if soft else targets != loss.ignore_index
    assert loss.count(outputs, targets) == int(counted.sum())
    expected = fisher_by_summing_classes(outputs, counted, loss.class_dim)
    close(loss.fisher(outputs, targets).to_dense(), expected)


def test_class_axis_is_found_from_the_targets():
    x, y = normal(4, 3, 5), torch.zeros(4, 3, dtype=torch.long)
    close(CrossEntropy().value(x, y), F.cross_entropy(x.movedim(-1, 1), y))
    y = torch.zeros(4, 5, dtype=torch.long)
    close(CrossEntropy().value(x, y), F.cross_entropy(x, y))
    # Where both axes would do, it is the last.
    x, y = normal(4, 3, 3), torch.tensor([[0, 1, 2]] * 4)
    close(CrossEntropy().value(x, y), F.cross_entropy(x.movedim(-1, 1), y))
    close(CrossEntropy(class_dim=1).value(x, y), F.cross_entropy(x, y))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_index_targets_of_any_integer_type(dtype):
    # 156 is -100 in eight bits: it must not be taken for the ignore_index.
    x, y = normal(3, 200), torch.tensor([0, 156, 3]).to(dtype)
    check_against(CrossEntropy(), lambda z: F.cross_entropy(z, y.long()), x, y)
    assert CrossEntropy().count(x, y) == 3


def test_extreme_logits():
    x = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]])
    y = torch.tensor([1, 2])
    loss = CrossEntropy(label_smoothing=0.1)
    loss.check(x, y)
    torch.testing.assert_close(loss.value(x, y), F.cross_entropy(x, y, label_smoothing=0.1))
    assert bool(loss.gradient(x, y).isfinite().all())
    assert bool(loss.hessian(x, y).to_dense().isfinite().all())
    assert bool(loss.sample_gradients(x, y, 3, rng()).isfinite().all())
    x = torch.tensor([[1e4, -1e4], [0.0, 3.0]])
    loss = BCEWithLogits()
    y = torch.tensor([[0.0, 1.0], [0.5, 1.0]])
    loss.check(x, y)
    assert bool(loss.gradient(x, y).isfinite().all())
    assert bool(loss.hessian(x, y).to_dense().isfinite().all())
    assert bool(loss.sample_gradients(x, y, 3, rng()).isfinite().all())
    # A masked class is a legitimate minus infinity.
    x = torch.tensor([[0.0, float("-inf"), 1.0]])
    CrossEntropy().check(x, torch.tensor([2]))
    assert bool(CrossEntropy().hessian(x, torch.tensor([2])).to_dense().isfinite().all())


# ---- the others


@pytest.mark.parametrize("shape", [(5,), (5, 1), (4, 3), (2, 3, 2)])
def test_mean_squared_error_is_torchs(shape):
    x, y = normal(*shape), normal(*shape, seed=1)
    loss = MeanSquaredError()
    check_against(loss, lambda z: F.mse_loss(z, y), x, y)
    # The Gaussian of variance D/2: its negative log-density is the loss per sample, and its
    # Fisher matrix is the identity over the variance, averaged over the samples.
    variance = x[0].numel() / 2
    identity = torch.eye(x.numel(), dtype=F64)
    close(loss.fisher(x, y).to_dense(), identity / variance / len(x))
    density = torch.distributions.Normal(x, math.sqrt(variance))
    difference = -density.log_prob(y).sum() / len(x) - loss.value(x, y)
    close(difference, (0.5 * math.log(2 * math.pi * variance) * torch.ones_like(x)).sum() / len(x))


@pytest.mark.parametrize("weight", [None, (3,), (4, 3), (4, 1), (1,), ()])
@pytest.mark.parametrize("pos_weight", [None, (3,), (1,), ()])
def test_bce_is_torchs(weight, pos_weight):
    x = 3 * normal(4, 3)
    y = torch.rand(4, 3, dtype=F64, generator=rng(3)).round(decimals=1)
    y[0] = torch.tensor([0.0, 1.0, 1.0])
    options = {
        name: None if shape is None else normal(*shape, seed=4).abs()
        for name, shape in (("weight", weight), ("pos_weight", pos_weight))
    }
    loss = BCEWithLogits(**options)

    def reference(z):
        return F.binary_cross_entropy_with_logits(z, y, **options)

    check_against(loss, reference, x, y)
    expected = torch.zeros(12, 12, dtype=F64)
    for i, logit in enumerate(x.flatten()):
        for label in (0.0, 1.0):
            p = torch.sigmoid(logit if label else -logit)
            g = torch.sigmoid(logit) - label
            expected[i, i] += p * g * g / 12
    close(loss.fisher(x, y).to_dense(), expected)


def test_callable_loss_is_its_function():
    def huber(x, y):
        return F.huber_loss(x, y) + 0.1 * (x.square().sum(-1).logsumexp(0))

    x, y = normal(4, 3), normal(4, 3, seed=1)
    check_against(CallableLoss(huber), lambda z: huber(z, y), x, y)
    for call in (
        lambda: CallableLoss(huber).fisher(x, y),
        lambda: CallableLoss(huber).sample_gradients(x, y, 1, rng()),
    ):
        with pytest.raises(ValueError, match=r"no output distribution.*empirical_fisher"):
            call()


def test_named_losses_agree_with_themselves_as_functions():
    x, y = normal(4, 3), torch.tensor([0, 2, 1, 1])
    named, function = CrossEntropy(), CallableLoss(F.cross_entropy)
    close(function.value(x, y), named.value(x, y))
    close(function.gradient(x, y), named.gradient(x, y))
    close(function.hessian(x, y).to_dense(), named.hessian(x, y).to_dense())
    close(function.per_sample_gradients(x, y), named.per_sample_gradients(x, y))


# ---- draws

IGNORING = torch.tensor([[0, -100, 2], [1, 1, 2]])
DRAWN = {
    "categories": (CrossEntropy(), normal(3, 4), torch.tensor([0, 3, -100])),
    "weighted": (
        CrossEntropy(weight=torch.tensor([1.0, 2.0, 5.0]), label_smoothing=0.2),
        normal(2, 3, 3),
        IGNORING,
    ),
    "class_first": (CrossEntropy(class_dim=1), normal(2, 4, 3), IGNORING),
    "gaussian": (MeanSquaredError(), normal(2, 3), normal(2, 3)),
    "bernoulli": (
        BCEWithLogits(weight=torch.tensor([2.0, 1.0, 3.0])),
        normal(2, 3),
        torch.ones(2, 3, dtype=F64),
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_draws_are_unbiased_within_their_standard_error(name):
    loss, x, y = DRAWN[name]
    k = 20_000
    v = loss.sample_gradients(x, y, k, rng(5))
    assert v.shape == (len(x), x[0].numel(), k) and v.dtype == F64
    expected = loss.fisher(x, y).to_dense().reshape(*v.shape[:2], *v.shape[:2])
    for n in range(len(x)):
        products = torch.einsum("dk,ek->dek", v[n], v[n]) / loss.count(x, y)
        error = products.mean(-1) - expected[n, :, n]
        # Five standard errors in each of up to 144 entries: one false alarm in 10^4 seeds.
        bound = 5 * products.std(-1) / math.sqrt(k) + 100 * EPS
        assert bool((error.abs() <= bound).all())
        mean_bound = 5 * v[n].std(-1) / math.sqrt(k) + 100 * EPS
        assert bool((v[n].mean(-1).abs() <= mean_bound).all())


@pytest.mark.parametrize("name", DRAWN)
def test_draws_come_from_the_generator_alone(name):
    loss, x, y = DRAWN[name]
    state = torch.get_rng_state()
    first = loss.sample_gradients(x, y, 2, rng(7))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, loss.sample_gradients(x, y, 2, rng(7)))
    assert not torch.equal(first, loss.sample_gradients(x, y, 2, rng(8)))
    with pytest.raises(ValueError, match="at least one"):
        loss.sample_gradients(x, y, 0, rng())


# ---- what every loss promises

ANY = {
    **DRAWN,
    "function": (CallableLoss(lambda x, y: (x - y).cosh().mean()), normal(2, 3), normal(2, 3)),
}


@pytest.mark.parametrize("name", ANY)
def test_low_precision_is_computed_in_float32(name):
    loss, x, y = ANY[name]
    x = x.bfloat16()
    y = y.bfloat16() if y.is_floating_point() else y
    wide = x.float()
    target = y.float() if y.is_floating_point() else y
    loss.check(x, y)
    assert loss.value(x, y).dtype == torch.float32
    torch.testing.assert_close(loss.value(x, y), loss.value(wide, target), rtol=1e-6, atol=0)
    gradient = loss.gradient(x, y)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, loss.gradient(wide, target).bfloat16(), rtol=2**-7, atol=0)
    curvatures = [loss.hessian] if name == "function" else [loss.hessian, loss.fisher]
    v = torch.ones(x.numel(), dtype=torch.bfloat16)
    v[0] = -2
    for curvature in curvatures:
        q, exact = curvature(x, y), curvature(wide, target)
        assert q.dtype == torch.bfloat16
        torch.testing.assert_close(q @ v, (exact @ v.float()).bfloat16(), rtol=2**-7, atol=1e-8)
    assert loss.per_sample_gradients(x, y).dtype == torch.float32
    if name != "function":
        assert loss.sample_gradients(x, y, 1, rng()).dtype == torch.float32


@pytest.mark.parametrize("name", ANY)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_grad_mode_and_no_graph_left(name, mode):
    loss, x, y = ANY[name]
    expected = loss.gradient(x, y), loss.hessian(x, y).to_dense()
    with mode():
        leaf = (x + 0) if mode is torch.inference_mode else x.clone().requires_grad_()
        target = y + 0
        loss.check(leaf, target)
        gradient, q = loss.gradient(leaf, target), loss.hessian(leaf, target)
        dense = q.to_dense()
        per_sample = loss.per_sample_gradients(leaf, target)
    close(gradient, expected[0])
    close(dense, expected[1])
    made = [gradient, dense, per_sample, *q.representation()]
    if name != "function":
        made += loss.fisher(leaf, target).representation()
        made.append(loss.sample_gradients(leaf, target, 1, rng()))
    assert not any(tensor.requires_grad for tensor in made)


# ---- bad input

NAN = torch.tensor([[0.0, float("nan")], [0.0, 0.0]])
GOOD = torch.zeros(2, 2)
INDEX = torch.tensor([0, 1])
META = torch.zeros(2, 2, device="meta")


@pytest.mark.parametrize(
    "loss, outputs, targets, message",
    [
        (CrossEntropy(), GOOD, torch.tensor([0, 2]), r"outside 0\.\.1, such as 2.*ignore_index"),
        (CrossEntropy(), GOOD, torch.tensor([-1, 0]), r"such as -1.*relabel"),
        (CrossEntropy(), GOOD, torch.tensor([-100, -100]), r"all targets.*skip this batch"),
        (CrossEntropy(), GOOD, torch.tensor([0, 1, 1]), r"\(3,\).*must have shape \(2,\)"),
        (CrossEntropy(), GOOD, torch.tensor([[0], [1]]), r"squeeze\(-1\)"),
        (CrossEntropy(), GOOD, torch.tensor([0.0, 1.0]), r"targets\.long\(\)"),
        (CrossEntropy(), GOOD, torch.tensor([[0, 1], [1, 0]]), r"targets\.float\(\)"),
        (CrossEntropy(), GOOD, torch.tensor([True, False]), r"bool.*targets\.long"),
        (CrossEntropy(), GOOD, NAN, r"targets hold.*NaN.*clean"),
        (CrossEntropy(), GOOD, -torch.ones(2, 2), r"negative probabilities"),
        (CrossEntropy(ignore_index=1), GOOD, GOOD, r"ignore_index is 1.*class indices"),
        (CrossEntropy(), NAN, INDEX, r"outputs hold 1 entries that are NaN"),
        (CrossEntropy(), GOOD + float("inf"), INDEX, r"outputs hold 4 entries"),
        (CrossEntropy(), torch.zeros(2), INDEX, r"outputs\.unsqueeze\(0\)"),
        (CrossEntropy(), torch.zeros(0, 2), INDEX[:0], r"empty.*skip"),
        (CrossEntropy(), GOOD.long(), INDEX, r"outputs are torch.int64.*outputs\.float"),
        (CrossEntropy(), GOOD, META, r"outputs are on cpu and targets on meta.*targets\.to"),
        (CrossEntropy(weight=torch.ones(3)), GOOD, INDEX, r"weight has 3 entries.*2 classes"),
        (CrossEntropy(weight=torch.tensor([0.0, 1])), GOOD, INDEX * 0, r"weight is zero"),
        (CrossEntropy(class_dim=-1), torch.zeros(2, 5, 3), torch.zeros(2, 3).long(), r"\(2, 5\)"),
        (MeanSquaredError(), GOOD, torch.zeros(2), r"nothing is broadcast"),
        (MeanSquaredError(), GOOD, torch.zeros(4), r"targets\.reshape\(\(2, 2\)\)"),
        (MeanSquaredError(), GOOD, torch.zeros(2, 2).long(), r"targets\.to\(outputs\.dtype\)"),
        (MeanSquaredError(), GOOD, NAN, r"targets hold"),
        (MeanSquaredError(), NAN, GOOD, r"outputs hold"),
        (MeanSquaredError(), torch.tensor(0.0), torch.tensor(0.0), r"one row per sample"),
        (MeanSquaredError(), GOOD, META, r"targets on meta"),
        (BCEWithLogits(), GOOD, 2 * torch.ones(2, 2), r"\[0, 1\]"),
        (BCEWithLogits(), GOOD, torch.zeros(2, 3), r"must be equal"),
        (BCEWithLogits(), -GOOD / 0, GOOD, r"outputs hold"),
        (BCEWithLogits(weight=torch.ones(3)), GOOD, GOOD, r"weight has shape \(3,\)"),
        (BCEWithLogits(pos_weight=torch.ones(2, 2, 2)), GOOD, GOOD, r"pos_weight has shape"),
        (CallableLoss(lambda x, y: x - y), GOOD, GOOD, r"returned shape \(2, 2\).*mean"),
        (CallableLoss(lambda x, y: 1.0), GOOD, GOOD, r"must return a scalar tensor"),
        (CallableLoss(lambda x, y: y.sum()), GOOD, GOOD, r"does not depend on the outputs"),
        (CallableLoss(lambda x, y: x.sum() / 0), GOOD + 1, GOOD, r"is inf on this batch"),
        (CallableLoss(lambda x, y: x.sum()), GOOD, NAN, r"targets hold NaN"),
    ],
)
def test_bad_batches_are_named_with_a_remedy(loss, outputs, targets, message):
    with pytest.raises(ValueError, match=message):
        loss.check(outputs, targets)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CrossEntropy(label_smoothing=1.5), r"label_smoothing is 1\.5"),
        (lambda: CrossEntropy(class_dim=2), r"class_dim is 2"),
        (lambda: CrossEntropy(weight=torch.ones(2, 2)), r"one weight per class"),
        (lambda: CrossEntropy(weight=torch.tensor([-1.0])), r"weight holds"),
        (lambda: CrossEntropy(weight=torch.tensor([1])), r"weight\.float\(\)"),
        (lambda: BCEWithLogits(pos_weight=torch.tensor(float("nan"))), r"pos_weight holds"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- lookup


def test_lookup():
    assert loss_names() == ("cross_entropy", "mse", "bce_with_logits")
    assert all(isinstance(get_loss(name), Loss) for name in loss_names())
    own = CrossEntropy(label_smoothing=0.1)
    assert get_loss(own) is own
    assert isinstance(get_loss(nn.MSELoss()), MeanSquaredError)
    assert isinstance(get_loss(F.huber_loss), CallableLoss)
    assert isinstance(get_loss(nn.HuberLoss()), CallableLoss)


def test_torch_modules_keep_their_meaning():
    x, y = normal(4, 3, 3), torch.tensor([[0, 1, 2], [2, 2, 7], [1, 0, 0], [7, 0, 1]])
    module = nn.CrossEntropyLoss(
        weight=torch.tensor([1.0, 2.0, 3.0], dtype=F64), ignore_index=7, label_smoothing=0.1
    )
    check_against(get_loss(module), lambda z: module(z, y), x, y)
    x, y = normal(4, 3), torch.rand(4, 3, dtype=F64, generator=rng())
    module = nn.BCEWithLogitsLoss(
        weight=torch.tensor([1.0, 2.0, 3.0], dtype=F64),
        pos_weight=torch.tensor([3.0, 1.0, 0.5], dtype=F64),
    )
    check_against(get_loss(module), lambda z: module(z, y), x, y)

    class Twice(nn.MSELoss):
        def forward(self, input, target):
            return 2 * super().forward(input, target)

    check_against(get_loss(Twice()), lambda z: 2 * F.mse_loss(z, y), x, y)


@pytest.mark.parametrize(
    "spec, error, message",
    [
        ("hinge", ValueError, r"'hinge' is unknown.*'cross_entropy', 'mse', 'bce_with_logits'"),
        (nn.CrossEntropyLoss(reduction="sum"), ValueError, r"reduction='sum'.*is a mean"),
        (nn.HuberLoss(reduction="none"), ValueError, r"reduction='none'.*is a mean"),
        (3, TypeError, r"loss is a int.*'mse'"),
    ],
)
def test_lookup_errors(spec, error, message):
    with pytest.raises(error, match=message):
        get_loss(spec)
