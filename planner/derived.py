"""What follows from a gear plan and is not written in it: work, what limits a range, one endpoint more, cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cascadeserve.gear_plan import Gear, GearPlan, LadderEntry, Layout, PlannedFamily

# from this utilisation on it is the device that ends a range
_DEVICE_FULL = 0.8
_SLOW_PER_S = 10.0
_PER_HOUR_S = 3600.0
_MILLION = 1e6


@dataclass(frozen=True)
class Scaling:
    """Rates in rows per second that a layout's highest gear sustains with its endpoints, one more, one less."""

    endpoints: int
    sustained_per_s: float
    with_more_per_s: float
    # None: there is but one
    with_less_per_s: float | None


@dataclass(frozen=True)
class LayoutCost:
    """What a layout's endpoints cost, in the unit of the cost by endpoint; None: the plan does not say the rate."""

    layout: str
    per_hour: float
    # at the highest rates planned for, all families together
    per_million_rows: float
    # at the mean of the rates that the goals name
    per_million_rows_expected: float | None


def row_work_s(family: PlannedFamily, entry: LadderEntry) -> float:
    """Device-seconds per row, in full batches of the first gear that uses the entry."""
    gear = next((gear for gear in family.gears if gear.ladder_entry == entry.name), None)
    total_s = 0.0
    for stage, share in zip(entry.stages, entry.reach, strict=True):
        trigger = gear.triggers.get(stage.model) if gear is not None else None
        model = family.models[stage.model]
        rows = trigger.max_batch if trigger is not None else model.max_batch
        total_s += share * model.batch_busy_s(rows) / rows
    return total_s


def bound_points(gap: float) -> str:
    """Bound on a loss in points of accuracy, three digits, rounded up: what is rounded down is not certified."""
    points = 100.0 * gap
    if points == 0.0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(abs(points))) - 2)
    return f"{math.ceil(points / step - 1e-6) * step:.3g}"


def rate_text(rows_per_s: float) -> str:
    """Rate without a unit; slow families live below ten rows per second."""
    return f"{rows_per_s:,.0f}" if rows_per_s >= _SLOW_PER_S or rows_per_s == 0.0 else f"{rows_per_s:.3g}"


def busy_when_sustained(gear: Gear) -> float | None:
    """Busy share of the device at the rate that a gear sustains, extrapolated from the upper end of its range."""
    if gear.predicted is None or gear.max_rate_per_s is None:
        return None
    return gear.predicted.utilisation * gear.predicted.sustained_rate_per_s / gear.max_rate_per_s


def device_limits(gear: Gear) -> bool:
    """Whether it is the device's time, rather than waiting, that ends what a gear sustains."""
    return (busy_when_sustained(gear) or 0.0) >= _DEVICE_FULL


def range_end(family: PlannedFamily, gear: Gear) -> str:
    """Why a gear's range ends where it does, in words; empty where the plan does not tell."""
    if gear.degraded:
        return "Takes whatever is above; requests that would come too late are refused."
    found, busy = gear.predicted, busy_when_sustained(gear)
    if found is None or busy is None:
        return ""
    sustained = f"{rate_text(found.sustained_rate_per_s)} rows/s"
    if found.ended_by == "goal":
        return f"The goal asks for no more. It would sustain {sustained}."
    if found.ended_by == "next_gear":
        return f"Makes room for the next gear, which must be this wide to stay in force. It would sustain {sustained}."
    if found.ended_by == "next_layout":
        return f"Above, the next layout answers more rows rightly. It would sustain {sustained}."
    limit = (
        f"Device time: sustains {sustained}, with the device {min(busy, 1.0):.0%} busy."
        if device_limits(gear)
        else f"Waiting: sustains {sustained}, where the SLO is used up with the device only {busy:.0%} busy."
    )
    return f"{limit} {_above(family, gear)}".strip()


def _above(family: PlannedFamily, gear: Gear) -> str:
    """What the accuracy has to do with the end of the highest range."""
    *planned, last = family.gears_of(gear.layout)
    if not last.degraded or gear is not planned[-1] or family.certificate is None:
        return ""
    mine, above = family.entry(gear.ladder_entry), family.entry(last.ladder_entry)
    if above.epsilon is not None or row_work_s(family, above) >= row_work_s(family, mine):
        return ""
    return f"Above, {above.name} takes less of it, but is not certified."


def scaling(plan: GearPlan, family: PlannedFamily, layout: Layout) -> Scaling | None:
    """What one endpoint more or less would do, where the plan alone tells.

    That is so if the device's time limits the highest gear, the family has the endpoints for itself, and all of them
    hold the same models: then the rate grows with their number. It assumes that they are equally fast and that the
    orchestrator keeps up. None otherwise.
    """
    top = [gear for gear in family.gears_of(layout.name) if not gear.degraded][-1]
    held = list(layout.instances.values())
    alike = all(instances == held[0] for instances in held) and not top.load
    if top.predicted is None or not alike or len(plan.families) > 1 or not device_limits(top):
        return None
    rate, count = top.predicted.sustained_rate_per_s, len(held)
    return Scaling(
        endpoints=count,
        sustained_per_s=rate,
        with_more_per_s=rate * (count + 1) / count,
        with_less_per_s=rate * (count - 1) / count if count > 1 else None,
    )


def layout_costs(plan: GearPlan, cost_per_hour: Mapping[str, float]) -> list[LayoutCost]:
    """Cost of every layout all of whose endpoints have one; `cost_per_hour` by endpoint."""
    costs = []
    families = plan.families.values()
    expected = [family.expected for family in families if family.expected is not None]
    mean_per_s = sum(rate * share for each in expected for rate, share in each.rate_prior)
    for layout in plan.layouts:
        if not layout.instances.keys() <= cost_per_hour.keys():
            continue
        per_hour = sum(cost_per_hour[endpoint] for endpoint in layout.instances)
        top_per_s = sum(family.max_rate_per_s(layout.name) for family in families)
        known = len(expected) == len(families) and mean_per_s > 0.0
        costs.append(
            LayoutCost(
                layout=layout.name,
                per_hour=per_hour,
                per_million_rows=_MILLION * per_hour / (_PER_HOUR_S * top_per_s),
                per_million_rows_expected=_MILLION * per_hour / (_PER_HOUR_S * mean_per_s) if known else None,
            )
        )
    return costs
