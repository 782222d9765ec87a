"""Noticing that the weights or the batch changed after they were linearised."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..operators.stage import Look

WIDTH = 2039
"""Numbers in a checksum, and the most that a tensor is compared entry by entry with: a prime, so
that rows which trade places land on other numbers."""

GLANCE = 61
"""Entries of a tensor that a glance compares, as far apart as can be."""


class Snapshot:
    """What some tensors were.

    A linearisation shares the weights' memory, so writing to them changes its products. Torch
    counts such writes; when the count has moved, a checksum of all bits tells a step from a step
    that was taken back.

    Args:
        tensors: Pairs (name, tensor).
        model: Whose tensors they are, if one that another was put in place of is to be noticed.
    """

    def __init__(
        self, tensors: Iterable[tuple[str, Tensor]], model: nn.Module | None = None
    ) -> None:
        self._model = model
        self._held = [(name, tensor, _checksum(tensor)) for name, tensor in tensors]
        self._versions = [_version(tensor) for _, tensor, _ in self._held]
        views = [_spread(tensor) for _, tensor, _ in self._held]
        self._glimpses = [(view, view.clone()) for view in views]

    def changed(self, *, look: Look = "count") -> str | None:
        """The name of the first tensor that is not what it was.

        Args:
            look: At what where the count has not moved. It does not for writes to `.data`, where
                `.data` was replaced (`vector_to_parameters` does so), nor for the steps of fused
                optimizers. "count": at nothing. "glance": at some entries, of which such a step
                leaves none. "all": at every entry, which reads all weights.
        """
        now: dict[str, Tensor] | None = None
        if self._model is not None:
            now = dict(self._model.named_buffers(remove_duplicate=False))
            now |= dict(self._model.named_parameters(remove_duplicate=False))
        for i, (name, tensor, before) in enumerate(self._held):
            current = tensor if now is None else now.get(name)
            if current is not tensor:
                if current is None or not _same(current, before):
                    return name
                continue
            version = _version(tensor)
            if version is not None and version == self._versions[i] and look != "all":
                if look == "count" or torch.equal(*self._glimpses[i]):
                    continue
            if not _same(tensor, before):
                return name
            self._versions[i] = version
        return None

    def check(self, *, look: Look = "count") -> None:
        """Raises if a tensor is not what it was.

        Args:
            look: See `changed`.

        Raises:
            RuntimeError: With the tensor's name, and the remedy.
        """
        name = self.changed(look=look)
        if name is not None:
            raise RuntimeError(
                f"{name} was written to after the problem was made, and the problem shares its "
                "memory: make a new problem at the new point, or put the old values back."
            )


def _spread(tensor: Tensor) -> Tensor:
    """Some entries, as a view where the tensor's memory has no gaps."""
    plain = tensor.detach()
    flat = plain.permute(_by_stride(plain)).reshape(-1)
    some = flat[:: max(1, len(flat) // GLANCE)]
    # A copy would be held whole by a view of it.
    return some if flat.data_ptr() == plain.data_ptr() else some.clone()


def _by_stride(tensor: Tensor) -> list[int]:
    """The axes in the order of memory."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def _same(tensor: Tensor, before: Tensor) -> bool:
    now = _checksum(tensor)
    # NaN is as it was where its bits are.
    alike = now.dtype == before.dtype and now.device == before.device and now.shape == before.shape
    return alike and bool((_bits(now) == _bits(before)).all())


def _checksum(tensor: Tensor) -> Tensor:
    """A copy of a small tensor, and of a large one the sums of its bits WIDTH places apart."""
    flat = _flat(tensor)
    if len(flat) <= WIDTH:
        return flat.clone()
    # Eight bytes as one number: sums that wrap around lose nothing, in any order.
    even = len(flat) * flat.element_size() // 8 * 8 // flat.element_size()
    words = flat[:even].view(torch.int64)
    whole = len(words) // WIDTH * WIDTH
    made = torch.zeros(WIDTH, dtype=torch.int64, device=flat.device)
    if whole:
        made += words[:whole].view(-1, WIDTH).sum(0)
    made[: len(words) - whole] += words[whole:]
    rest = _bits(flat[even:])
    return torch.cat([made, rest.to(torch.int64)])


def _flat(tensor: Tensor) -> Tensor:
    """All entries in a row, in the order of their memory where that saves a copy."""
    plain = tensor.detach()
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    flat = plain.permute(_by_stride(plain)).reshape(-1)
    return flat if flat.storage_offset() * flat.element_size() % 8 == 0 else flat.clone()


def _bits(flat: Tensor) -> Tensor:
    """The entries of a vector as whole numbers of their size."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return flat.view(sizes.get(flat.element_size(), torch.int64))
