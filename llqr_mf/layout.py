"""The flat layout of a step: which parameter stands where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from .operators.tangent import Shape


@dataclass(frozen=True)
class Layout:
    """Blocks of a flat step, in order.

    Args:
        names: Parameter names.
        shapes: Their shapes.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]

    @property
    def sizes(self) -> list[int]:
        """Length of every block."""
        return [math.prod(shape) for shape in self.shapes]

    def select(self, patterns: str | Sequence[str]) -> tuple[int, ...]:
        """The blocks whose names match any of some patterns, in flat order.

        A pattern is that of a shell (`*.weight`, `encoder.layer.?.attention*`), or the name of a
        module, which stands for all its parameters.

        Raises:
            ValueError: A pattern matches nothing.
        """
        wanted = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        found: set[int] = set()
        for pattern in wanted:
            here = {
                i
                for i, name in enumerate(self.names)
                if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
            }
            if not here:
                raise ValueError(f"no parameter matches '{pattern}': the names are {self.names}.")
            found |= here
        return tuple(sorted(found))

    def places(self, blocks: Sequence[int]) -> Tensor:
        """Where some blocks stand in a flat step, as indices."""
        ranges = torch.arange(sum(self.sizes)).split(self.sizes)
        return torch.cat([ranges[i] for i in blocks])

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a flat step (P,) by name, in the parameters' shapes (views)."""
        size = sum(self.sizes)
        if flat.shape != (size,):
            raise ValueError(f"a flat step has shape ({size},), not {tuple(flat.shape)}.")
        parts = flat.split(self.sizes)
        named = zip(self.names, parts, self.shapes, strict=True)
        return {name: part.reshape(shape) for name, part, shape in named}

    def split_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """The parts of flat rows (k, P) by name, each (k, *shape) (views)."""
        parts = rows.split(self.sizes, dim=1)
        named = zip(self.names, parts, self.shapes, strict=True)
        return {name: part.reshape(len(rows), *shape) for name, part, shape in named}

    def flatten(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The flat step (P,) of parts by name."""
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in parts:
                raise ValueError(f"the part '{name}' is missing: a step has {self.names}.")
            if tuple(parts[name].shape) != tuple(shape):
                raise ValueError(
                    f"the part '{name}' has shape {tuple(parts[name].shape)}, not {tuple(shape)}."
                )
        return torch.cat([parts[name].reshape(-1) for name in self.names])


def check_real(named: Iterable[tuple[str, Tensor]]) -> None:
    """Trained tensors must not be complex: a step is a vector of real numbers.

    Raises:
        ValueError: With the parameter's name, and the remedy.
    """
    for name, tensor in named:
        if tensor.is_complex():
            raise ValueError(
                f"parameter '{name}' is {tensor.dtype}, and steps are real: hold its real and "
                "imaginary parts in one real parameter, nn.Parameter(torch.view_as_real(w)), and "
                "make the complex one in forward with torch.view_as_complex; or freeze it."
            )
