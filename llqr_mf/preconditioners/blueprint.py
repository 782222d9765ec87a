"""What a structure is made for: the layout of a step, dtype, device and vocabulary sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from ..layout import Layout, check_real

if TYPE_CHECKING:
    from ..problem import LQRProblem
    from ..streamed import StreamedProblem
    from .base import Structure

Like: TypeAlias = (
    "LQRProblem | StreamedProblem | nn.Module | Mapping[str, Tensor] | Structure | Blueprint"
)
"""Whatever tells which parameters a step has."""


@dataclass(frozen=True, eq=False)
class Blueprint:
    """The parameters of a step.

    Args:
        layout: Their names and shapes, in flat order.
        proto: Carries the dtype (float32 at least) and device of a structure's tensors.
        vocabulary: For parameters with a vocabulary side, which axis that is. A structure keeps
            only a diagonal there.
    """

    layout: Layout
    proto: Tensor
    vocabulary: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of(like: Any) -> Blueprint:
        """The blueprint of a problem, a model, named tensors or another structure.

        Raises:
            TypeError: It is none of these.
            ValueError: It has no trainable parameter.
        """
        if isinstance(like, Blueprint):
            return like
        found = getattr(like, "blueprint", None)
        if isinstance(found, Blueprint):
            return found
        if isinstance(like, nn.Module):
            named: dict[str, Tensor] = {n: p for n, p in like.named_parameters() if p.requires_grad}
            return _of_tensors(named, vocabulary_sides(like))
        if isinstance(like, Mapping):
            return _of_tensors(dict(like), {})
        layout = getattr(like, "layout", None)
        if isinstance(layout, Layout):
            proto = torch.empty(0, dtype=_wide(like.dtype), device=like.device)
            origin = getattr(like, "origin", None)
            layers = getattr(like, "_layers", None) if origin is None else origin.layers
            sides = {} if layers is None else vocabulary_sides(layers[0].program.model)
            return Blueprint(layout, proto, sides)
        raise TypeError(
            f"a structure is made for a problem, a model, a mapping of named tensors or another "
            f"structure, not for a {type(like).__name__}."
        )

    def restricted(self, names: Any) -> Blueprint:
        """The part with these parameters, in flat order."""
        kept = [
            (n, s)
            for n, s in zip(self.layout.names, self.layout.shapes, strict=True)
            if n in set(names)
        ]
        layout = Layout(tuple(n for n, _ in kept), tuple(s for _, s in kept))
        return Blueprint(layout, self.proto, self.vocabulary)


def vocabulary_sides(model: nn.Module) -> dict[str, int]:
    """Axis 0 of every embedding, and of every Linear whose outputs are as many as its rows."""
    rows = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    sides: dict[str, int] = {}
    for path, module in model.named_modules():
        embeds = isinstance(module, nn.Embedding)
        if embeds or (isinstance(module, nn.Linear) and module.out_features in rows):
            sides[f"{path}.weight" if path else "weight"] = 0
    return sides


def _of_tensors(named: dict[str, Tensor], vocabulary: Mapping[str, int]) -> Blueprint:
    if not named:
        raise ValueError("there is no trainable parameter: give one with requires_grad=True.")
    check_real(named.items())
    first = next(iter(named.values()))
    dtype = first.dtype
    for tensor in named.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    layout = Layout(tuple(named), tuple(tuple(t.shape) for t in named.values()))
    return Blueprint(layout, torch.empty(0, dtype=_wide(dtype), device=first.device), vocabulary)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
