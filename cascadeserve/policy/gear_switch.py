"""Which gear is in force, and when a layout is worth changing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# how often it is decided
TICK_S = 0.1
# a gear is left upwards when demand exceeds its range by this many standard errors of the rate
SURE_DEVIATIONS = 1.5

HOLD = 0
UP = 1
DOWN = 2


def switch_gear(
    current: int,
    upper_rate_per_s: Sequence[float],
    demand_per_s: float,
    now_s: float,
    low_since_s: float,
    dwell_s: float,
    error_per_s: float,
) -> tuple[int, int, float]:
    """Gear for the demand: up at once, down after demand has been lower for `dwell_s`.

    The demand is known to within `error_per_s`: so long as it may well be in the current gear's range, that is not left
    upwards. `upper_rate_per_s` [gears] rises. Returns (gear, reason, low_since_s); the last is to be passed back at the
    next call and is -1.0 while demand is not lower than the current gear's range.
    """
    last = len(upper_rate_per_s) - 1
    wanted = 0
    while wanted < last and demand_per_s >= upper_rate_per_s[wanted]:
        wanted += 1
    if wanted > current and demand_per_s < upper_rate_per_s[current] + SURE_DEVIATIONS * error_per_s:
        return current, HOLD, -1.0
    if wanted > current:
        return wanted, UP, -1.0
    if wanted == current:
        return current, HOLD, -1.0
    if low_since_s < 0.0:
        return current, HOLD, now_s
    if now_s - low_since_s >= dwell_s:
        return wanted, DOWN, -1.0
    return current, HOLD, low_since_s


def switch_layout(
    current: int,
    num_layouts: int,
    load_here: float,
    load_below: float,
    now_s: float,
    wish: int,
    wish_since_s: float,
    up_after_s: float,
    down_after_s: float,
    down_fraction: float,
) -> tuple[int, int, float]:
    """Layout for sustained load: one step at a time, each only after the wish for it has lasted.

    `load_here` is the largest ratio, over families, of demand to what the current layout is planned for; `load_below`
    the same for the next smaller layout. A change costs seconds, so the step down waits for `load_below` under
    `down_fraction`. Returns (layout, wish, wish_since_s), the last two to be passed back at the next call.
    """
    new_wish = HOLD
    if current + 1 < num_layouts and load_here > 1.0:
        new_wish = UP
    elif current > 0 and load_below < down_fraction:
        new_wish = DOWN
    if new_wish == HOLD:
        return current, HOLD, now_s
    if new_wish != wish:
        return current, new_wish, now_s
    if new_wish == UP and now_s - wish_since_s >= up_after_s:
        return current + 1, HOLD, now_s
    if new_wish == DOWN and now_s - wish_since_s >= down_after_s:
        return current - 1, HOLD, now_s
    return current, wish, wish_since_s
