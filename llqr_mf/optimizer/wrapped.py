"""The base optimizer's step, on preconditioned gradients or itself preconditioned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..preconditioners.base import Structure
from .graft import Graft, clip_kl, graft_to_layers

Precondition = Literal["gradient", "update"]


class WrappedStep:
    """One step of the base optimizer through M; NaN and infinity change nothing.

    Args:
        parameters: Those that M acts on, by name.
        base: The base optimizer.
        structure: M.
        clock: Times a phase by name.
        graft: See `LLQR`.
        kl_limit: See `LLQR`.
        precondition: See `LLQR`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        base: Optimizer,
        structure: Structure,
        clock: Callable[[str], AbstractContextManager[None]],
        *,
        graft: Graft,
        kl_limit: float,
        precondition: Precondition,
    ) -> None:
        self.parameters, self.base, self.structure = parameters, base, structure
        self.clock, self.graft, self.kl_limit = clock, graft, kl_limit
        self.precondition = precondition

    @torch.no_grad()
    def __call__(self) -> str:
        """Steps; returns why not, or nothing."""
        return self._gradient() if self.precondition == "gradient" else self._update()

    def _gradient(self) -> str:
        """The base step, of which M g is the gradient; `.grad` is g again afterwards."""
        with self.clock("apply"):
            gradients = self._gradients()
            made = self._times(gradients)
            if not _finite(made):
                return "a gradient is NaN or infinite"
            self._scale(gradients, made)
        try:
            for name, part in made.items():
                self.parameters[name].grad = part
            with self.clock("base"):
                self.base.step()
        finally:
            for name, gradient in gradients.items():
                self.parameters[name].grad = gradient
        return ""

    def _update(self) -> str:
        """M times the base step, and weight decay by itself."""
        gradients = self._gradients()
        if not _finite(gradients):
            return "a gradient is NaN or infinite"
        before = {name: self.parameters[name].detach().clone() for name in gradients}
        groups = self._groups()
        with self._without_decay() as decays, self.clock("base"):
            self.base.step()
        with self.clock("apply"):
            updates = {name: self.parameters[name] - old for name, old in before.items()}
            made = self._times(updates)
            finite = _finite(made)
            if finite:
                self._scale(updates, made)
            rates = self._rates()
            for name, old in before.items():
                p = self.parameters[name].copy_(old)
                if finite:
                    p.mul_(1 - rates[name] * decays[groups[name]]).add_(made[name])
        return "" if finite else "an update is NaN or infinite"

    def _gradients(self) -> dict[str, Tensor]:
        """Gradients of the parameters that the base optimizer trains and M knows."""
        trained = self._groups()
        found: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            if p.grad is None or name not in trained:
                continue
            if p.grad.is_sparse:
                raise ValueError(
                    f"the gradient of '{name}' is sparse: make the embedding with sparse=False."
                )
            found[name] = p.grad
        return found

    def _times(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """M times parts by name; a parameter without one counts as zero."""
        rows = {
            name: (parts[name] if name in parts else torch.zeros_like(p)).detach().unsqueeze(0)
            for name, p in self.parameters.items()
        }
        product = self.structure.precondition(rows)
        return {name: product[name].squeeze(0) for name in parts}

    def _scale(self, parts: Mapping[str, Tensor], made: dict[str, Tensor]) -> None:
        if self.graft == "layer":
            layers: dict[str, list[str]] = {}
            for name in made:
                layers.setdefault(name.rpartition(".")[0], []).append(name)
            graft_to_layers(parts, made, list(layers.values()))
        elif self.graft == "kl":
            clip_kl(parts, made, self._rates(), self.kl_limit)

    @contextmanager
    def _without_decay(self) -> Iterator[list[float]]:
        groups = self.base.param_groups
        decays = [float(group.get("weight_decay", 0)) for group in groups]
        held = [group.get("weight_decay") for group in groups]
        try:
            for group in groups:
                if "weight_decay" in group:
                    group["weight_decay"] = 0
            yield decays
        finally:
            for group, decay in zip(groups, held, strict=True):
                if "weight_decay" in group:
                    group["weight_decay"] = decay

    def _groups(self) -> dict[str, int]:
        """Which of the base optimizer's groups holds a parameter."""
        names = {id(p): name for name, p in self.parameters.items()}
        return {
            names[id(p)]: i
            for i, group in enumerate(self.base.param_groups)
            for p in group["params"]
            if id(p) in names
        }

    def _rates(self) -> dict[str, float]:
        groups = self.base.param_groups
        return {n: float(groups[i].get("lr", 1.0)) for n, i in self._groups().items()}


def _finite(parts: Mapping[str, Tensor]) -> bool:
    """Whether all are finite; one reading of the device."""
    if not parts:
        return True
    norms = torch._foreach_norm(list(parts.values()), float("inf"))
    return bool(torch.stack([norm.float() for norm in norms]).sum().isfinite())
