"""Errors that callers tell apart."""


class NotFiniteError(ValueError):
    """A batch, the model, its loss or a product is NaN or infinite.

    `LLQR` skips the step or refresh that meets it; elsewhere it is an error like any other.
    """
