"""What an independent reader tripped over, once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from linear_operator.operators import DiagLinearOperator
from llqr_mf.solvers.status import Code
from scipy.sparse.linalg import cg as scipy_cg
from torch import nn

import llqr_mf as lq

F64 = torch.float64


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


class Einsum(nn.Module):
    """A layer without a rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3, dtype=F64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ni,ij->nj", x, self.w)


def problem(model: nn.Module | None = None, **options: object) -> lq.LQRProblem:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 4, dtype=F64, generator=generator)
    y = torch.randint(0, 3, (5,), generator=generator)
    layers = lq.split(net() if model is None else model)
    given = {"loss": "cross_entropy", "damping": 0.1, **options}
    return lq.LQRProblem.from_network(layers, x, y, **given)


@pytest.mark.parametrize("last", [nn.Identity, Einsum])
def test_a_step_taken_is_noticed_and_a_step_taken_back_is_not(
    last: Callable[[], nn.Module],
) -> None:
    model = net().append(last())
    made = problem(model)
    v = torch.ones(made.size, dtype=F64)
    product = made.hessian @ v
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    with pytest.raises(RuntimeError, match=r"'?\d\.\w+'? was written to.*make a new problem"):
        made.hessian @ v
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    torch.testing.assert_close(made.hessian @ v, product, rtol=0, atol=0)


def test_a_batch_written_to_is_noticed() -> None:
    x, y = torch.randn(5, 4, dtype=F64), torch.randint(0, 3, (5,))
    made = lq.LQRProblem.from_network(lq.split(net()), x, y, loss="cross_entropy")
    x.add_(1)
    with pytest.raises(RuntimeError, match=r"inputs\[0\] was written to"):
        made.hessian @ torch.ones(made.size, dtype=F64)


def test_auto_in_half_precision_goes_by_cg() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.LayerNorm(64), nn.Linear(64, 10))
    x, y = torch.randn(64, 64), torch.randint(0, 10, (64,))
    made = lq.LQRProblem.from_network(
        lq.split(model.bfloat16()), x.bfloat16(), y, loss="cross_entropy", damping=1e-1
    )
    solution = lq.solve(made)
    assert solution.method == "cg" and "half precision" in solution.status.message
    assert solution.model_decrease > 0


def test_a_singular_convex_problem_is_not_called_indefinite() -> None:
    made = problem(damping=0.0)
    status = lq.solve(made, "riccati").status
    assert status.code is Code.CONVERGED and "singular at stages" in status.message
    # A linear cost where there is no curvature has no minimum.
    eye, nothing = torch.eye(2, dtype=F64), torch.zeros(2, 2, dtype=F64)
    down = lq.LQRProblem(A=[eye], B=[nothing], Q=[None, eye], r=[torch.ones(2, dtype=F64)])
    assert lq.solve(down, "riccati").status.code is Code.INDEFINITE


def test_a_diagonal_of_the_whole_size_couples_no_layers() -> None:
    size = problem().size
    d = torch.linspace(0.1, 1.0, size, dtype=F64)
    made = problem(damping=DiagLinearOperator(d))
    dense = lq.solve(made, "riccati")
    torch.testing.assert_close(made.R[0].to_dense(), torch.diag(d[:30]))
    for method in ("cg", "dual", "low_rank"):
        step = lq.solve(made, method, rtol=1e-11).step
        torch.testing.assert_close(step, dense.step, rtol=1e-8, atol=1e-10)
    assert made.value(1).to_dense().shape == made.Q[1].shape


@pytest.mark.parametrize("entry", [-1.0, float("nan")])
def test_a_diagonal_damping_is_checked(entry: float) -> None:
    d = torch.full((problem().size,), entry, dtype=F64)
    with pytest.raises(ValueError, match="damping has a diagonal entry that is negative, NaN"):
        problem(damping=DiagLinearOperator(d))


def test_operators_keep_their_dtype_and_say_so() -> None:
    made = problem()
    assert made.hessian.to(F64) is made.hessian and made.hessian.double() is made.hessian
    for convert in (lambda op: op.float(), lambda op: op.to(torch.float32)):
        with pytest.raises(NotImplementedError, match="convert the model and make a new problem"):
            convert(made.hessian)


def test_scipy_takes_sums_and_products_and_nothing() -> None:
    made = problem()
    twice = made.hessian + made.hessian
    x, _ = scipy_cg(lq.operators.to_scipy(twice), made.gradient.numpy(), rtol=1e-12)
    expected = -0.5 * lq.solve(made, "cg", rtol=1e-12).step
    torch.testing.assert_close(torch.from_numpy(x), expected, rtol=1e-8, atol=1e-10)
    gram = lq.operators.to_scipy(made.B[0] @ made.B[0].mT)
    dense = made.B[0].to_dense()
    v = np.ones(gram.shape[1])
    np.testing.assert_allclose(gram @ v, (dense @ dense.mT).numpy() @ v, rtol=1e-12)
    assert (made.R[1].to_scipy() @ np.zeros(0)).shape == (0,)


def test_autocast_and_inference_mode_are_refused() -> None:
    made = problem()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="autocast"):
            problem()
        with pytest.raises(RuntimeError, match="autocast"):
            made.hessian @ torch.ones(made.size, dtype=F64)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        problem()


def test_a_module_that_cuts_the_graph_is_named() -> None:
    class Cut(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(x.detach().numpy())

    model = net()
    model.insert(1, Cut())
    with pytest.warns(UserWarning, match="outputs of module '1' do not depend"):
        problem(model)


def test_a_dense_preconditioner_and_wrong_numbers() -> None:
    made = problem()
    inverse = torch.linalg.inv(made.hessian.to_dense())
    assert lq.solve(made, "cg", preconditioner=inverse, rtol=1e-8).iterations <= 2
    with pytest.raises(ValueError, match="max_iterations is 0"):
        lq.solve(made, "cg", max_iterations=0)
    with pytest.raises(ValueError, match="columns is 0"):
        problem(columns=0)
    assert problem(damping=np.float32(0.5)).system.control_cost.uniform == 0.5


def test_split_takes_one_cut_and_refuses_what_is_no_model() -> None:
    assert lq.split(net(), cuts="0")[0].name == "0"
    with pytest.raises(ValueError, match="model is a int"):
        lq.split(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ScriptModule"):
        lq.split(torch.jit.script(net()))


def test_a_control_of_no_width_needs_no_cost() -> None:
    eye = torch.eye(2, dtype=F64)
    made = lq.LQRProblem(
        A=[eye, eye], B=[eye, torch.zeros(2, 0, dtype=F64)], Q=[None, None, eye], R=[1.0, 0.0],
        x0=torch.ones(2, dtype=F64),
    )  # fmt: skip
    steps = [lq.solve(made, method).step for method in ("riccati", "dual", "low_rank", "cg")]
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0])
