"""Products under torch.compile: no graph break, the same numbers, the same checks."""

from __future__ import annotations

import warnings

import pytest
import torch
from llqr_mf.operators.tangent import is_plain
from llqr_mf.operators.traced import trace_product
from torch import nn

import llqr_mf as lq

BACKEND = "eager"
"""The graph is torch.compile's; only the kernels are torch's own, which saves minutes."""


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


class Language(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        layer = nn.TransformerEncoderLayer(
            8, 2, 12, dropout=dropout, batch_first=True, norm_first=True, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(tokens))).flatten(0, 1)


def mlp() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    return model, torch.randn(4, 5), torch.randint(0, 3, (4,))


def conv() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    first = (nn.Conv2d(2, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), Residual())
    last = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(*first, *last), torch.randn(4, 2, 6, 6), torch.randint(0, 3, (4,))


def conv_eval() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model, x, y = conv()
    return model.eval(), x, y


def transformer(dropout: float = 0.0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    return Language(dropout), torch.randint(0, 7, (3, 4)), torch.randint(0, 7, (12,))


def transformer_that_drops() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    return transformer(0.3)


def problem_of(
    make: object, metric: str = "gauss_newton", dtype: torch.dtype = torch.float64
) -> lq.LQRProblem:
    torch.manual_seed(0)
    model, x, y = make() if callable(make) else make  # type: ignore[misc]
    x = x.to(dtype) if x.is_floating_point() else x
    return lq.LQRProblem.from_network(
        *(lq.split(model.to(dtype)), x, y), loss="cross_entropy", metric=metric, damping=1e-2
    )


old_dynamo = pytest.mark.skipif(
    torch.__version__.startswith("2.6."),
    reason="Dynamo of torch 2.6 takes no next() with a default",
)

CASES = [
    (mlp, "gauss_newton"),
    (mlp, "newton"),
    (conv, "gauss_newton"),
    (conv_eval, "gauss_newton"),
    (transformer_that_drops, "gauss_newton"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@old_dynamo
@pytest.mark.parametrize(("make", "metric"), CASES)
def test_dynamo_takes_the_whole_product(make: object, metric: str) -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    problem = problem_of(make, metric)
    v = torch.randn(1, problem.size, dtype=torch.float64)
    run = torch.compile(problem.system.condensed_product, backend=counting)
    with torch.no_grad():
        product = run(v, torch.empty_like(v))
        torch.testing.assert_close(product, problem.hessian.multiply_rows(v), rtol=1e-10, atol=0)
    assert len(graphs) == 1  # a break would have left one graph on either side of it


@old_dynamo
def test_explain_sees_no_break() -> None:
    problem = problem_of(mlp)
    v = torch.randn(1, problem.size, dtype=torch.float64)
    with torch.no_grad():
        found = torch._dynamo.explain(problem.system.condensed_product)(v, torch.empty_like(v))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.parametrize(("make", "metric"), [*CASES, (transformer, "newton")])
@pytest.mark.parametrize(("k", "in_place"), [(1, True), (3, False)])
def test_recorded_products_equal_the_plain_ones(
    make: object, metric: str, k: int, in_place: bool
) -> None:
    problem = problem_of(make, metric)
    graph = trace_product(problem.system, k, in_place=in_place)
    v = torch.randn(k, problem.size, dtype=torch.float64)
    out = torch.full_like(v, torch.nan)
    with torch.no_grad():
        graph(v, out)
    torch.testing.assert_close(out, problem.hessian.multiply_rows(v), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("make", "k"), [(mlp, 3), (conv, 1), (transformer, 1)])
def test_compiled_products_equal_the_plain_ones(make: object, k: int) -> None:
    problem = problem_of(make)
    fast = lq.operators.compiled(problem.hessian, backend=BACKEND)
    v = torch.randn(problem.size, k, dtype=torch.float64)
    torch.testing.assert_close(fast @ v, problem.hessian @ v, rtol=1e-10, atol=1e-14)


def test_columns_are_taken_in_passes_and_buffers_of_any_layout_are_filled() -> None:
    problem = problem_of(mlp)
    fast = lq.operators.CompiledOperator(
        problem.system.proto, base=problem.hessian, backend=BACKEND, columns=2
    )
    dense = problem.hessian.to_dense()
    block = torch.randn(10, problem.size, dtype=torch.float64)
    v, strided = block[:5], torch.empty(problem.size, 5, dtype=torch.float64).mT
    wanted = v @ dense
    torch.testing.assert_close(fast.multiply_rows(v), wanted)
    assert fast.multiply_rows(v, strided) is strided
    torch.testing.assert_close(strided, wanted)
    fast.multiply_rows(v, block[5:])  # shares its storage with v
    torch.testing.assert_close(block[5:], wanted)
    assert set(fast._graphs) == {1, 2}
    torch.testing.assert_close(fast.to_dense(), dense)


def test_products_are_differentiable_and_stand_under_func() -> None:
    problem = problem_of(mlp)
    fast = lq.operators.compiled(problem.hessian, backend=BACKEND)
    v = torch.randn(problem.size, dtype=torch.float64, requires_grad=True)
    assert not is_plain(v)
    (gradient,) = torch.autograd.grad((fast @ v) @ v, v)
    torch.testing.assert_close(gradient, 2 * (problem.hessian @ v.detach()))
    assert fast._graphs == {}


def test_the_same_shape_compiles_once() -> None:
    compilations = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compilations.append(graph)
        return graph.forward

    problem = problem_of(conv)
    fast = lq.operators.compiled(problem.hessian, backend=counting)
    block = torch.randn(6, problem.size, dtype=torch.float64)
    fast @ block[0]
    with torch.no_grad():
        fast @ block[1].requires_grad_(False)
    fast._rows_into(block[2:3], torch.empty_like(block[2:3]))
    fast._rows_into(block[3:4], block[4:5])
    lq.solve(problem, "cg", max_iterations=3)
    with torch.inference_mode():
        fast @ block[5]
    assert len(compilations) == 1
    fast @ block[:2].mT
    assert len(compilations) == 2


def test_more_problems_than_dynamo_recompiles_of_one_function() -> None:
    case = nn.Linear(2, 3), torch.randn(4, 2), torch.randint(0, 3, (4,))
    names = ("recompile_limit", "cache_size_limit")  # the second on torch 2.6
    limit = next(name for name in names if hasattr(torch._dynamo.config, name))
    with torch._dynamo.config.patch({limit: 2}):
        for _ in range(4):
            problem = problem_of(case)
            fast = lq.operators.compiled(problem.hessian, backend=BACKEND)
            v = torch.randn(problem.size, dtype=torch.float64)
            torch.testing.assert_close(fast @ v, problem.hessian @ v)


def test_weights_written_to_are_noticed_and_may_be_put_back() -> None:
    model, x, y = mlp()
    problem = problem_of((model, x, y))
    fast = lq.operators.compiled(problem.hessian, backend=BACKEND)
    v = torch.randn(problem.size, dtype=torch.float64)
    before = fast @ v
    kept = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(0.1)
        with pytest.raises(RuntimeError, match=r"0\.weight was written to"):
            fast @ v
        model[0].weight.copy_(kept)
        assert torch.equal(fast @ v, before)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RuntimeError, match="autocast"),
    ):
        fast @ v


def test_it_solves() -> None:
    problem = problem_of(mlp)
    fast = lq.operators.compiled(problem.hessian, backend=BACKEND)
    found = lq.solvers.cg(fast, -problem.gradient, rtol=1e-10)
    torch.testing.assert_close(found.x, lq.solve(problem, "cg", rtol=1e-10).step)


def test_the_random_state_is_not_touched() -> None:
    problem = problem_of(mlp)
    before = torch.get_rng_state()
    lq.operators.compiled(problem.hessian, backend=BACKEND) @ problem.gradient
    assert torch.equal(torch.get_rng_state(), before)


class ReadsAValue(torch.autograd.Function):
    """Twice x, with a branch on the gradient's value."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient if gradient.sum().item() != 1e30 else gradient


class LeavesTorch(torch.autograd.Function):
    """Twice x, by NumPy."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(2 * x.detach().numpy())

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return LeavesTorch.apply(gradient)


class Doubled(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (ReadsAValue, "the product of .* in 'strange'.* recorded.*problem.hessian"),
        (LeavesTorch, "off by .*NumPy.*problem.hessian"),
    ],
)
def test_calls_that_no_graph_can_hold(
    function: type[torch.autograd.Function], message: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(5, 4))
    model.add_module("strange", Doubled(function))
    model.add_module("last", nn.Linear(4, 3))
    problem = problem_of((model, torch.randn(4, 5), torch.randint(0, 3, (4,))))
    v = torch.randn(problem.size, dtype=torch.float64)
    assert bool((problem.hessian @ v).isfinite().all())
    with pytest.raises(RuntimeError, match=message):
        lq.operators.compiled(problem.hessian, backend=BACKEND) @ v


def test_a_backend_that_fails_says_what_can_be_done() -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        raise OSError("no compiler here")

    problem = problem_of(mlp)
    with pytest.raises(RuntimeError, match=r"no compiler here.*C\+\+ compiler.*aot_eager"):
        lq.operators.compiled(problem.hessian, backend=broken) @ problem.gradient


def test_warnings_of_the_compiler_do_not_escape() -> None:
    def warning(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        warnings.warn("of the compiler", stacklevel=1)
        return graph.forward

    problem = problem_of(mlp)
    lq.operators.compiled(problem.hessian, backend=warning) @ problem.gradient


def test_only_the_condensed_hessian_is_taken() -> None:
    problem = problem_of(mlp)
    with pytest.raises(TypeError, match=r"takes problem\.hessian"):
        lq.operators.compiled(problem.B[0])  # type: ignore[arg-type]


@pytest.mark.slow
def test_inductor() -> None:
    problem = problem_of(mlp)
    fast = lq.operators.compiled(problem.hessian)
    v = torch.randn(problem.size, dtype=torch.float64)
    try:
        product = fast @ v
    except RuntimeError as error:
        if "C++ compiler" not in str(error):
            raise
        pytest.skip("no C++ compiler")
    torch.testing.assert_close(product, problem.hessian @ v, rtol=1e-10, atol=1e-12)
