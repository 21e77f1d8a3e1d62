"""A few endpoints in the place of many: of a cluster that has several that are alike, some are simulated.

A row needs one endpoint, whatever others there are. So what 8 endpoints do with an eighth of the load of 64 is what the
64 do, but for the noise: the larger cluster has relatively less of it and waits a little less at the same share of its
rate. A rate that a sample keeps is kept by all, then, and found with fewer rows.

Endpoints are of one **sort** if they have the same instances, the same load weights and the same profile. The sample
has as many of each as its size allows in proportion. A sort of which none is left has others with the same instances.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from cascadeserve.gear_plan import Layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cascadeserve.gear_plan import Gear, GearPlan, PlannedFamily
    from planner.profile import Profile


class Sample(NamedTuple):
    """A layout on some of its endpoints, and the share of the rate of all that these take."""

    layout: Layout
    share: float


def sample(
    plan: GearPlan, family: PlannedFamily, gears: Sequence[Gear], of: Gear, devices: Mapping[str, Profile], most: int
) -> Sample | None:
    """Choose `most` endpoints per sort, on average, to simulate some gears on; None: there is nothing to leave out.

    That is so, too, where the gears are of several layouts. The share is that of the gear `of` in full batches;
    `devices` is the profile by endpoint.
    """
    layout = plan.layout(of.layout)
    if any(gear.layout != layout.name for gear in gears):
        return None
    roles = _by_role(layout, gears, devices)
    sorts = [names for role in roles for names in role]
    # in proportion, and at least one of each role
    per_chosen = min(len(layout.instances) / (most * len(sorts)), *(sum(map(len, role)) for role in roles))
    if per_chosen <= 1.0:
        return None
    counts = [_divided(round(sum(map(len, role)) / per_chosen), [len(names) for names in role]) for role in roles]
    rates = [_rows_per_s(names[0], of, family, layout, devices[names[0]].slots) for names in sorts]
    chosen = [names[:count] for names, count in zip(sorts, chain.from_iterable(counts), strict=True)]
    share = _total(rates, chosen) / _total(rates, sorts)
    names = set(chain.from_iterable(chosen))
    instances = {name: models for name, models in layout.instances.items() if name in names}
    return Sample(Layout(name=layout.name, instances=instances), share)


def _by_role(layout: Layout, gears: Sequence[Gear], devices: Mapping[str, Profile]) -> list[list[list[str]]]:
    """Endpoints of a layout: those with the same instances and weights, and of these those of the same profile."""
    roles: dict[object, dict[int, list[str]]] = {}
    for name in devices:
        if name in layout.instances:
            weights = tuple((model, load.get(name, 0.0)) for gear in gears for model, load in sorted(gear.load.items()))
            role = roles.setdefault((tuple(sorted(layout.instances[name].items())), weights), {})
            role.setdefault(id(devices[name]), []).append(name)
    return [list(role.values()) for role in roles.values()]


def _divided(number: int, counts: Sequence[int]) -> list[int]:
    """Divide a number of endpoints among sorts as their counts are, by largest remainders."""
    ideal = [number * count / sum(counts) for count in counts]
    found = [int(part) for part in ideal]
    by_remainder = sorted(range(len(counts)), key=lambda sort: found[sort] - ideal[sort])
    for sort in by_remainder[: number - sum(found)]:
        found[sort] += 1
    return found


def _total(rates: Sequence[float], sorts: Iterable[Sequence[str]]) -> float:
    return sum(rate * len(names) for rate, names in zip(rates, sorts, strict=True))


def _rows_per_s(endpoint: str, gear: Gear, family: PlannedFamily, layout: Layout, slots: int) -> float:
    """Rows per second that an endpoint does in the largest batches of those of a gear's models that it has."""
    entry, work_s = family.entry(gear.ladder_entry), 0.0
    for stage, reach in zip(entry.stages, entry.reach, strict=True):
        model = family.models[stage.model]
        if layout.count(endpoint, stage.model, model.composed_of):
            work_s += reach * model.batch_busy_s(model.max_batch, endpoint) / model.max_batch
    return slots / work_s if work_s else 0.0
