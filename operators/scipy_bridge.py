"""Operators for SciPy's solvers, on NumPy arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from linear_operator import LinearOperator

from .apply import apply_rows, apply_rows_t


def to_scipy(operator: LinearOperator) -> Any:
    """Any operator, a sum or product too, as a `scipy.sparse.linalg.LinearOperator`.

    Products run in the operator's dtype and come back in float64, or float32 if it is narrower.
    """
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    wide = torch.float64 if operator.dtype == torch.float64 else torch.float32

    def product(rows: Any) -> Any:
        def apply(x: Any) -> Any:
            v = torch.from_numpy(np.asarray(x)).to(operator.device, operator.dtype)
            with torch.no_grad():
                columns = v.reshape(len(v), math.prod(v.shape[1:]))
                out = rows(operator, columns.mT.contiguous()).mT
            return out.reshape(len(out), *v.shape[1:]).to("cpu", wide).numpy()

        return apply

    return ScipyOperator(
        shape=tuple(operator.shape),
        dtype=torch.empty(0, dtype=wide).numpy().dtype,
        matvec=product(apply_rows),
        matmat=product(apply_rows),
        rmatvec=product(apply_rows_t),
        rmatmat=product(apply_rows_t),
    )
