"""What structures made of structures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from .base import Structure
from .blueprint import Like
from .saved import SpoiltError, check_positive

C = TypeVar("C", bound="Composite")


def check_parts(structures: Sequence[Structure]) -> None:
    """All parts are structures.

    Raises:
        TypeError: One is not.
    """
    for structure in structures:
        if not isinstance(structure, Structure):
            raise TypeError(
                f"a {type(structure).__name__} was given as a part: give structures, such as "
                "Diagonal(model)."
            )


class Composite(Structure):
    """A structure whose tensors are those of others, under names of its own, and few besides.

    The tensors are shared, not copied: writing into a part writes into the whole.

    Args:
        like: What it is made for.
        structures: The parts.
        own: Tensors that belong to no part.
    """

    structures: tuple[Structure, ...]

    def __init__(
        self, like: Like, structures: Sequence[Structure], own: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(like)
        for structure in structures:
            if (structure.dtype, structure.device) != (self.dtype, self.device):
                raise ValueError(
                    f"a part is {structure.dtype} on {structure.device}, the whole {self.dtype} on "
                    f"{self.device}: make all parts for the same model or problem."
                )
        self._bind(structures, own or {})

    def _key(self, i: int, name: str) -> str:
        """The name here of a tensor of part i."""
        return name

    def _bind(self, structures: Sequence[Structure], own: Mapping[str, Tensor]) -> None:
        tensors = dict(own)
        for i, structure in enumerate(structures):
            for name, tensor in structure.tensors.items():
                key = self._key(i, name)
                if key in tensors:
                    raise ValueError(
                        f"two parts hold a tensor named '{key}': make them one structure."
                    )
                tensors[key] = tensor
        self.structures, self._own, self.tensors = tuple(structures), tuple(own), tensors

    def _with(
        self: C, structures: Sequence[Structure], own: Mapping[str, Tensor] | None = None
    ) -> C:
        """The same composition of other parts."""
        other = self._bare()
        other._bind(structures, own or {})
        return other

    def clone(self: C) -> C:
        """An independent copy."""
        own = {name: self.tensors[name].clone() for name in self._own}
        return self._with([structure.clone() for structure in self.structures], own)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        """As every part has it."""
        for i, structure in enumerate(self.structures):
            given = {name: tensors[self._key(i, name)] for name in structure.tensors}
            try:
                structure.check_values(given)
            except SpoiltError as error:
                raise SpoiltError(self._key(i, error.name), error.what) from None
        for name in self._own:
            check_positive(name, tensors[name])

    def check_alike(self, other: Structure) -> None:
        """As for any structure, and part by part."""
        super().check_alike(other)
        assert isinstance(other, Composite)
        for mine, theirs in zip(self.structures, other.structures, strict=True):
            mine.check_alike(theirs)
