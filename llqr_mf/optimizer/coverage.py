"""Which parameter is preconditioned by what, and which is not and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from ..preconditioners.base import Structure
from ..preconditioners.direct_sum import leaves
from ..preconditioners.identity import Identity


@dataclass(frozen=True)
class Covered:
    """One parameter.

    Args:
        name: In the model, or "?" for one that the model does not have.
        shape: Its shape.
        structure: The kind of structure, or None where no preconditioner acts.
        reason: Why, for None.
        trained: Whether the base optimizer trains it.
    """

    name: str
    shape: tuple[int, ...]
    structure: str | None
    reason: str = ""
    trained: bool = True


@dataclass(frozen=True)
class Coverage:
    """All parameters of a model and of a base optimizer."""

    parameters: tuple[Covered, ...]

    @property
    def passed_through(self) -> tuple[Covered, ...]:
        """Those that the base optimizer trains without a preconditioner."""
        return tuple(p for p in self.parameters if p.trained and p.structure is None)

    @property
    def trains_model(self) -> bool:
        """Whether the base optimizer trains any parameter of the model."""
        return any(p.trained and p.name != "?" for p in self.parameters)

    def check(self, strict: bool) -> None:
        """Whether there is something to train, and to `strict` with a preconditioner throughout.

        Raises:
            ValueError: There is not.
        """
        if not self.trains_model:
            raise ValueError("base trains no parameter of model: make it of model.parameters().")
        if strict and (left := self.passed_through):
            raise ValueError(
                f"strict: '{left[0].name}' has no preconditioner ({left[0].reason}); give it a "
                "structure, or use strict=False."
            )

    def __str__(self) -> str:
        """One line per parameter."""
        width = max([9, *(len(p.name) for p in self.parameters)])
        lines = [f"{'parameter':{width}}  {'shape':>18}  structure"]
        for p in self.parameters:
            what = p.structure or f"- ({p.reason})"
            lines.append(f"{p.name:{width}}  {tuple(p.shape)!s:>18}  {what}")
        return "\n".join(lines)


def coverage(model: nn.Module, base: Optimizer, structure: Structure) -> Coverage:
    """The table of a model, its base optimizer and a structure."""
    kinds = {
        name: part.kind
        for part in leaves(structure)
        if not isinstance(part, Identity)
        for name in part.layout.names
    }
    owned = {id(p) for group in base.param_groups for p in group["params"]}
    table = []
    for name, p in model.named_parameters():
        trained = p.requires_grad and id(p) in owned
        reason = ""
        if not p.requires_grad:
            reason = "frozen"
        elif not trained:
            reason = "not in the base optimizer"
        elif name not in kinds:
            reason = "identity"
        kind = None if reason else kinds[name]
        table.append(Covered(name, tuple(p.shape), kind, reason, trained))
    known = {id(p) for p in model.parameters()}
    for group in base.param_groups:
        for p in group["params"]:
            if id(p) not in known:
                table.append(Covered("?", tuple(p.shape), None, "no parameter of the model"))
    return Coverage(tuple(table))
