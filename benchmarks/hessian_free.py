"""The peer that everybody writes: Hessian-free Gauss-Newton in plain torch.

Products by double backward over one graph that is kept, cross-entropy's Hessian in closed form, and
textbook conjugate gradients on one flat vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gauss_newton_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    damping: float,
    rtol: float,
    max_iterations: int = 1000,
) -> tuple[Tensor, int]:
    """Solves (G + damping I) u = -g of the mean cross-entropy; the step, flat, and iterations."""
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    outputs = model(x)
    loss = nn.functional.cross_entropy(outputs, y)
    gradient = _flat(torch.autograd.grad(loss, parameters, retain_graph=True))
    probabilities = outputs.detach().softmax(dim=1)
    # J'w is linear in w, so its derivative along v is (Jv)'.
    w = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(outputs, parameters, w, create_graph=True)

    def product(v: Tensor) -> Tensor:
        parts = [part.view_as(p) for part, p in zip(v.split(sizes), parameters, strict=True)]
        (pushed,) = torch.autograd.grad(pulled, w, parts, retain_graph=True)
        curved = probabilities * pushed
        curved -= probabilities * curved.sum(dim=1, keepdim=True)
        curved /= len(x)
        back = torch.autograd.grad(outputs, parameters, curved, retain_graph=True)
        return _flat(back).add_(v, alpha=damping)

    u = torch.zeros_like(gradient)
    r = -gradient
    p = r.clone()
    rr = r.dot(r)
    enough = rtol**2 * rr
    iterations = 0
    while rr > enough and iterations < max_iterations:
        q = product(p)
        alpha = rr / p.dot(q)
        u.add_(alpha * p)
        r.sub_(alpha * q)
        rr, old = r.dot(r), rr
        p.mul_(rr / old).add_(r)
        iterations += 1
    return u, iterations


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
