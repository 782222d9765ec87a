"""What the tests of `split` and of its stages share: tolerances, batches and sizes.

Tolerances: products run through at most some twenty layers of numbers of size one in float64, and
norms of four entries amplify by up to a thousand in second order.
"""

from functools import partial

import pytest
import small_models
from networks import ZOO
from oracle import trainable
from rule_cases import FIRST, SECOND
from small_models import F64

__all__ = ["F64", "FIRST", "SECOND", "every_network", "normal", "size"]

every_network = pytest.mark.parametrize("name", ZOO)
normal = partial(small_models.normal, seed=1)


def size(model):
    return sum(p.numel() for p in trainable(model))
