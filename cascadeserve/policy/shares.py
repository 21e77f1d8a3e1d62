"""How much of the device time a family may use where several families share the devices.

Every family is guaranteed a share, for which its gears are planned: on devices that are slower by it, so that they hold
even when all families are at their peak. What a family needs at its demand of now may be less. The others may use what
it leaves: on k times the guaranteed share a batch takes a k-th of the time, so a gear carries k times its rates.
"""

from __future__ import annotations

# What others need is taken to be this much more: they may need it before the next decision.
MARGIN_FRAC = 0.1


def needed_share(guaranteed: float, demand_per_s: float, planned_per_s: float) -> float:
    """Share of the device time that a gear needs at a demand; on the guaranteed share it carries `planned_per_s`."""
    return guaranteed * demand_per_s / planned_per_s


def available_share(guaranteed: float, needed_by_others: float) -> float:
    """Share of the device time that a family may use: what the others leave, and in any case what is guaranteed."""
    return max(guaranteed, 1.0 - (1.0 + MARGIN_FRAC) * needed_by_others)
