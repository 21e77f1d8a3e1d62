"""From gear plan, records and profiles to the arrays of `state.Served`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from cascadeserve.errors import UsageError
from cascadeserve.gear_work import full_batches_s
from cascadeserve.policy.admission import DEADLINE_SLOS, LAST_GEAR_SLOS
from cascadeserve.policy.work import batch_work_s, share_at, work_from_s
from planner.cascade_rows import cascade_answers
from planner.profile import busy_points, planned_busy_points, work_rate
from planner.simulator.layouts import of_layouts
from planner.simulator.state import Served

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import BusyPoints, GearPlan, PlannedFamily
    from planner.profile import Profile
    from planner.records import Records

T = TypeVar("T")


def build_served(
    plan: GearPlan, family_name: str, records: Records, devices: Mapping[str, Profile]
) -> tuple[Served, NDArray[np.bool_], NDArray[np.bool_]]:
    """(arrays, right [E, R], right [M, R]): which records an entry, and a model alone, answers rightly.

    `devices` is by endpoint. A model that the records lack, which no entry uses, is never right.

    Raises:
        UsageError: a profile or the records lack a model of the family, or the plan names other endpoints.

    """
    family = plan.families[family_name]
    used = {stage.model for entry in family.ladder for stage in entry.stages}
    for endpoint, profile in devices.items():
        if missing := used - profile.models.keys():
            names = ", ".join(sorted(missing))
            raise UsageError(f"endpoint {endpoint!r}: its profile has no model {names}, which the plan uses")
    if missing := {name for layout in plan.layouts for name in layout.instances} - devices.keys():
        raise UsageError(f"the plan uses the endpoints {', '.join(sorted(missing))}, which the cluster does not have")
    models = list(family.models)
    answers = [cascade_answers(entry, records) for entry in family.ladder]
    points = [each for model in family.models.values() for each in (model.busy_s, *model.busy_s_on.values())]
    # busy times are linear from each of these rows to the next, and beyond the last of all points
    largest = max(*(model.max_batch for model in family.models.values()), *(each[-1][0] for each in points))
    planned_busy_s = [
        [_busy_by_rows_s(model.busy_s_on.get(endpoint, model.busy_s), largest) for endpoint in devices]
        for model in family.models.values()
    ]
    way_s = np.array(_of_each(devices, lambda profile: [_way_s(profile, name) for name in models])).T / 2
    device_busy_s = _of_each(devices, lambda profile: _device_busy_s(profile, family, models, largest))
    slots = {endpoint: profile.slots for endpoint, profile in devices.items()}
    gears, layouts = _of_gears(plan, family, models, slots), of_layouts(plan, family_name, models, devices)
    by_slots = np.array(list(slots.values()), np.int64)
    served = Served(
        **_of_entries(family, models),
        leaves_at=np.array([answer.stage for answer in answers], np.int8),
        **gears,
        **layouts,
        work_there_s=_work_there_s(family, models, gears["row_work_s"], layouts["instances"], by_slots),
        slots=by_slots,
        planned_busy_s=np.swapaxes(planned_busy_s, 1, 2),
        device_busy_s=np.stack(device_busy_s, axis=2),
        going_s=way_s,
        coming_s=way_s,
        efficiency=np.stack(_of_each(devices, lambda profile: _efficiency(profile, models))),
    )
    # one memory order, or the kernel would be compiled anew
    served = Served._make(np.ascontiguousarray(array) for array in served)
    by_model = np.zeros((len(models), len(records.truth)), np.bool_)
    for model, name in enumerate(models):
        if name in records.models:
            by_model[model] = records.models[name].label == records.truth
    return served, np.array([answer.label == records.truth for answer in answers]), by_model


def _device_busy_s(profile: Profile, family: PlannedFamily, models: list[str], largest: int) -> NDArray[np.float64]:
    """Busy times [M, B] of a device; as the plan has them for a model that no entry uses."""
    points = [
        planned_busy_points(profile, name) if name in profile.models else family.models[name].busy_s for name in models
    ]
    return np.array([_busy_by_rows_s(each, largest) for each in points])


@functools.lru_cache(maxsize=1024)
def _busy_by_rows_s(points: BusyPoints, largest: int) -> NDArray[np.float64]:
    """Busy times [B] of batches of 0 to `largest` rows: the same few for all endpoints and gears of a plan."""
    return np.array([0.0, *(batch_work_s(points, rows) for rows in range(1, largest + 1))])


def _of_each(devices: Mapping[str, Profile], of: Callable[[Profile], T]) -> list[T]:
    """Ask something of every endpoint's profile, once where several endpoints share it."""
    found = {key: of(profile) for key, profile in {id(each): each for each in devices.values()}.items()}
    return [found[id(profile)] for profile in devices.values()]


def _way_s(profile: Profile, name: str) -> float:
    """Latency of a call beside the time it occupies the device.

    Under load a batch occupies the device for longer than alone, by what the server itself does there. That much of
    the overhead of a lone call is in the busy time already.
    """
    if name not in profile.models:
        return 0.0
    model = profile.models[name]
    alone, loaded = busy_points(model, 1), busy_points(model, profile.slots + 1)
    shared_s = np.median([batch_work_s(loaded, rows) - alone_s for rows, alone_s in alone])
    return max(model.overhead_s - max(float(shared_s), 0.0), 0.0)


def _efficiency(profile: Profile, models: list[str]) -> NDArray[np.float64]:
    rates: dict[tuple[int, int], list[float]] = {}
    for pair in profile.pairs:
        if set(pair.models) <= set(models):
            first, second = sorted(models.index(name) for name in pair.models)
            rates.setdefault((first, second), []).append(min(work_rate(profile, pair), 1.0))
    efficiency = np.ones((len(models), len(models)))
    # pairs that were measured at several batch sizes count alike
    for (first, second), measured in rates.items():
        efficiency[first, second] = efficiency[second, first] = np.mean(measured)
    return efficiency


def _of_entries(family: PlannedFamily, models: list[str]) -> dict[str, NDArray[Any]]:
    most = max(len(entry.stages) for entry in family.ladder)
    stage_model = np.zeros((len(family.ladder), most), np.int64)
    reach = np.zeros((len(family.ladder), most))
    for index, entry in enumerate(family.ladder):
        stage_model[index, : len(entry.stages)] = [models.index(stage.model) for stage in entry.stages]
        reach[index, : len(entry.stages)] = entry.reach
    stages = np.array([len(entry.stages) for entry in family.ladder], np.int64)
    return {"entry_stages": stages, "stage_model": stage_model, "reach": reach}


def _of_gears(
    plan: GearPlan, family: PlannedFamily, models: list[str], slots: Mapping[str, int]
) -> dict[str, NDArray[Any]]:
    gears, most = len(family.gears), max(len(entry.stages) for entry in family.ladder)
    names = [entry.name for entry in family.ladder]
    min_batch = np.ones((gears, len(models)), np.int64)
    # a model without a trigger drains at once
    max_batch = np.array([[family.models[name].max_batch for name in models]] * gears, np.int64)
    max_wait_s = np.zeros((gears, len(models)))
    weight = np.ones((gears, len(models), len(slots)))
    for index, gear in enumerate(family.gears):
        for name, trigger in gear.triggers.items():
            model = models.index(name)
            min_batch[index, model], max_batch[index, model] = trigger.min_batch, trigger.max_batch
            max_wait_s[index, model] = trigger.max_wait_s
        for name, weights in gear.load.items():
            weight[index, models.index(name)] = [weights.get(endpoint, 0.0) for endpoint in slots]
    upper_per_s = np.array([gear.upper_rate_per_s for gear in family.gears])
    by_gear = full_batches_s(plan, family, slots)
    full_batch_s = np.array([[by_gear[gear.name][name] for name in models] for gear in family.gears])
    row_work_s = full_batch_s / max_batch
    onward_work_s = row_work_s.copy()
    by_stage = np.zeros((4, gears, most))
    for index, gear in enumerate(family.gears):
        entry = family.entry(gear.ladder_entry)
        chain = [models.index(stage.model) for stage in entry.stages]
        for which, values in enumerate((row_work_s, full_batch_s, min_batch, max_wait_s)):
            by_stage[which, index, : len(chain)] = values[index, chain]
        for stage, model in enumerate(chain):
            onward_work_s[index, model] = work_from_s(entry.reach, row_work_s[index, chain].tolist(), stage)
    return {
        "gear_entry": np.array([names.index(gear.ladder_entry) for gear in family.gears], np.int64),
        "min_batch": min_batch,
        "max_batch": max_batch,
        "max_wait_s": max_wait_s,
        "weight": weight * (np.array(list(slots.values())) / max(slots.values())),
        "stage_row_work_s": by_stage[0],
        "stage_full_batch_s": by_stage[1],
        "stage_min_batch": by_stage[2].astype(np.int64),
        "stage_max_wait_s": by_stage[3],
        "own_s": by_stage[1].sum(axis=1),
        "surge_slos": np.where(upper_per_s < upper_per_s.max(), DEADLINE_SLOS, LAST_GEAR_SLOS),
        "onward_work_s": onward_work_s,
        "row_work_s": row_work_s,
    }


def _work_there_s(
    family: PlannedFamily,
    models: list[str],
    row_work_s: NDArray[np.float64],
    instances: NDArray[np.int64],
    slots: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Work per row [S, G, M] as `orchestrator.routing.work_there_s` has it, for the endpoints of the entry model."""
    shares = np.zeros((len(instances), len(models), len(models)))
    for state, hosts in enumerate((instances > 0).swapaxes(1, 2)):
        for there, model in np.ndindex(len(models), len(models)):
            shares[state, there, model] = share_at(hosts[there].tolist(), hosts[model].tolist(), slots.tolist())
    work_s = np.zeros((len(instances), *row_work_s.shape))
    for index, gear in enumerate(family.gears):
        entry = family.entry(gear.ladder_entry)
        chain = [models.index(stage.model) for stage in entry.stages]
        for state in range(len(instances)):
            share = shares[state, chain[0]]
            work_s[state, index] = row_work_s[index] * share
            works_s = work_s[state, index, chain].tolist()
            for stage, model in enumerate(chain):
                if share[model]:
                    work_s[state, index, model] = work_from_s(entry.reach, works_s, stage)
    return work_s
