"""A positive number per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import Parts, Structure
from .blueprint import Like
from .chart import Chart, ElementwiseChart
from .saved import check_positive


class Scalar(Structure):
    """M = c_l I on the parameters of layer l, c_l > 0; a layer is a module that owns parameters.

    Tensors: "{module path}.scale", a scalar; "scale" for the parameters of the model itself.

    Args:
        like: What it is made for.
    """

    kind = "scalar"

    def __init__(self, like: Like) -> None:
        super().__init__(like)
        self.owner = {name: _scale_name(name) for name in self.layout.names}
        for key in dict.fromkeys(self.owner.values()):
            self.tensors[key] = self._proto.new_ones(())

    def times_parts(self, parts: Mapping[str, Tensor]) -> Parts:
        """Every part times the number of its layer."""
        return {name: part * self.tensors[self.owner[name]] for name, part in parts.items()}

    def expand(self, scales: Tensor) -> Tensor:
        """One number per layer, (L,), as one per weight, (P,)."""
        place = {key: i for i, key in enumerate(self.tensors)}
        blocks = zip(self.layout.names, self.layout.sizes, strict=True)
        return torch.cat([scales[place[self.owner[name]]].expand(n) for name, n in blocks])

    def layer_sums(self, flat: Tensor) -> Tensor:
        """The transpose of `expand`: sums of a flat vector (P,) over each layer, (L,)."""
        place = {key: i for i, key in enumerate(self.tensors)}
        sums = torch.stack([part.sum() for part in flat.split(self.layout.sizes)])
        index = [place[self.owner[name]] for name in self.layout.names]
        total = flat.new_zeros(len(place))
        return total.index_add_(0, torch.tensor(index, device=flat.device), sums)

    def _diagonal(self) -> Tensor:
        return self.expand(torch.stack(list(self.tensors.values())))

    def inverse(self) -> Scalar:
        """1 / c_l."""
        other = self._bare()
        other.tensors = {name: 1 / scale for name, scale in self.tensors.items()}
        return other

    def root(self) -> Scalar:
        """sqrt(c_l)."""
        other = self._bare()
        other.tensors = {name: scale.sqrt() for name, scale in self.tensors.items()}
        return other

    def logdet(self) -> Tensor:
        """The sum of log c over all weights."""
        return self._diagonal().double().log().sum()

    @torch.no_grad()
    def scale_(self, c: float) -> None:
        """Multiplies every number by c."""
        self.check_scale(c)
        for scale in self.tensors.values():
            scale.mul_(c)

    @torch.no_grad()
    def blend_(self, other: Scalar, weight: float) -> None:
        """The mean of the numbers."""
        self.check_blend(other, weight)
        for name, scale in self.tensors.items():
            scale.lerp_(other.tensors[name], weight)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        """All numbers are positive."""
        for name, tensor in tensors.items():
            check_positive(name, tensor)

    def charts(self) -> Sequence[Chart]:
        """The numbers themselves."""
        return (_ScaleChart(self),)


class _ScaleChart(ElementwiseChart):
    def __init__(self, structure: Scalar) -> None:
        super().__init__(list(structure.tensors.values()))
        self.structure = structure

    def times(self, phi: Tensor, v: Tensor) -> Tensor:
        return self.structure.expand(phi) * v

    def pull(self, v: Tensor, w: Tensor) -> Tensor:
        return self.structure.layer_sums((v * w).sum(0))

    def mass(self) -> Tensor:
        return self.structure.layer_sums(torch.ones_like(self.structure._diagonal()))


def _scale_name(name: str) -> str:
    path = name.rpartition(".")[0]
    return f"{path}.scale" if path else "scale"
