"""The layers of a model that goes on changing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from ..errors import StaleLayersError
from .checks import check_same_calls
from .split import Layer, split

T = TypeVar("T")


class KeptLayers:
    """A split that is made again when the model is no longer the one that was split.

    Modes, attributes, modules and hooks may change between two uses; what tells is a run of the
    model beside its layers (`from_network(check=True)`), and its attributes where outputs stay.

    Args:
        model: As in `split`.
        cuts: Likewise.
        example_inputs: Likewise.
        layers: A split of it that there is already.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        cuts: Any = None,
        example_inputs: Any = None,
        layers: Sequence[Layer] | None = None,
    ) -> None:
        self._model, self._cuts, self._example_inputs = model, cuts, example_inputs
        self.layers = self._split() if layers is None else list(layers)

    def use(self, make: Callable[[Sequence[Layer]], T]) -> T:
        """What `make` makes of the layers, which are split again once if it finds them stale.

        Raises:
            StaleLayersError: New layers do not compute what the model does either.
        """
        try:
            check_same_calls(self.layers[0].program)
            return make(self.layers)
        except StaleLayersError:
            self.layers = self._split()
            return make(self.layers)

    def _split(self) -> list[Layer]:
        return split(self._model, cuts=self._cuts, example_inputs=self._example_inputs)
