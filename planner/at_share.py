"""What a family has that is guaranteed a share of all device time: the same devices, slower by that share.

A batch then takes 1 / share times as long, as it does on average while the others take what is theirs. The orchestrator
is shared in the same way. What calls and loads take beside the device stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from cascadeserve.gear_plan import PlannedModel
from planner.profile import planned_busy_points

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cascadeserve.gear_plan import GearPlan
    from planner.profile import BusyEntry, FrontCost, PairEntry, Profile

# points of (rows, seconds)
_Points = tuple[tuple[int, float], ...]


def slowed(profile: Profile, share: float) -> Profile:
    """Profile of a device of which only a share of the time is there; all of it: the profile itself."""
    if share == 1.0:
        return profile
    models = {
        name: msgspec.structs.replace(model, busy=tuple(_slowed_busy(entry, share) for entry in model.busy))
        for name, model in profile.models.items()
    }
    return msgspec.structs.replace(
        profile,
        models=models,
        pairs=tuple(_slowed_pair(pair, share) for pair in profile.pairs),
        front=None if profile.front is None else _slowed_front(profile.front, share),
    )


def planned_model(name: str, devices: Mapping[str, Profile], largest_batch: int) -> PlannedModel:
    """Model with the busy times of the first endpoint's kind, and those of endpoints of other kinds.

    `devices` is the profile of every endpoint, `largest_batch` what the config of the model allows.
    """
    (_, first), *others = devices.items()
    measured = first.models[name]
    largest = min(profile.models[name].max_batch for profile in devices.values())
    return PlannedModel(
        max_batch=min(largest, largest_batch),
        busy_s=planned_busy_points(first, name),
        busy_s_on={
            endpoint: planned_busy_points(profile, name)
            for endpoint, profile in others
            if profile.device_kind != first.device_kind
        },
        version=measured.version,
        digest=measured.digest,
        composed_of=measured.composed_of,
    )


def plan_at_share(plan: GearPlan, name: str) -> GearPlan:
    """Plan whose family expects of the devices what they do for it at its guaranteed share."""
    family = plan.families[name]
    share = family.guaranteed_share
    if share == 1.0:
        return plan
    models = {
        each: msgspec.structs.replace(
            model,
            busy_s=_slowed_points(model.busy_s, share),
            busy_s_on={endpoint: _slowed_points(points, share) for endpoint, points in model.busy_s_on.items()},
        )
        for each, model in family.models.items()
    }
    family = msgspec.structs.replace(family, models=models)
    return msgspec.structs.replace(plan, families=plan.families | {name: family})


def _slowed_points(points: _Points, share: float) -> _Points:
    return tuple((rows, busy_s / share) for rows, busy_s in points)


def _slowed_busy(entry: BusyEntry, share: float) -> BusyEntry:
    return msgspec.structs.replace(entry, busy_s=entry.busy_s / share)


def _slowed_pair(pair: PairEntry, share: float) -> PairEntry:
    first_s, second_s = pair.interval_s
    return msgspec.structs.replace(pair, interval_s=(first_s / share, second_s / share))


def _slowed_front(front: FrontCost, share: float) -> FrontCost:
    return msgspec.structs.replace(
        front,
        request_s=front.request_s / share,
        answer_s=front.answer_s / share,
        batch_s=front.batch_s / share,
        row_s=front.row_s / share,
    )
