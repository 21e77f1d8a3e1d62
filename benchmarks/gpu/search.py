"""Finding the highest rate that is sustained, and what a ratio of two such rates is worth."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_MAX_STEPS = 8
_RESAMPLES = 4000


async def highest_sustained(
    sustains: Callable[[float], Awaitable[bool]], start: float, *, factor: float, tolerance: float
) -> float | None:
    """Search from `start` by steps of `factor` until a rate holds and the next does not, then by bisection.

    Ends when the two are within `tolerance` of each other; None when no rate held within eight steps.
    """
    low, high = None, None
    rate = start
    for _ in range(_MAX_STEPS):
        if await sustains(rate):
            low = rate
            if high is not None:
                break
            rate *= factor
        else:
            high = rate
            if low is not None:
                break
            rate /= factor
    if low is None:
        return None
    while high is not None and high / low > 1.0 + tolerance:
        middle = (low * high) ** 0.5
        if await sustains(middle):
            low = middle
        else:
            high = middle
    return low


def bootstrap_interval(values: list[float], *, share: float = 0.95, seed: int = 1) -> tuple[float, float]:
    """Percentile interval of the median of `values`."""
    rng = np.random.default_rng(seed)
    medians = np.median(rng.choice(values, (_RESAMPLES, len(values))), axis=1)
    low, high = np.quantile(medians, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def median_ratio(pairs: list[tuple[float, float]]) -> tuple[float, float, float, tuple[float, ...]]:
    """Median, interval and single values of second / first."""
    ratios = [second / first for first, second in pairs]
    return median(ratios), *bootstrap_interval(ratios), tuple(ratios)
