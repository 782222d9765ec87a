"""The optimizers of the autoencoder benchmark, each as one function of a batch, and their grids.

Weight decay is 0 throughout: what is measured is how far the training loss falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from llqr_mf.optimizer import LLQR, Recipe, Subspace, burn_in

from .task import PIXELS, loss

Settings = Mapping[str, Any]
Step = Callable[[Tensor], Any]
WARM_UP = 20
SCHEDULES = ("linear", "cosine", "constant", "late")


def factor(schedule: str, steps: int, warm_up: int = WARM_UP) -> Callable[[int], float]:
    """What the learning rate is multiplied by at a step, after a linear warm-up.

    "late": constant, then a linear fall over the last 15 % of the steps.
    """
    fall: dict[str, Callable[[float], float]] = {
        "linear": lambda share: 1 - share,
        "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
        "constant": lambda share: 1.0,
        "late": lambda share: min(1.0, (1 - share) / 0.15),
    }
    return lambda t: min(1.0, (t + 1) / max(1, warm_up)) * fall[schedule](min(1.0, t / steps))


def sgd(model: nn.Module, chosen: Settings, steps: int) -> Step:
    """SGD with momentum."""
    return _loop(model, [_sgd(model, chosen)], chosen, steps)


def adamw(model: nn.Module, chosen: Settings, steps: int) -> Step:
    """AdamW."""
    return _loop(model, [_adamw(model.parameters(), chosen)], chosen, steps)


def muon(model: nn.Module, chosen: Settings, steps: int) -> Step:
    """Muon on the matrices, AdamW on the biases."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim < 2]
    both = [
        Muon(matrices, lr=chosen["lr"], momentum=chosen["momentum"], weight_decay=0.0),
        AdamW(biases, lr=chosen["bias lr"], weight_decay=0.0),
    ]
    return _loop(model, both, chosen, steps)


def soap(model: nn.Module, chosen: Settings, steps: int) -> Step:
    """SOAP of pytorch_optimizer."""
    from pytorch_optimizer import SOAP

    optimizer = SOAP(
        model.parameters(),
        lr=chosen["lr"],
        betas=chosen["betas"],
        weight_decay=0.0,
        precondition_frequency=chosen["frequency"],
    )
    return _loop(model, [optimizer], chosen, steps)


def llqr_subspace(model: nn.Module, chosen: Settings, steps: int) -> Step:
    """LLQR with the step by the LQR objective.

    `lq`'s loss is the mean over pixels too, so dampings given per image are divided by the pixels.
    """
    base = SGD(model.parameters(), lr=1.0)
    optimizer = LLQR(
        *(model, base),
        loss="bce_with_logits",
        step="subspace",
        recipe=Recipe(
            damping=chosen["damping"] / PIXELS, ema=chosen["ema"], samples=chosen["samples"]
        ),
        subspace=Subspace(
            damping=chosen["model damping"] / PIXELS,
            shrink=chosen["shrink"],
            averaging=chosen["averaging"],
            memory=chosen["memory"],
        ),
        refresh_every=burn_in(5, every=1, then=chosen["period"]),
        max_state=None,
    )
    scheduler = LambdaLR(optimizer, factor(chosen["schedule"], steps, warm_up=0))

    def step(x: Tensor) -> None:
        optimizer.step(x, x)
        scheduler.step()

    return step


def llqr_adamw(model: nn.Module, chosen: Settings, steps: int) -> Step:
    """LLQR around AdamW."""
    return _wrapped(model, _adamw(model.parameters(), chosen), chosen, steps)


def llqr_sgd(model: nn.Module, chosen: Settings, steps: int) -> Step:
    """LLQR around SGD with momentum."""
    return _wrapped(model, _sgd(model, chosen), chosen, steps)


def _sgd(model: nn.Module, chosen: Settings) -> SGD:
    return SGD(model.parameters(), lr=chosen["lr"], momentum=chosen["momentum"])


def _adamw(parameters: Any, chosen: Settings) -> AdamW:
    return AdamW(parameters, lr=chosen["lr"], betas=chosen["betas"], weight_decay=0.0)


def _wrapped(model: nn.Module, base: Optimizer, chosen: Settings, steps: int) -> Step:
    """The two lines that LLQR adds to a loop, with its default grafting."""
    optimizer = LLQR(
        *(model, base),
        loss="bce_with_logits",
        precondition=chosen["precondition"],
        recipe=Recipe(damping=chosen["damping"] / PIXELS),
        refresh_every=burn_in(5, every=1, then=10),
        max_state=None,
    )
    plain = _loop(model, [optimizer], chosen, steps)

    def step(x: Tensor) -> None:
        if optimizer.refresh_due:
            optimizer.refresh(x, x)
        plain(x)

    return step


def _loop(model: nn.Module, optimizers: list[Optimizer], chosen: Settings, steps: int) -> Step:
    """Backward pass, step and schedule."""
    shape = factor(chosen["schedule"], steps)
    schedulers = [LambdaLR(optimizer, shape) for optimizer in optimizers]

    def step(x: Tensor) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(model(x), x).backward()
        for optimizer in optimizers:
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()

    return step


CONTESTANTS: dict[str, Callable[[nn.Module, Settings, int], Step]] = {
    "SGD": sgd,
    "AdamW": adamw,
    "Muon": muon,
    "SOAP": soap,
    "LLQR(SGD)": llqr_sgd,
    "LLQR(AdamW)": llqr_adamw,
    "LLQR subspace": llqr_subspace,
}

GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "SGD": {
        "lr": (0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15),
        "schedule": SCHEDULES,
        "momentum": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    },
    "AdamW": {
        "lr": (0.002, 0.004, 0.006, 0.01, 0.015, 0.02),
        "schedule": SCHEDULES,
        "betas": ((0.6, 0.8), (0.7, 0.8), (0.7, 0.9), (0.8, 0.9), (0.9, 0.9), (0.9, 0.99)),
    },
    "Muon": {
        "lr": (0.01, 0.02, 0.04, 0.06, 0.09, 0.13),
        "schedule": SCHEDULES,
        "bias lr": (0.003, 0.01, 0.03, 0.06, 0.1),
        "momentum": (0.8, 0.9, 0.95),
    },
    "SOAP": {
        "lr": (0.02, 0.03, 0.045, 0.06, 0.08, 0.1),
        "schedule": SCHEDULES,
        "betas": ((0.7, 0.7), (0.7, 0.8), (0.8, 0.8), (0.8, 0.9), (0.9, 0.9), (0.95, 0.95)),
        "frequency": (1, 2),
    },
    "LLQR(SGD)": {
        "lr": (0.01, 0.02, 0.05, 0.1, 0.2),
        "schedule": SCHEDULES,
        "precondition": ("gradient", "update"),
        "momentum": (0.9, 0.95, 0.98),
        "damping": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    },
    "LLQR(AdamW)": {
        "lr": (0.01, 0.02, 0.03, 0.045, 0.06, 0.09),
        "schedule": SCHEDULES,
        "precondition": ("gradient", "update"),
        "betas": ((0.9, 0.9), (0.9, 0.95), (0.9, 0.99)),
        "damping": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    },
    "LLQR subspace": {
        "shrink": (0.2, 0.3, 0.4, 0.5, 0.7, 1.0),
        "averaging": (0.6, 0.65, 0.7, 0.8),
        "damping": (1e-4, 3e-4, 1e-3),
        "ema": (0.6, 0.7, 0.8, 0.9),
        "period": (3, 5, 8, 10),
        "model damping": (3e-3, 1e-2, 3e-2),
        "memory": (1, 2),
        "schedule": SCHEDULES,
        "samples": (1, 4),
    },
}
STARTS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "schedule": "late", "momentum": 0.8},
    "AdamW": {"lr": 0.01, "schedule": "late", "betas": (0.7, 0.8)},
    "Muon": {"lr": 0.09, "schedule": "linear", "bias lr": 0.06, "momentum": 0.9},
    "SOAP": {"lr": 0.06, "schedule": "linear", "betas": (0.8, 0.8), "frequency": 1},
    "LLQR(SGD)": {
        **{"lr": 0.02, "schedule": "late", "precondition": "update"},
        **{"momentum": 0.95, "damping": 1e-4},
    },
    "LLQR(AdamW)": {
        **{"lr": 0.045, "schedule": "linear", "precondition": "gradient"},
        **{"betas": (0.9, 0.95), "damping": 3e-5},
    },
    "LLQR subspace": {
        **{"shrink": 0.4, "averaging": 0.7, "damping": 3e-4},
        **{"ema": 0.8, "period": 5, "model damping": 1e-2, "memory": 1},
        **{"schedule": "late", "samples": 4},
    },
}


def at_end(name: str, chosen: Settings) -> list[str]:
    """Axes on whose end a choice lies: there the grid may be too short."""
    ordered = {
        axis: values
        for axis, values in GRIDS[name].items()
        if len(values) > 2 and not isinstance(values[0], str)
    }
    return [axis for axis, v in ordered.items() if chosen[axis] in (v[0], v[-1])]
