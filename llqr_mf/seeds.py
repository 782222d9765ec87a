"""Seeds of their own for the parts of one thing that has one seed."""

from __future__ import annotations

import numpy as np


def mixed(seed: int, index: int) -> int:
    """A seed of its own for every index; those of another seed are others."""
    # Numpy takes no negative ones.
    entropy = [seed, index] if seed >= 0 else [-seed, index, 1]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
