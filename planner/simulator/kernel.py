"""The event loop: one run of a load through a plan, compiled.

Events are totally ordered by time, then kind (the order in which the loop asks for them), then sequence: requests by
number, endpoints by index, batches by departure. Nothing is drawn here, so one load gives one outcome, byte by byte.

The orchestrator's own core is a queue of its own: taking in a request and handling the answer to a batch each occupy
it for a while, in the order in which they come. After a batch it answers the requests that the batch completed, one by
one, when the next batch has left. With costs of 0 it is not there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.policy import gear_switch
from planner.simulator.compiling import cached, inlined
from planner.simulator.device import arrive, busy_s, step
from planner.simulator.dispatch import (
    ahead_of,
    answer,
    drop_done,
    drop_done_head,
    end,
    expire,
    gone,
    lets_in,
    pump,
    push,
    rank,
    refuse,
    work_before,
)
from planner.simulator.door import admit, look
from planner.simulator.gear_loop import tick
from planner.simulator.policy import largest_batch_work, next_stage_in_time, window_start
from planner.simulator.state import (
    AIM,
    CHANGE,
    CUT,
    GEAR,
    LAYOUT,
    LOOK,
    NONE,
    OPEN,
    SURE,
    Control,
    Devices,
    Flights,
    Knobs,
    Load,
    Queues,
    Rows,
    Served,
    Ticks,
)

if TYPE_CHECKING:
    from planner.simulator.state import Floats, Ints

_TICK_S = gear_switch.TICK_S
_NOTHING = -(1 << 62)


@inlined
def _absorb(
    served: Served,
    knobs: Knobs,
    load: Load,
    rows: Rows,
    queues: Queues,
    flights: Flights,
    devices: Devices,
    control: Control,
    place: int,
    now_s: float,
) -> int:
    """Handle the answer to a batch: its rows leave, or wait for their next stage; returns how many requests it ends."""
    gear = control.at[GEAR]
    row = flights.first[place]
    ended = 0
    # as of the model that a row went on to last
    model, in_flight_s, slots, quickest, most = NONE, 0.0, 0, 0, 0
    while row != NONE:
        after = rows.following[row]
        request = load.request[row]
        if not gone(rows, request, now_s):
            entry = served.gear_entry[rows.gear[row]]
            rows.unheard[request] -= rows.stage[row] == 0
            how = SURE
            if rows.stage[row] < served.leaves_at[entry, load.record[row]]:
                onward = served.stage_model[entry, rows.stage[row] + 1]
                if onward != model:
                    model, most = onward, served.max_batch[gear, onward]
                    drop_done_head(queues, rows, load, model, now_s)
                    in_flight_s, slots, quickest = ahead_of(
                        served, flights, devices, control.at[LAYOUT], gear, model, place
                    )
                together = queues.work[model] + load.work[request]
                batch = largest_batch_work(together, queues.rows[model] + 1, most)
                batch_s = busy_s(served.planned_busy_s[model], batch, quickest)
                deadline_s, row_s = rows.deadline_s[request], served.row_work_s[gear, model]
                in_time = slots == 0 or next_stage_in_time(
                    deadline_s, now_s, in_flight_s, queues.work[model], row_s, slots, batch_s
                )
                if not in_time:
                    # perhaps not all that waits goes before it
                    before = work_before(queues, rows, load, model, rank(served, knobs, load, rows, request, gear))
                    in_time = next_stage_in_time(deadline_s, now_s, in_flight_s, before, row_s, slots, batch_s)
                how = OPEN if in_time else CUT
            if how == OPEN:
                rows.stage[row] += 1
                rows.since_s[row] = now_s
                push(queues, rows, load, model, row, rank(served, knobs, load, rows, request, gear))
            elif answer(rows, load, row, how):
                ended += 1
                end(knobs, load, rows, request, now_s + ended * knobs.answer_s)
        row = after
    return ended


@inlined
def _core_time_s(knobs: Knobs, flights: Flights, item: int) -> float:
    """Time of the orchestrator's core for a request (from 0) or the answer to a batch (-1 - place)."""
    if item >= 0:
        return knobs.request_s
    return knobs.batch_s + knobs.row_s * flights.rows[-1 - item]


@cached
def run(  # noqa: C901, PLR0912, PLR0915 - one loop with one case per kind of event
    served: Served,
    knobs: Knobs,
    load: Load,
    rows: Rows,
    queues: Queues,
    flights: Flights,
    devices: Devices,
    control: Control,
    ticks: Ticks,
    door: Floats,
    waiting: Ints,
) -> tuple[int, int]:
    """Run a load; fills everything but `served`, `knobs` and `load`.

    `waiting` [n + P * F] has room for what waits for the orchestrator's core: requests by number, answered batches as
    -1 - place. Returns the number of ticks and how many requests were unanswered when the last one arrived.
    """
    requests, endpoints = len(load.times_s), len(served.slots)
    places = len(flights.phase) // endpoints
    costs_core = knobs.request_s > 0.0 or knobs.answer_s > 0.0 or knobs.batch_s > 0.0 or knobs.row_s > 0.0
    first_waiting, num_waiting, on_core, answering = 0, 0, False, False

    arrived, seen, window, settled, turn, tick_number, unanswered = 0, 0, 0, 0, 0, 0, 0
    tick_s, wake_s, core_s, now_s = _TICK_S, np.inf, np.inf, 0.0

    while True:
        while settled < seen and gone(rows, settled, now_s):
            if not rows.done[settled]:
                expire(knobs, load, rows, settled, rows.deadline_s[settled])
            settled += 1
        if settled == requests and tick_s > knobs.until_s:
            return tick_number, unanswered
        device = 0
        for endpoint in range(1, endpoints):
            if devices.next_s[endpoint] < devices.next_s[device]:
                device = endpoint
        device_s = devices.next_s[device]
        arrival_s = load.times_s[arrived] if arrived < requests else np.inf
        change_s = control.since_s[CHANGE]
        now_s = min(device_s, core_s, arrival_s, change_s, tick_s, wake_s)
        comes, handled, pumping, ended = _NOTHING, _NOTHING, False, 0
        if now_s > door[LOOK]:
            look(served, queues, devices, door, control.at[LAYOUT], control.at[GEAR], now_s)

        if device_s == now_s:
            place = step(served, flights, devices, device, places, control.at[LAYOUT], now_s)
            if place != NONE:
                comes = -1 - place
        elif core_s == now_s and answering:
            on_core, answering, core_s, pumping = False, False, np.inf, True
        elif core_s == now_s:
            handled = waiting[first_waiting]
            first_waiting = (first_waiting + 1) % len(waiting)
            num_waiting -= 1
            on_core, core_s = False, np.inf
        elif arrival_s == now_s:
            comes = arrived
            arrived += 1
            if arrived == requests:
                for request in range(settled, requests):
                    # those that wait for the core have no deadline yet
                    unanswered += not gone(rows, request, now_s)
        elif change_s == now_s:
            state = served.follows[control.at[LAYOUT]]
            if state == NONE:
                state = control.at[AIM]
            control.at[LAYOUT], control.since_s[CHANGE] = state, now_s + served.stays_s[state]
            pumping = True
        elif tick_s == now_s:
            drop_done(queues, rows, load, now_s)
            window = window_start(rows.seen_s, window, seen, now_s, knobs.dispersion)
            pumping, demand = tick(served, knobs, load, rows, queues, control, window, seen, now_s)
            if tick_number < len(ticks.gear):
                ticks.gear[tick_number] = control.at[GEAR]
                ticks.layout[tick_number] = control.at[LAYOUT]
                ticks.demand_per_s[tick_number] = demand
            tick_number += 1
            tick_s = (tick_number + 1) * _TICK_S
        else:
            # a busy core looks at the queues when it is done anyway
            wake_s = np.inf
            pumping = not on_core

        if comes != _NOTHING:
            if costs_core:
                waiting[(first_waiting + num_waiting) % len(waiting)] = comes
                num_waiting += 1
            else:
                handled = comes
        if handled >= 0:
            gear = control.at[GEAR]
            rows.seen_s[handled] = now_s
            rows.deadline_s[handled] = now_s + load.timeout_s[handled]
            let_in, work = admit(knobs, load, door, handled, now_s)
            rows.work_before[seen + 1] = rows.work_before[seen] + work
            seen += 1
            if let_in and lets_in(served, knobs, load, rows, queues, devices, control.at[LAYOUT], gear, handled, now_s):
                model = served.stage_model[served.gear_entry[gear], 0]
                rank_s = rank(served, knobs, load, rows, handled, gear)
                for row in range(load.offset[handled], load.offset[handled + 1]):
                    rows.since_s[row] = now_s
                    push(queues, rows, load, model, row, rank_s)
                pumping = True
            else:
                refuse(rows, handled, now_s)
        elif handled != _NOTHING:
            place = -1 - handled
            ended = _absorb(served, knobs, load, rows, queues, flights, devices, control, place, now_s)
            arrive(flights, devices, place // places, place, now_s)
            pumping = True
        if ended and knobs.answer_s > 0.0:
            on_core, answering, core_s = True, True, now_s + ended * knobs.answer_s
        elif num_waiting and not on_core:
            on_core = True
            core_s = now_s + _core_time_s(knobs, flights, waiting[first_waiting])
        if pumping:
            wake_s, turn = pump(
                served, knobs, load, rows, queues, flights, devices, turn, control.at[LAYOUT], control.at[GEAR], now_s
            )
