"""What the rates of a goal come to under some gears."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.gear_plan import Switching
from cascadeserve.plan_evidence import Expected

# what plans say, as they say nothing else
DOWN_FRAC = Switching().layout_down_fraction
# rates that plans with several layouts are compared at
_RATES = 128

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import Gear, LadderEntry
    from planner.goal import RatePrior


def gear_at(gears: Sequence[Gear], rate_per_s: float) -> Gear:
    """Gear that serves a steady rate; `gears` are by layout, the one for the lowest rates first, then by rate.

    A layout serves up to the share of its highest rate at which the orchestrator comes back to it.
    """
    layouts = list(dict.fromkeys(gear.layout for gear in gears))
    here: list[Gear] = []
    for layout in layouts:
        here = [gear for gear in gears if gear.layout == layout]
        if layout == layouts[-1] or rate_per_s < DOWN_FRAC * top_rate_per_s(here):
            break
    # the highest rate itself is one that was planned for
    top_per_s = top_rate_per_s(here)
    return next(
        gear for gear in here if rate_per_s < gear.upper_rate_per_s or rate_per_s == gear.upper_rate_per_s == top_per_s
    )


def expect(gears: Sequence[Gear], entries: Sequence[LadderEntry], prior: RatePrior) -> Expected | None:
    """What a prior comes to under some gears; None without gears."""
    if not gears:
        return None
    accuracy = {entry.name: entry.accuracy or 0.0 for entry in entries}
    rows = dict.fromkeys([gear.name for gear in gears], 0.0)
    over_rows, over_time, total = 0.0, 0.0, 0.0
    for rate, share in prior:
        gear = gear_at(gears, rate)
        rows[gear.name] += rate * share
        # not by name: gears of layouts that are not in a plan yet may share theirs
        over_rows += rate * share * accuracy[gear.ladder_entry]
        over_time += share * accuracy[gear.ladder_entry]
        total += rate * share
    shares = {name: amount / total for name, amount in rows.items()}
    return Expected(
        rate_prior=prior,
        accuracy=over_rows / total,
        accuracy_over_time=over_time,
        gears=shares,
    )


def top_rate_per_s(gears: Sequence[Gear]) -> float:
    """Rate, in rows per second, up to which gears are planned."""
    return max((gear.upper_rate_per_s for gear in gears if not gear.degraded), default=0.0)


def accuracy_over_rows(gears: Sequence[Gear], entries: Sequence[LadderEntry], prior: RatePrior | None) -> float:
    """Accuracy to expect over rows; without a prior as many rows at any rate up to the top as at any other."""
    if prior is None:
        planned = [gear for gear in gears if not gear.degraded]
        middles = [(gear.min_rate_per_s + gear.upper_rate_per_s) / 2 for gear in planned]
        # rows are rate times share of time, and the width of a range is to be its rows
        prior = tuple(
            (rate, (gear.upper_rate_per_s - gear.min_rate_per_s) / rate)
            for gear, rate in zip(planned, middles, strict=True)
        )
    found = expect(gears, entries, prior)
    return 0.0 if found is None else found.accuracy


def rows_at(prior: RatePrior | None, top_per_s: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rates in rows per second and the share of rows at each; without a prior alike for all rates up to the top."""
    if prior is None:
        return top_per_s * (np.arange(_RATES) + 0.5) / _RATES, np.full(_RATES, 1.0 / _RATES)
    rows = np.array([rate * share for rate, share in prior])
    return np.array([rate for rate, _ in prior]), rows / rows.sum()
