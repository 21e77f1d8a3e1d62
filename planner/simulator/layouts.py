"""Layouts as arrays, and what stands while one becomes another.

A transition is a row of **states** that follow the layouts in the arrays. In the first one nothing has gone yet, but
the gear of the transition is in force, until all that waits for other gears is answered or late. Then there is a state
for every load of a model: what stands before it, for as long as it takes. In all of them one gear serves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from cascadeserve.policy.admission import DEADLINE_SLOS
from cascadeserve.policy.gear_switch import TICK_S
from planner.simulator.state import NONE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import Gear, GearPlan, Layout, PlannedFamily, Transition
    from planner.profile import Profile

# what bringing a model's instances into force takes where the profile does not say
_LOAD_S = 1.0


class _State(NamedTuple):
    """A layout, or a moment between two: what stands, which gears serve, how long it lasts and what follows."""

    layout: Layout
    gears: Sequence[Gear]
    stays_s: float = np.inf
    follows: int = NONE


def layout_of_states(plan: GearPlan, family: str, devices: Mapping[str, Profile]) -> NDArray[np.int16]:
    """For every state the place in the plan of the layout that it belongs to, the one that is left."""
    names = [layout.name for layout in plan.layouts]
    states, _ = _states(plan, family, devices)
    return np.array([names.index(state.layout.name) for state in states], np.int16)


def of_layouts(
    plan: GearPlan, family_name: str, models: list[str], devices: Mapping[str, Profile]
) -> dict[str, NDArray[Any]]:
    """Fields of `Served` that are by layout; S counts the states, the L layouts first."""
    family = plan.families[family_name]
    gears = [gear.name for gear in family.gears]
    endpoints = list(devices)
    states, first_state = _states(plan, family_name, devices)
    layout_gear = np.zeros((len(states), len(gears)), np.int64)
    upper_rate_per_s = np.full((len(states), len(gears)), np.inf)
    instances = np.zeros((len(states), len(endpoints), len(models)), np.int64)
    for index, state in enumerate(states):
        layout_gear[index, : len(state.gears)] = [gears.index(gear.name) for gear in state.gears]
        if index < len(plan.layouts):
            upper_rate_per_s[index, : len(state.gears)] = [gear.upper_rate_per_s for gear in state.gears]
        for endpoint in state.layout.instances:
            for place, name in enumerate(models):
                count = state.layout.count(endpoint, name, family.models[name].composed_of)
                instances[index, endpoints.index(endpoint), place] = count
    load_s = np.array([[_model_load_s(profile, family, name) for name in models] for profile in devices.values()])
    standing = instances[: len(plan.layouts)]
    grows = standing[None, :] > standing[:, None]  # [from, to, P, M]
    return {
        "gears_in": np.array([len(state.gears) for state in states]),
        "layout_gear": layout_gear,
        "upper_rate_per_s": upper_rate_per_s,
        "max_rate_per_s": np.array([family.max_rate_per_s(layout.name) for layout in plan.layouts]),
        "instances": instances,
        # without a transition the steps of a change are taken side by side
        "change_s": np.max(grows * load_s, axis=(2, 3)),
        "first_state": first_state,
        "follows": np.array([state.follows for state in states], np.int64),
        "stays_s": np.array([state.stays_s for state in states]),
    }


def _states(plan: GearPlan, family_name: str, devices: Mapping[str, Profile]) -> tuple[list[_State], NDArray[np.int64]]:
    """States, layouts first, and the first state on the way from one layout to another [L, L]."""
    family = plan.families[family_name]
    states = [_State(layout, family.gears_of(layout.name)) for layout in plan.layouts]
    names = [layout.name for layout in plan.layouts]
    first_state = np.full((len(names), len(names)), NONE, np.int64)
    for each in plan.transitions:
        start, end = names.index(each.from_layout), names.index(each.to_layout)
        first_state[start, end] = len(states)
        moments = list(_moments(each, plan.layout(each.from_layout), family, family_name, devices))
        for place, moment in enumerate(moments, 1):
            follows = end if place == len(moments) else len(states) + 1
            states.append(moment._replace(follows=follows))
    return states, first_state


def _moments(
    each: Transition, layout: Layout, family: PlannedFamily, family_name: str, devices: Mapping[str, Profile]
) -> Iterator[_State]:
    gears = [gear for gear in family.gears if gear.name == each.gears[family_name]]
    # the gear comes into force at the next tick; by its deadline all that came before is answered or refused
    yield _State(layout, gears, TICK_S + DEADLINE_SLOS * family.slo_s)
    for step, after in zip(each.steps, each.states(layout.instances), strict=True):
        if step.wanted > step.present:
            yield _State(layout, gears, _load_s(devices[step.endpoint], step.model))
        layout = msgspec.structs.replace(layout, instances=after)


def _model_load_s(profile: Profile, family: PlannedFamily, name: str) -> float:
    # the parts of an ensemble are loaded side by side
    return max(_load_s(profile, part) for part in family.models[name].composed_of or (name,))


def _load_s(profile: Profile, part: str) -> float:
    found = profile.part(part)
    return _LOAD_S if found is None or found.load_s is None else found.load_s
