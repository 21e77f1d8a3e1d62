"""What the rates of a goal come to under some gears."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascadeserve.plan_evidence import Expected

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascadeserve.gear_plan import Gear, LadderEntry
    from planner.goal import RatePrior


def expect(gears: Sequence[Gear], entries: Sequence[LadderEntry], prior: RatePrior) -> Expected | None:
    """What a prior comes to under some gears; None without gears."""
    if not gears:
        return None
    accuracy = {entry.name: entry.accuracy or 0.0 for entry in entries}
    rows, over_time, total = dict.fromkeys([gear.name for gear in gears], 0.0), 0.0, 0.0
    for rate, share in prior:
        gear = next(gear for gear in gears if rate < gear.upper_rate_per_s)
        rows[gear.name] += rate * share
        over_time += share * accuracy[gear.ladder_entry]
        total += rate * share
    shares = {name: amount / total for name, amount in rows.items()}
    return Expected(
        rate_prior=prior,
        accuracy=sum(shares[gear.name] * accuracy[gear.ladder_entry] for gear in gears),
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
