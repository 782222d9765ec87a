"""Errors that callers tell apart, and what cannot be copied."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn


class NotFiniteError(ValueError):
    """A batch, the model, its loss or a product is NaN or infinite.

    `LLQR` skips the step or refresh that meets it; elsewhere it is an error like any other.
    """


class FailedCallError(ValueError):
    """A call that was traced does not take a batch."""


class StaleLayersError(ValueError):
    """The model is no longer the one that was split: `split` it again.

    What keeps a split (`LLQR`, a tangent kernel) does so by itself.
    """


class Unsaved:
    """What belongs to a model and its memory: a pickled or deep copy would compute nothing true."""

    _remedy: ClassVar[str]
    """What it is and what to do instead, for the message."""

    def __copy__(self) -> Any:
        """Shares everything."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refused.

        Raises:
            TypeError: Always, with the remedy.
        """
        raise TypeError(self._remedy)


class FactorizationError(ValueError):
    """A matrix has no Cholesky factor, root or eigenvectors in floating point.

    `LLQR` refuses the refresh that meets it; elsewhere it is an error like any other.
    """
