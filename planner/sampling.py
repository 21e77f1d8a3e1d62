"""A few endpoints in the place of many: where a cluster has several that are alike, some of them are simulated.

A row needs one endpoint, whatever others there are, so what 8 endpoints do with an eighth of the load of 64 is what the
64 do, but for the noise: the larger cluster has relatively less of it, and waits a little less at the same share of its
rate. So rates that a sample keeps are kept by all, and it costs as many rows less.

Endpoints are alike if they are of one profile and a layout has the same instances on both. A sample has them in
proportion, and at least one of each sort.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cascadeserve.gear_plan import Layout

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from cascadeserve.gear_plan import Gear, GearPlan, LadderEntry, PlannedFamily
    from planner.profile import Profile


class Sample(NamedTuple):
    """Endpoints of a layout by name, and the share of its rate that they take; None: it is simulated as it is."""

    layout: Layout
    share: float


def sample(
    plan: GearPlan, family: PlannedFamily, gears: Sequence[Gear], devices: Mapping[str, Profile], most: int
) -> Sample | None:
    """At most about `most` endpoints to simulate some gears on; None: all of the plan's layouts, as they are.

    That is where there are no more, and where the gears are of several layouts. `devices` is the profile by endpoint.
    """
    layout = plan.layout(gears[0].layout)
    standing = [name for name in devices if name in layout.instances]
    if len(standing) <= most or any(gear.layout != layout.name for gear in gears):
        return None
    sorts: dict[object, list[str]] = {}
    for name in standing:
        weights = [(model, load.get(name)) for gear in gears for model, load in gear.load.items()]
        alike = (id(devices[name]), tuple(sorted(layout.instances[name].items())), tuple(weights))
        sorts.setdefault(alike, []).append(name)
    counts = _in_proportion([len(names) for names in sorts.values()], most)
    chosen = {name for names, count in zip(sorts.values(), counts, strict=True) for name in names[:count]}
    if len(chosen) == len(standing):
        return None
    entry = family.entry(gears[0].ladder_entry)
    rates = {
        names[0]: _rows_per_s(names[0], entry, family, layout, devices[names[0]].slots) for names in sorts.values()
    }
    of_all = sum(len(names) * rates[names[0]] for names in sorts.values())
    of_sample = sum(count * rates[names[0]] for names, count in zip(sorts.values(), counts, strict=True))
    instances = {name: models for name, models in layout.instances.items() if name in chosen}
    return Sample(Layout(name=layout.name, instances=instances), of_sample / of_all)


def _in_proportion(counts: Sequence[int], most: int) -> list[int]:
    """Divide `most` among sorts as their counts are, by largest remainders, but for at least one of each."""
    ideal = [most * count / sum(counts) for count in counts]
    found = [max(1, int(share)) for share in ideal]
    by_remainder = sorted(range(len(counts)), key=lambda sort: int(ideal[sort]) - ideal[sort])
    for sort in by_remainder[: max(most - sum(found), 0)]:
        found[sort] += 1
    return [min(number, count) for number, count in zip(found, counts, strict=True)]


def _rows_per_s(endpoint: str, entry: LadderEntry, family: PlannedFamily, layout: Layout, slots: int) -> float:
    """Rows of a ladder entry that an endpoint does per second in full batches of the models it has."""
    work_s = 0.0
    for stage, share in zip(entry.stages, entry.reach, strict=True):
        model = family.models[stage.model]
        if layout.count(endpoint, stage.model, model.composed_of):
            work_s += share * model.batch_busy_s(model.max_batch, endpoint) / model.max_batch
    return slots / work_s if work_s else 0.0
