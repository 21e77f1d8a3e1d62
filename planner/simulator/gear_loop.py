"""The orchestrator's gear loop as arrays: demand, gear, layout. It follows orchestrator/gear_loop.py."""

from __future__ import annotations

import numpy as np

from planner.simulator.compiling import inlined
from planner.simulator.dispatch import move_unbound
from planner.simulator.policy import (
    arrival_rate_per_s,
    demand_per_s,
    planned_work_s,
    switch_gear,
    switch_layout,
    work_from_s,
)
from planner.simulator.state import (
    AIM,
    CHANGE,
    GEAR,
    GEAR_LAYOUT,
    LAYOUT,
    LOW,
    NONE,
    WISH,
    Control,
    Knobs,
    Load,
    Queues,
    Rows,
    Served,
)


@inlined
def _queued_work_s(served: Served, queues: Queues, gear: int) -> float:
    work_s = 0.0
    for model in range(len(queues.rows)):
        work_s += queues.work[model] * served.onward_work_s[gear, model]
    return work_s


@inlined
def _demand(
    served: Served,
    knobs: Knobs,
    rows: Rows,
    queues: Queues,
    gear: int,
    window: int,
    seen: int,
    now_s: float,
) -> tuple[float, float]:
    """What orchestrator/gear_loop.py computes at a tick: demand, and the standard error of the rate in it."""
    rate_per_s, error_per_s = arrival_rate_per_s(rows.seen_s, rows.work_before, window, seen, now_s, knobs.dispersion)
    entry = served.gear_entry[gear]
    stages = served.entry_stages[entry]
    reach, row_work_s = served.reach[entry, :stages], served.stage_row_work_s[gear, :stages]
    planned_s = planned_work_s(
        rate_per_s,
        reach,
        row_work_s,
        served.stage_full_batch_s[gear, :stages],
        served.stage_min_batch[gear, :stages],
        served.stage_max_wait_s[gear, :stages],
        served.slots.sum(),
        knobs.slo_s,
    )
    demand = demand_per_s(
        rate_per_s, _queued_work_s(served, queues, gear), planned_s, work_from_s(reach, row_work_s, 0), knobs.slo_s / 2
    )
    return demand, error_per_s


@inlined
def _gear_of(served: Served, layout: int, demand_per_s_: float) -> int:
    """Gear of a layout for a demand."""
    place = 0
    while place < served.gears_in[layout] - 1 and demand_per_s_ >= served.upper_rate_per_s[layout, place]:
        place += 1
    return served.layout_gear[layout, place]


@inlined
def _place_of(served: Served, layout: int, gear: int) -> int:
    place = 0
    while served.layout_gear[layout, place] != gear:
        place += 1
    return place


@inlined
def tick(
    served: Served,
    knobs: Knobs,
    load: Load,
    rows: Rows,
    queues: Queues,
    control: Control,
    window: int,
    seen: int,
    now_s: float,
) -> tuple[bool, float]:
    """Decide once on gear and layout; returns whether the gear was shifted, and the demand."""
    gear, layout = control.at[GEAR], control.at[LAYOUT]
    demand, error_per_s = _demand(served, knobs, rows, queues, gear, window, seen, now_s)
    if knobs.held_gear != NONE:
        return False, demand
    if control.at[GEAR_LAYOUT] != layout:
        # another layout came into force: its gear for the present demand is right at once
        control.at[GEAR_LAYOUT], control.since_s[LOW] = layout, -1.0
        wanted = _gear_of(served, layout, demand)
    else:
        place, _, control.since_s[LOW] = switch_gear(
            _place_of(served, layout, gear),
            served.upper_rate_per_s[layout, : served.gears_in[layout]],
            demand,
            now_s,
            control.since_s[LOW],
            knobs.gear_dwell_s,
            error_per_s,
        )
        wanted = served.layout_gear[layout, place]
    if wanted != gear:
        old_model = served.stage_model[served.gear_entry[gear], 0]
        new_model = served.stage_model[served.gear_entry[wanted], 0]
        if old_model != new_model:
            move_unbound(served, knobs, load, rows, queues, old_model, new_model, wanted)
        control.at[GEAR] = wanted
    _shift_layout(served, knobs, control, demand, now_s)
    return wanted != gear, demand


@inlined
def _shift_layout(served: Served, knobs: Knobs, control: Control, demand: float, now_s: float) -> None:
    layout = control.at[LAYOUT]
    if layout >= len(served.max_rate_per_s):
        # between two layouts: what was begun is brought to its end
        return
    load_here = demand / served.max_rate_per_s[layout]
    if control.at[AIM] != layout:
        # one change at a time; a larger layout is given up when the load that called for it is gone
        if control.at[AIM] > layout and load_here < knobs.layout_down_fraction:
            control.at[AIM], control.since_s[CHANGE] = layout, np.inf
        return
    aim, control.at[WISH], control.since_s[WISH] = switch_layout(
        layout,
        len(served.max_rate_per_s),
        load_here,
        demand / served.max_rate_per_s[layout - 1] if layout else 0.0,
        now_s,
        control.at[WISH],
        control.since_s[WISH],
        knobs.layout_up_after_s,
        knobs.layout_down_after_s,
        knobs.layout_down_fraction,
    )
    if aim != layout:
        control.at[AIM], control.since_s[CHANGE] = aim, now_s + served.change_s[layout, aim]
        state = served.first_state[layout, aim]
        if state != NONE:
            control.at[LAYOUT], control.since_s[CHANGE] = state, now_s + served.stays_s[state]
