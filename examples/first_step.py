"""Ten exact Gauss-Newton steps that all go down: the shortest loop that controls its steps."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import llqr_mf as lq

STEPS = 10


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[list[float], list[str]]:
    """Damping by the reduction ratio, and half the step where it does not go down."""
    layers, rule, losses, ends = lq.split(model), lq.LevenbergMarquardt(1e-2), [], []
    for _ in range(STEPS):
        problem = lq.LQRProblem.from_network(layers, x, y, loss="mse", damping=rule.damping)
        solution, before, scale = lq.solve(problem), float(problem.origin.loss_value), 1.0
        lq.apply_step_(problem, solution)
        after = loss_of(model, x, y)
        rule = rule.updated(actual=before - after, predicted=float(solution.model_decrease))
        while not after < before and scale > 1e-6:
            scale /= 2
            lq.apply_step_(problem, solution, scale=-scale)  # back to `scale` of the step
            after = loss_of(model, x, y)
        print(f"{solution.status.code.value}: loss {before:.3g} -> {after:.3g}")
        losses, ends = [*losses, before], [*ends, solution.status.code.value]
    return [*losses, after], ends


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean square error."""
    with torch.no_grad():
        return float(nn.functional.mse_loss(model(x), y))


if __name__ == "__main__":
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.data[:384] / 16)  # float64
    y = torch.tensor(digits.target[:384]).double().unsqueeze(1) / 4.5 - 1
    train(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).double(), x, y)
