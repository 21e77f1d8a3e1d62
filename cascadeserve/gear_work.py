"""Device time of a gear's largest batches: what demand is reckoned with, by orchestrator and simulator alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascadeserve.policy.work import mean_work_s

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cascadeserve.gear_plan import Gear, GearPlan, PlannedFamily


def full_batches_s(plan: GearPlan, family: PlannedFamily, slots: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Device-seconds of the largest batch of a model in a gear, by gear and model; `slots` is by endpoint.

    Of the endpoints on which the gear's layout has the model it is the mean of `mean_work_s`: each counts by its load
    weight in the gear (1 where the gear names none for the model) x its slots. So it is a matter of the plan and not of
    which endpoints are up. For a model that stands nowhere in the layout it is that of `busy_s`.
    """
    return {
        gear.name: {model: _full_batch_s(plan, family, gear, model, slots) for model in family.models}
        for gear in family.gears
    }


def _full_batch_s(plan: GearPlan, family: PlannedFamily, gear: Gear, name: str, slots: Mapping[str, int]) -> float:
    model, layout = family.models[name], plan.layout(gear.layout)
    rows = gear.triggers[name].max_batch if name in gear.triggers else model.max_batch
    weights = gear.load.get(name)
    shares = {
        endpoint: slots[endpoint] * (1.0 if weights is None else weights.get(endpoint, 0.0))
        for endpoint in layout.instances
        if layout.count(endpoint, name, model.composed_of)
    }
    used = {endpoint: share for endpoint, share in shares.items() if share > 0.0}
    if not used:
        return model.batch_busy_s(rows)
    return mean_work_s([model.batch_busy_s(rows, endpoint) for endpoint in used], list(used.values()))
