"""The least value at which something can be done, by halving what is between one that can and one that cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from planner.time_limit import TimeLimit

# no search goes below this part of where it starts
_SMALLEST_FRAC = 1e-6


def least_value(
    can: Callable[[float], bool], start: float, *, known: float = 0.0, most: float, ratio: float, limit: TimeLimit
) -> float | None:
    """Smallest value up to `most`, to a ratio, for which `can` is true; None if there is none.

    For `known`, if it is not 0, `can` is false; it is taken to stay true for what is larger. Whatever is returned was
    tried. Past the `limit` it is the smallest that was found by then.
    """
    low, high = known, start
    while not can(high):
        if high >= most or limit.reached:
            return None
        low, high = high, min(2.0 * high, most)
    if not low:
        low = high / 2.0
        while low > start * _SMALLEST_FRAC and not limit.reached and can(low):
            low, high = low / 2.0, low
    while high > low * ratio and not limit.reached:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if can(middle) else (middle, high)
    return high


def least_count(can: Callable[[int], bool], *, known: int, most: int, limit: TimeLimit) -> int | None:
    """Smallest number above `known`, at most `most`, for which `can` is true; None if there is none.

    For `known` it is false. `can` is taken to stay true for what is larger, and whatever is returned was tried.
    """
    if known >= most:
        return None
    low, high = known, known + 1
    while not can(high):
        if high >= most or limit.reached:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1 and not limit.reached:
        middle = (low + high) // 2
        low, high = (low, middle) if can(middle) else (middle, high)
    return high
