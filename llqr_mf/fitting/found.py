"""What a fitter did to M, before anyone judges it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Found:
    """What a fitter did to M.

    Args:
        before: The objective of the M given, over the probes.
        after: That of the M found.
        iterations: Steps of all solves together.
        products: Condensed products spent, one per probe.
        remark: What the user should know, or nothing.
        failure: Why nothing was found, or nothing.
    """

    before: float
    after: float
    iterations: int
    products: int = 0
    remark: str = ""
    failure: str = ""
