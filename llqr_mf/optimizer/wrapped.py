"""The base optimizer's step, on preconditioned gradients or itself preconditioned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..preconditioners.base import Structure
from ..preconditioners.direct_sum import leaves
from ..preconditioners.identity import Identity
from .bookkeeping import Timings
from .graft import Graft, clip_kl, graft_to_layers
from .hooks import step_of_base
from .running_mean import all_finite

Precondition = Literal["gradient", "update"]


class WrappedStep:
    """One step of the base optimizer through M; NaN and infinity change nothing.

    Args:
        named: The model's parameters.
        base: The base optimizer.
        structure: M. What its identity stands on is left to the base.
        timings: Of "apply" and "base".
        graft: See `LLQR`.
        kl_limit: See `LLQR`.
        precondition: See `LLQR`.
    """

    def __init__(
        self,
        named: Mapping[str, Tensor],
        base: Optimizer,
        structure: Structure,
        timings: Timings,
        *,
        graft: Graft,
        kl_limit: float,
        precondition: Precondition,
    ) -> None:
        self.base, self.timings = base, timings
        self.parts = [part for part in leaves(structure) if not isinstance(part, Identity)]
        self.parameters = {n: named[n] for part in self.parts for n in part.layout.names}
        self.names = {id(p): n for n, p in named.items()}
        self.graft, self.kl_limit, self.precondition = graft, kl_limit, precondition

    @torch.no_grad()
    def __call__(self) -> str:
        """Steps; returns why not, or nothing."""
        gradients, others = self._gradients()
        if self.precondition == "gradient":
            return self._gradient(gradients, others)
        return self._update(gradients, others)

    def _gradient(self, gradients: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> str:
        """The base step, of which M g is the gradient; `.grad` is g again afterwards."""
        with self.timings.of("apply"):
            made = self._times(gradients)
            self._scale(gradients, made, self._rates())
            # NaN and infinity in a gradient survive M and the scaling.
            if not all_finite([*made.values(), *others.values()]):
                return _blame({**gradients, **others}, "M times the gradient")
        try:
            for name, part in made.items():
                self.parameters[name].grad = part
            with self.timings.of("base"):
                step_of_base(self.base)
        finally:
            for name, gradient in gradients.items():
                self.parameters[name].grad = gradient
        return ""

    def _update(self, gradients: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> str:
        """M times the base step, and weight decay by itself."""
        if not all_finite([*gradients.values(), *others.values()]):
            return _blame({**gradients, **others}, "a gradient")
        before = {name: self.parameters[name].detach().clone() for name in gradients}
        with self._without_decay(), self.timings.of("base"):
            step_of_base(self.base)
        with self.timings.of("apply"):
            updates = {name: self.parameters[name] - old for name, old in before.items()}
            made = self._times(updates)
            self._scale(updates, made, dict.fromkeys(made, 1.0))
            finite = all_finite(made.values())
            groups, rates = self._groups(), self._rates()
            for name, old in before.items():
                p = self.parameters[name].copy_(old)
                if finite:
                    decay = float(groups[name].get("weight_decay", 0.0))
                    p.mul_(1 - rates[name] * decay).add_(made[name])
        return "" if finite else "M times the update is NaN or infinite"

    def _gradients(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of the parameters in the base optimizer: those that M knows, and others.

        Raises:
            ValueError: One of the former is sparse.
        """
        known: dict[str, Tensor] = {}
        others: dict[str, Tensor] = {}
        for i, group in enumerate(self.base.param_groups):
            for j, p in enumerate(group["params"]):
                gradient, name = p.grad, self.names.get(id(p), f"group {i}, parameter {j}")
                if gradient is None:
                    continue
                if name not in self.parameters:
                    others[name] = gradient.coalesce().values() if gradient.is_sparse else gradient
                elif gradient.is_sparse:
                    raise ValueError(
                        f"the gradient of '{name}' is sparse: make the embedding with "
                        f"sparse=False, or leave it out of M with the rule ('{name}', None)."
                    )
                else:
                    known[name] = gradient
        return known, others

    def _times(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """M times parts by name; a parameter without one counts as zero."""
        made: dict[str, Tensor] = {}
        for part in self.parts:
            names = [name for name in part.layout.names if name in given]
            if not names:
                continue
            rows = {}
            for name in part.layout.names:
                p = self.parameters[name]
                rows[name] = (given[name] if name in given else torch.zeros_like(p)).unsqueeze(0)
            product = part.precondition(rows)
            # Contiguous, as torch's fused loops over parameters need them.
            made.update({name: product[name].squeeze(0).contiguous() for name in names})
        return made

    def _scale(
        self, parts: Mapping[str, Tensor], made: dict[str, Tensor], rates: Mapping[str, float]
    ) -> None:
        if made and self.graft == "layer":
            graft_to_layers(parts, made)
        elif made and self.graft == "kl":
            clip_kl(parts, made, rates, self.kl_limit)

    @contextmanager
    def _without_decay(self) -> Iterator[None]:
        """The base optimizer with no weight decay on what M knows."""
        groups = self.base.param_groups
        parted = [(group, part) for group in groups for part in self._parted(group)]
        self.base.param_groups = [part for _, part in parted]
        try:
            yield
        finally:
            for group, part in parted:
                kept = {"params": group["params"]}
                if "weight_decay" in group:
                    kept["weight_decay"] = group["weight_decay"]
                group.update({**part, **kept})
            self.base.param_groups = groups

    def _parted(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        known = [p for p in group["params"] if self.names.get(id(p)) in self.parameters]
        others = [p for p in group["params"] if self.names.get(id(p)) not in self.parameters]
        made = [{**group, "params": others}] if others else []
        if known:
            made.append({**group, "params": known})
            if "weight_decay" in group:
                made[-1]["weight_decay"] = 0.0
        return made

    def _groups(self) -> dict[str, dict[str, Any]]:
        """The base optimizer's group of every parameter that M knows."""
        return {
            name: group
            for group in self.base.param_groups
            for p in group["params"]
            if (name := self.names.get(id(p))) in self.parameters and name is not None
        }

    def _rates(self) -> dict[str, float]:
        if self.graft != "kl" and self.precondition == "gradient":
            return {}
        found = {name: group.get("lr") for name, group in self._groups().items()}
        return {name: 1.0 if lr is None else float(lr) for name, lr in found.items()}


def _blame(gradients: Mapping[str, Tensor], otherwise: str) -> str:
    """Which gradient is not finite."""
    for name, gradient in gradients.items():
        if not all_finite([gradient]):
            return f"the gradient of '{name}' is NaN or infinite"
    return f"{otherwise} is NaN or infinite"
