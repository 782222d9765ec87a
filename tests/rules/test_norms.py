"""LayerNorm, RMSNorm, GroupNorm and BatchNorm; second order above all (design.md section 6)."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import Active, active, check, check_gram, node_of, normal

from llqr_mf.rules.norms import NormNode

MOVING = ["xwb", "xw", "x", "wb", "b"]


def choose(moving, letter, tensor):
    return Active(tensor) if letter in moving else tensor


def is_norm(node):
    assert isinstance(node, NormNode)
    return node


@pytest.mark.parametrize("moving", MOVING)
@pytest.mark.parametrize(
    ("shape", "last"), [((4, 3), 1), ((2, 3, 4), 1), ((2, 3, 4), 2), ((5,), 1), ((3, 1, 4), 2)]
)
def test_layer_norm(moving, shape, last):
    normalised = shape[-last:]
    args = choose(moving, "x", normal(*shape)), normalised
    weight, bias = normal(*normalised, seed=1), normal(*normalised, seed=2)
    is_norm(
        check(F.layer_norm, *args, choose(moving, "w", weight), choose(moving, "b", bias), 1e-3)
    )
    if "x" in moving:
        is_norm(check(F.layer_norm, *args))

        def without_weight(x, shape, weight, bias, eps):
            return F.layer_norm(x, shape, eps=eps) + bias  # torch's own second backward fails

        rest = None, choose(moving, "b", bias)
        is_norm(check(F.layer_norm, *args, *rest, eps=0.1, against=without_weight))


@pytest.mark.parametrize("moving", ["xw", "x", "w"])
@pytest.mark.parametrize("eps", [None, 0.2])
@pytest.mark.parametrize(("shape", "last"), [((4, 3), 1), ((2, 3, 4), 2)])
def test_rms_norm(moving, eps, shape, last):
    weight = choose(moving, "w", normal(*shape[-last:], seed=1))
    args = choose(moving, "x", normal(*shape)), shape[-last:]
    is_norm(check(F.rms_norm, *args, weight, eps))
    if "x" in moving:
        is_norm(check(F.rms_norm, *args))


@pytest.mark.parametrize("moving", MOVING)
@pytest.mark.parametrize(
    ("shape", "groups"), [((3, 4), 2), ((2, 4, 3), 2), ((2, 3, 2, 2), 1), ((2, 2, 2, 3), 2)]
)
def test_group_norm(moving, shape, groups):
    weight, bias = normal(shape[1], seed=1), normal(shape[1], seed=2)
    x = choose(moving, "x", normal(*shape))
    is_norm(
        check(
            *(F.group_norm, x, groups),
            *(choose(moving, "w", weight), choose(moving, "b", bias), 1e-2),
        )
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("moving", MOVING)
@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 4), (2, 3, 2, 2), (2, 1, 3), (2, 2, 2, 1, 2)])
def test_batch_norm(training, moving, shape):
    width = shape[1]
    mean, variance = normal(width, seed=3), normal(width, seed=4).abs() + 0.5
    statistics = (None, None) if training else (mean, variance)
    weight, bias = normal(width, seed=1), normal(width, seed=2)
    node = is_norm(
        check(
            *(F.batch_norm, choose(moving, "x", normal(*shape)), *statistics),
            *(choose(moving, "w", weight), choose(moving, "b", bias)),
            *(training, 0.1, 1e-3),
        )
    )
    assert node.couples_batch == training


def test_batch_norm_without_scale():
    check(F.batch_norm, active(4, 3), None, None, training=True)
    check(F.batch_norm, active(4, 3), normal(3), normal(3).abs() + 1)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 3),
    st.floats(1e-6, 1.0),
)
def test_layer_norm_shapes(shape, last, eps):
    normalised = tuple(shape[-last:])
    args = active(*shape), normalised, active(*normalised, seed=1), active(*normalised, seed=2)
    # With one or two entries the derivatives are of the size of 1 / eps**(1/2).
    check(F.layer_norm, *args, max(eps, 1e-2), differences=False)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_gram(index):
    x, w, b = active(4, 2, 3), active(3, seed=1), active(3, seed=2)
    cases = [
        (F.layer_norm, (x, (3,), w, b), {}),
        (F.group_norm, (active(4, 4, 3), 2, active(4, seed=1), active(4, seed=2)), {}),
        (F.batch_norm, (x, normal(2), normal(2).abs() + 1, active(2), active(2, seed=1)), {}),
        (F.layer_norm, (active(4, 3), (3,), w, b), {}),
    ]
    for case in cases:
        check_gram(node_of(case[0], *case[1]), case, 4, index)


def test_a_norm_over_the_batch_couples_it():
    x = active(4, 3)
    assert node_of(F.layer_norm, x, (4, 3)).couples_batch
    assert not node_of(F.layer_norm, x, (3,)).couples_batch
    assert not node_of(F.group_norm, active(2, 4, 3), 2).couples_batch


HALF = [
    (F.layer_norm, ((8, 32), (32,)), [(32,), (32,)]),
    (F.rms_norm, ((8, 32), (32,)), [(32,)]),
    (F.group_norm, ((8, 4, 16), 2), [(4,), (4,)]),
    (F.batch_norm, ((8, 4, 16), None, None), [(4,), (4,)]),
]


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("case", HALF, ids=lambda case: case[0].__name__)
def test_bfloat16(case, scale):
    """Statistics are taken in float32, so only the results are rounded."""
    function, (shape, *rest), parameters = case
    options = {"training": True} if function is F.batch_norm else {}
    half = [Active((scale * normal(*shape)).bfloat16())]
    half += [Active(normal(*p, seed=1).bfloat16()) for p in parameters]
    nodes = [
        node_of(function, arrays[0], *rest, *arrays[1:], **options)
        for arrays in (half, [Active(a.value.float()) for a in half])
    ]
    found, expected = (
        [
            node.result,
            node.push([normal(2, *a.value.shape, seed=2).to(a.value.dtype) for a in arrays]),
            *node.pull(
                normal(2, *shape, seed=3).to(arrays[0].value.dtype),
                *([True] * len(arrays), [None] * len(arrays)),
            ),
        ]
        for node, arrays in zip(nodes, (half, [Active(a.value.float()) for a in half]), strict=True)
    )
    torch.testing.assert_close(found[0].float(), function_value(function, half, rest, options))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert bool(a.isfinite().all())
        assert float((a.float() - b).norm() / b.norm()) < 2**-6


def function_value(function, half, rest, options):
    return function(half[0].value, *rest, *[a.value for a in half[1:]], **options).float()


def test_rms_norm_without_eps_in_half_precision_is_torchs():
    """Which machine epsilon is meant shows at inputs of its square root's size."""
    for dtype in (torch.bfloat16, torch.float16):
        x = (1e-3 * normal(4, 8)).to(dtype)
        node = node_of(F.rms_norm, Active(x), (8,))
        torch.testing.assert_close(node.core.z.to(dtype), F.rms_norm(x, (8,)), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("training", [True, False])
def test_torchs_nested_forward_mode_through_norms(training):
    """Why these rules exist. Skips where torch has been mended, so that the note can go."""
    x, w, b = normal(2, 3), normal(3, seed=1), normal(3, seed=2)

    def function(y):
        if training:
            return F.batch_norm(y, None, None, w, b, training=True).tanh()
        return F.layer_norm(y, (3,), w, b).tanh()

    def jacobian(y):
        y = y.detach().requires_grad_()
        return torch.stack(
            [torch.autograd.grad(z, y, retain_graph=True)[0] for z in function(y).reshape(-1)]
        )

    found = torch.func.jacfwd(torch.func.jacfwd(function))(x).reshape(6, 6, 6)
    steps = 1e-5 * torch.eye(6, dtype=torch.float64).reshape(6, 2, 3)
    columns = [(jacobian(x + e) - jacobian(x - e)).reshape(6, 6) / 2e-5 for e in steps]
    if torch.allclose(found, torch.stack(columns, dim=-1), atol=1e-5):
        pytest.skip(f"torch {torch.__version__} differentiates norms rightly")
    assert torch.__version__ >= "2.6"
