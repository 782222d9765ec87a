"""The four ways to the exact step that `exact_step.py` compares."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hessian_free import gauss_newton_step
from nets import mlp
from torch import Tensor, nn

import llqr_mf as lq

BATCH, CLASSES, DEPTH = 128, 10, 4

TRAINED = 20
"""Steps of SGD before the exact step, on digits."""


@dataclass
class Answer:
    """A step and how it was found."""

    step: Tensor
    iterations: int
    products: int
    status: str = ""


Batch = tuple[nn.Module, Tensor, Tensor]
Method = Callable[[Batch, float, float, int], Answer]


def make(width: int, device: str, data: str = "random") -> Batch:
    """The net and the batch, the same in every process.

    Args:
        width: Of the input and of every hidden layer.
        device: Where.
        data: "random": weights as drawn, random inputs and labels. "digits": scikit-learn's
            digits, lifted to the width by a random rotation, after `TRAINED` steps of SGD.
    """
    torch.manual_seed(0)
    model, x, y = mlp(width, DEPTH, BATCH, CLASSES, device=device)
    if data == "random":
        return model, x, y
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    lift = torch.linalg.qr(torch.randn(width, 64)).Q if width > 64 else torch.randn(width, 64) / 8
    inputs = torch.tensor(images / 16 - 0.3, dtype=x.dtype) @ lift.mT
    inputs, targets = inputs.to(device), torch.tensor(labels, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(TRAINED):
        part = slice(step % 10 * BATCH, (step % 10 + 1) * BATCH)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[part]), targets[part]).backward()
        optimizer.step()
    optimizer.zero_grad()
    # Samples that no step has seen.
    return model, inputs[-BATCH:].contiguous(), targets[-BATCH:]


def _ours(method: Any) -> Method:
    def run(batch: Batch, damping: float, rtol: float, max_iterations: int) -> Answer:
        model, x, y = batch
        problem = lq.LQRProblem.from_network(
            lq.split(model), x, y, loss="cross_entropy", damping=damping
        )
        limit = {} if method == "dual" else {"max_iterations": max_iterations}
        found = lq.solve(problem, method=method, rtol=rtol, **limit)
        return Answer(found.step, found.iterations, found.products, str(found.status))

    return run


def _curvlinops(batch: Batch, damping: float, rtol: float, max_iterations: int) -> Answer:
    from curvlinops import CGInverseLinearOperator, GGNLinearOperator
    from curvlinops.examples import IdentityLinearOperator

    model, x, y = batch
    parameters, loss = list(model.parameters()), nn.CrossEntropyLoss()
    ggn = GGNLinearOperator(model, loss, parameters, [(x, y)], check_deterministic=False)
    products, multiply = 0, ggn._matmat

    def counted(v: list[Tensor]) -> list[Tensor]:
        nonlocal products
        products += 1
        return multiply(v)

    ggn._matmat = counted
    shapes = [tuple(p.shape) for p in parameters]
    damped = ggn + damping * IdentityLinearOperator(shapes, x.device, x.dtype)
    gradient = torch.autograd.grad(loss(model(x), y), parameters)
    side = torch.cat([g.reshape(-1) for g in gradient]).neg_()
    del gradient
    # Its defaults guard divisions by an absolute 1e-10, which ends progress near 1e-5.
    inverse = CGInverseLinearOperator(
        *(damped,),
        tolerance=rtol,
        eps=1e-30,
        stop_updating_after=rtol / 10,
        max_iter=max_iterations,
        max_tridiag_iter=0,
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with torch.no_grad():
            step = inverse @ side
    # It multiplies its zero start once.
    return Answer(step, products - 1, products, "; ".join(str(w.message)[:60] for w in said))


def _hessian_free(batch: Batch, damping: float, rtol: float, max_iterations: int) -> Answer:
    step, iterations = gauss_newton_step(
        *batch, damping=damping, rtol=rtol, max_iterations=max_iterations
    )
    return Answer(step, iterations, iterations)


SOLVERS: dict[str, Method] = {
    "dual": _ours("dual"),
    "cg": _ours("cg"),
    "curvlinops": _curvlinops,
    "hessian_free": _hessian_free,
}


def true_residual(
    batch: Batch, damping: float, step: Tensor, dtype: torch.dtype = torch.float32
) -> float:
    """|Hu + g| / |g| with the gradient of autograd and the library's product, in one precision."""
    model, x, y = batch
    if dtype != x.dtype:
        width = x.shape[1]
        other = mlp(width, DEPTH, len(x), CLASSES, dtype=dtype, device=str(x.device))[0]
        other.load_state_dict(model.state_dict())
        model, x, step = other, x.to(dtype), step.to(dtype)
    problem = lq.LQRProblem.from_network(
        lq.split(model), x, y, loss="cross_entropy", damping=damping, check=False
    )
    left = torch.zeros(1, problem.size, dtype=dtype, device=x.device)
    with torch.no_grad():
        problem.hessian.multiply_rows(step.unsqueeze(0), left)
    del problem
    loss = nn.functional.cross_entropy(model(x), y)
    place, square = 0, 0.0
    for g in torch.autograd.grad(loss, list(model.parameters())):
        left[0, place : place + g.numel()].add_(g.reshape(-1))
        place += g.numel()
        square += float(g.norm()) ** 2
    return float(left.norm()) / square**0.5


def prepare_memory(
    width: int, method: str, damping: float, rtol: float, device: str, *, tiny: bool = False
) -> Callable[[], None]:
    """For `peak_memory`; three iterations hold as much as three hundred."""
    batch = make(16 if tiny else width, device)

    def run() -> None:
        SOLVERS[method](batch, damping, rtol, 3)

    return run
