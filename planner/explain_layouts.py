"""Layouts, transitions and costs in words, for the text and the page alike."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from planner.derived import alike_endpoints, held_bytes, layout_rates, rate_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cascadeserve.cluster import Cluster
    from cascadeserve.gear_plan import Gear, GearPlan, Layout, PlannedFamily, Transition, TransitionStep
    from planner.derived import Cost, Scaling
    from planner.profile import Profile

_GB = 1e9
SEVERAL_FAMILIES = (
    "That is so for each family alone: of several the one decides whose demand is the largest share of what the layout "
    "is planned for."
)


def layout_words(name: str) -> str:
    """A layout as a sentence names it: the planner's names begin with `layout`."""
    return name if name.startswith("layout") else f"layout {name}"


def entry_words(gear: Gear) -> str:
    """The entry of a gear, where its name does not tell."""
    return "" if gear.ladder_entry == short_name(gear) else f", as {gear.ladder_entry}"


def short_name(gear: Gear) -> str:
    """Name of a gear without its layout's."""
    return gear.name.removeprefix(f"{gear.layout}.")


def serves_sentence(plan: GearPlan, family: PlannedFamily, layout: str) -> str:
    """At which demand a layout comes and goes; empty if the plan has but one."""
    names = [each.name for each in plan.layouts]
    place, rates, switching = names.index(layout), layout_rates(plan, family), plan.switching
    parts = []
    if place > 0:
        former = names[place - 1]
        came = f"{rate_text(rates[former].left_above_per_s)} rows/s for {switching.layout_up_after_s:g} s"
        low = f"{rate_text(rates[layout].left_below_per_s)} rows/s for {switching.layout_down_after_s:g} s"
        parts.append(f"comes once the demand has been above {came}")
        parts.append(f"is left for {layout_words(former)} once it has been below {low}")
    if place + 1 < len(names):
        above, following = rates[layout].left_above_per_s, names[place + 1]
        high = f"{rate_text(above)} rows/s for {switching.layout_up_after_s:g} s"
        back = f"{rate_text(rates[following].left_below_per_s)} for {switching.layout_down_after_s:g} s"
        parts.append(
            f"is left for {layout_words(following)} once {'it' if parts else 'the demand'} has been above {high}"
        )
        parts.append(f"comes back once it has been below {back}")
    if not parts:
        return ""
    listed = f"{', '.join(parts[:-1])}, and {parts[-1]}"
    return f"This layout {listed}."


def step_words(step: TransitionStep) -> str:
    """What a step asks of Triton."""
    if step.wanted == 0:
        return f"unload {step.model} on {step.endpoint}"
    if step.present == 0:
        what = step.model if step.wanted == 1 else f"{step.wanted} instances of {step.model}"
        return f"load {what} on {step.endpoint}"
    return f"bring {step.model} on {step.endpoint} from {step.present} to {step.wanted} instances"


def transition_sentences(plan: GearPlan, way: Transition) -> Iterator[str]:
    """What serves while the steps are taken, and how long that is."""
    rises = [layout.name for layout in plan.layouts if layout.name in (way.from_layout, way.to_layout)][1] == (
        way.to_layout
    )
    for name, gear_name in way.gears.items():
        family = plan.families[name]
        gear = next(each for each in family.gears if each.name == gear_name)
        accuracy, least_per_s = family.entry(gear.ladder_entry).accuracy, way.least_rate_per_s.get(name)
        right = "" if accuracy is None else f" ({accuracy:.2%} right)"
        whose, alone = (f" {name}", " alone") if len(way.gears) > 1 else ("", "")
        carried = (
            ""
            if least_per_s is None
            else f", with device time for at least {rate_text(least_per_s)} rows/s{alone} at every moment"
        )
        yield f"Meanwhile gear {gear.name} serves{whose}{entry_words(gear)}{right}{carried}."
        rates = layout_rates(plan, family)
        begins_per_s = rates[way.from_layout].left_above_per_s if rises else rates[way.from_layout].left_below_per_s
        if least_per_s is not None and least_per_s < begins_per_s:
            yield (
                f"That is less than the {rate_text(begins_per_s)} rows/s at which it begins: what is beyond comes late "
                "or is refused until it is done."
            )
    if any(step.wanted > step.present for step in way.steps):
        yield f"The loads take {way.duration_s:.3g} s together, after what waits for other gears is answered."


def scaling_sentence(found: Scaling | str, layout: str, *, several: bool) -> str:
    """What one endpoint more or less would do, or why that is not said; empty where nothing is predicted."""
    if found == "":
        return ""
    under = f" under {layout_words(layout)}" if several else ""
    if isinstance(found, str):
        return (
            f"What one endpoint more or less would do{under} does not follow from the plan alone, since {found}; "
            "plan with such a cluster file to know."
        )
    less = "" if found.with_less_per_s is None else f", one less to about {rate_text(found.with_less_per_s)}"
    return (
        f"{found.endpoints} endpoint{' sustains' if found.endpoints == 1 else 's sustain'} "
        f"{rate_text(found.sustained_per_s)} rows/s{under}. One more would bring that to about "
        f"{rate_text(found.with_more_per_s)}{less}: the device's time is the limit, so the rate grows with the number "
        "of endpoints, as long as they are equally fast, hold the same models, and the orchestrator keeps up."
    )


def cost_sentences(plan: GearPlan, cost: Cost) -> Iterator[str]:
    """Cost per hour and per million rows."""
    tops = ", ".join(
        f"{per_million:.3g} at the highest rate{f' of {layout_words(name)}' if len(plan.layouts) > 1 else ''} "
        f"({rate_text(sum(family.max_rate_per_s(name) for family in plan.families.values()))} rows/s)"
        for name, per_million in cost.per_million_rows.items()
    )
    mean = (
        ""
        if cost.per_million_rows_expected is None
        else f", and {cost.per_million_rows_expected:.3g} at the mean of the rates of the goal"
    )
    yield f"The endpoints cost {cost.per_hour:.2f} per hour, whether they are busy or not."
    yield f"A million rows cost {tops}{mean}."


def device_names(plan: GearPlan, family: PlannedFamily, cluster: Cluster | None) -> dict[tuple[str, ...], str]:
    """Names of groups of endpoints that take the same times, by group: their kind if it is known, and the endpoints."""
    groups = alike_endpoints(plan, family)
    kinds = {} if cluster is None else {endpoint.name: endpoint.kind for endpoint in cluster.endpoints}
    names = {}
    for group in groups:
        listed, found = ", ".join(group), {kinds.get(endpoint) for endpoint in group}
        kind = found.pop() if len(found) == 1 else None
        names[group] = listed if kind is None else f"{kind} ({listed})"
    return names


def memory_words(layout: Layout, endpoint: str, cluster: Cluster | None, profiles: Mapping[str, Profile]) -> str:
    """Memory that a layout takes on an endpoint, of what it may take, in GB; empty where neither is known."""
    if cluster is None:
        return ""
    device = cluster.endpoint(endpoint)
    profile = profiles.get(device.kind)
    held = None if profile is None else held_bytes(layout.instances.get(endpoint, {}), profile)
    if device.memory_bytes is None:
        return "" if held is None else f"{gb(held)} GB"
    return f"{'?' if held is None else gb(held)} of {gb(device.memory_bytes)} GB"


def gb(size_bytes: float) -> str:
    """Gigabytes without the unit, three digits."""
    if size_bytes <= 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(size_bytes / _GB)))
    return f"{size_bytes / _GB:.{min(digits, 6)}f}".rstrip("0").rstrip(".") if digits else f"{size_bytes / _GB:,.0f}"
