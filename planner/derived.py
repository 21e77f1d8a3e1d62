"""What follows from a gear plan and is not written in it: work, what limits a range, one endpoint more, cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cascadeserve.cluster import Cluster
    from cascadeserve.gear_plan import Gear, GearPlan, LadderEntry, Layout, PlannedFamily
    from planner.profile import Profile

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
class Cost:
    """What the endpoints of a plan cost, busy or not, in the unit of the cost by endpoint."""

    per_hour: float
    # by layout, at the highest rates it is planned for, all families together
    per_million_rows: dict[str, float]
    # at the mean of the rates that the goals name; None: the plan does not say it
    per_million_rows_expected: float | None


@dataclass(frozen=True)
class LayoutRates:
    """Demand of a family, in rows per second, that a layout comes and goes at.

    It is left downwards below `left_below_per_s` (0: it is the first) and upwards above `left_above_per_s` (infinite:
    it is the last). Between `left_below_per_s` and what the layout before it is left upwards at, either stays.
    """

    left_below_per_s: float
    left_above_per_s: float


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
        # layouts stand by rising highest rate
        last = max(family.gears, key=lambda each: 0.0 if each.degraded else each.upper_rate_per_s).layout == gear.layout
        above = "is above" if last else "is above until the next layout stands"
        return f"Takes whatever {above}; requests that would come too late are refused."
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


def layout_rates(plan: GearPlan, family: PlannedFamily) -> dict[str, LayoutRates]:
    """When each layout comes and goes, by layout."""
    names = [layout.name for layout in plan.layouts]
    tops = [family.max_rate_per_s(name) for name in names]
    below = [0.0, *(plan.switching.layout_down_fraction * top for top in tops[:-1])]
    return {name: LayoutRates(low, high) for name, low, high in zip(names, below, [*tops[:-1], math.inf], strict=True)}


def steady_layout(rates: Mapping[str, LayoutRates], rate_per_s: float) -> str:
    """Layout that a steady rate ends in, whichever stood before: what `Expected` counts on."""
    return next(name for name in reversed(list(rates)) if rate_per_s >= rates[name].left_below_per_s)


def scaling(plan: GearPlan, family: PlannedFamily, layout: Layout) -> Scaling | str:
    """What one endpoint more or less would do, where the plan alone tells; else why it does not, in words.

    It does if the device's time limits the highest gear, the family has the endpoints for itself, and all of them are
    alike and hold the same models: then the rate grows with their number. It assumes that the orchestrator keeps up.
    The words are empty where nothing is predicted.
    """
    top = [gear for gear in family.gears_of(layout.name) if not gear.degraded][-1]
    held = list(layout.instances.values())
    if top.predicted is None:
        return ""
    if not device_limits(top):
        return "waiting, and not the devices' time, is what ends the highest gear"
    if len(plan.families) > 1:
        return "several families share the endpoints"
    if any(instances != held[0] for instances in held) or top.load:
        return "the endpoints hold different models or take different shares, and one more changes what stands where"
    if any(model.busy_s_on for model in family.models.values()):
        return "the endpoints are not equally fast"
    rate, count = top.predicted.sustained_rate_per_s, len(held)
    return Scaling(
        endpoints=count,
        sustained_per_s=rate,
        with_more_per_s=rate * (count + 1) / count,
        with_less_per_s=rate * (count - 1) / count if count > 1 else None,
    )


def costs_by_endpoint(cluster: Cluster | None) -> dict[str, float]:
    """Cost per hour by endpoint, empty without a cluster."""
    return {} if cluster is None else {endpoint.name: endpoint.cost_per_hour for endpoint in cluster.endpoints}


def plan_cost(plan: GearPlan, cost_per_hour: Mapping[str, float]) -> Cost | None:
    """Cost of the endpoints of all layouts: none is switched off with a layout. `cost_per_hour` is by endpoint.

    None: an endpoint has no cost, or all cost nothing.
    """
    endpoints = {endpoint for layout in plan.layouts for endpoint in layout.instances}
    # sorted, as a sum depends on the order
    per_hour = sum(cost_per_hour.get(endpoint, 0.0) for endpoint in sorted(endpoints))
    if not endpoints <= cost_per_hour.keys() or not per_hour:
        return None
    families = plan.families.values()
    tops = {layout.name: sum(family.max_rate_per_s(layout.name) for family in families) for layout in plan.layouts}
    expected = [family.expected for family in families if family.expected is not None]
    mean_per_s = sum(rate * share for each in expected for rate, share in each.rate_prior)
    known = len(expected) == len(families) and mean_per_s > 0.0
    per_million = _MILLION * per_hour / _PER_HOUR_S
    return Cost(
        per_hour=per_hour,
        per_million_rows={name: per_million / top_per_s for name, top_per_s in tops.items()},
        per_million_rows_expected=per_million / mean_per_s if known else None,
    )


def held_bytes(counts: Mapping[str, int], profile: Profile) -> int | None:
    """Memory that instances hold on a device of the profile's kind; None: of one of them that is not measured."""
    sizes = [(profile.instance_bytes(part), count) for part, count in counts.items()]
    return None if any(size is None for size, _ in sizes) else sum((size or 0) * count for size, count in sizes)


def alike_endpoints(plan: GearPlan, family: PlannedFamily) -> list[tuple[str, ...]]:
    """Endpoints of the plan in groups of devices that take the same times, those that `busy_s` is of first."""
    endpoints = list(dict.fromkeys(endpoint for layout in plan.layouts for endpoint in layout.instances))
    groups: dict[tuple[object, ...], list[str]] = {(None,) * len(family.models): []}
    for endpoint in endpoints:
        times = tuple(model.busy_s_on.get(endpoint) for model in family.models.values())
        groups.setdefault(times, []).append(endpoint)
    return [tuple(names) for names in groups.values() if names]
