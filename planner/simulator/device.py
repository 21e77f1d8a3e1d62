"""An endpoint: batches travel to it, wait there if all instances of their model are busy, share its slots, come back.

What was measured (reference/triton.md): batches of one model run one after the other on its instances; up to `slots`
batches run at full speed; one more that finds a free instance shares the device with the others, at the loss that the
profile has for the pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from planner.simulator.compiling import inlined
from planner.simulator.state import COMING, FREE, GOING, NONE, QUEUED, RUNNING, Devices, Flights, Served

if TYPE_CHECKING:
    from planner.simulator.state import Floats, Ints

# Work left of less than this is done: late in a long run time itself has no finer steps.
_MOMENT_S = 1e-9


@inlined
def busy_s(by_rows_s: Floats, work: float, endpoint: int) -> float:
    """Device-seconds of a batch that is as much work as `work` rows of [B, P] busy times; as `policy.batch_work_s`."""
    whole, last = int(work), len(by_rows_s) - 1
    if whole < 1:
        return by_rows_s[1, endpoint]
    if whole >= last:
        return by_rows_s[last, endpoint] * (work / last)
    low_s = by_rows_s[whole, endpoint]
    if work == whole:
        return low_s
    return low_s + (by_rows_s[whole + 1, endpoint] - low_s) * (work - whole)


@inlined
def speed(served: Served, flights: Flights, endpoint: int, first: int, places: int) -> float:
    """Device-seconds per second that each running batch of an endpoint gets done."""
    running = 0
    pairs = 0
    efficiency = 0.0
    for place in range(first, first + places):
        if flights.phase[place] != RUNNING:
            continue
        for other in range(first, place):
            if flights.phase[other] == RUNNING:
                pairs += 1
                efficiency += served.efficiency[endpoint, flights.model[other], flights.model[place]]
        running += 1
    if running <= served.slots[endpoint]:
        return 1.0
    return served.slots[endpoint] / running * efficiency / pairs


@inlined
def look_ahead(served: Served, flights: Flights, devices: Devices, endpoint: int, places: int) -> None:
    """Find when something happens at an endpoint next."""
    first = endpoint * places
    rate = speed(served, flights, endpoint, first, places)
    soonest_s = np.inf
    for place in range(first, first + places):
        phase = flights.phase[place]
        if phase in (GOING, COMING):
            soonest_s = min(soonest_s, flights.until_s[place])
        elif phase == RUNNING:
            soonest_s = min(soonest_s, devices.as_of_s[endpoint] + max(flights.until_s[place], 0.0) / rate)
    devices.next_s[endpoint] = soonest_s


@inlined
def count_work(served: Served, flights: Flights, devices: Devices, endpoint: int, places: int, now_s: float) -> None:
    """Take what running batches got done up to now off what they have left."""
    first = endpoint * places
    passed_s = now_s - devices.as_of_s[endpoint]
    devices.as_of_s[endpoint] = now_s
    if passed_s <= 0.0:
        return
    done_s = passed_s * speed(served, flights, endpoint, first, places)
    for place in range(first, first + places):
        if flights.phase[place] == RUNNING:
            flights.until_s[place] -= done_s
            devices.done_s[endpoint] += done_s


@inlined
def depart(
    served: Served,
    flights: Flights,
    devices: Devices,
    endpoint: int,
    places: int,
    now_s: float,
    batch: tuple[int, ...],
    work: float,
) -> None:
    """Send a batch (model, first row of its chain, rows, turn, gear in force) of some work to an endpoint."""
    model, chain, rows, turn, gear = batch
    count_work(served, flights, devices, endpoint, places, now_s)
    place = endpoint * places
    while flights.phase[place] != FREE:
        place += 1
    planned_s = busy_s(served.planned_busy_s[model], work, endpoint)
    flights.phase[place] = GOING
    flights.model[place] = model
    flights.first[place] = chain
    flights.rows[place] = rows
    flights.work[place] = work
    flights.until_s[place] = now_s + served.going_s[model, endpoint]
    flights.planned_s[place] = planned_s
    flights.turn[place] = turn
    devices.in_flight[endpoint] += 1
    devices.planned_s[endpoint] += planned_s
    devices.sent_s[endpoint] += planned_s
    devices.batches[model] += 1
    devices.batch_rows[model] += rows
    if turn < len(flights.log.left_s):
        flights.log.endpoint[turn] = endpoint
        flights.log.place[turn] = place - endpoint * places
        flights.log.model[turn] = model
        flights.log.rows[turn] = rows
        flights.log.gear[turn] = gear
        flights.log.left_s[turn] = now_s
    look_ahead(served, flights, devices, endpoint, places)


@inlined
def arrive(flights: Flights, devices: Devices, endpoint: int, place: int, now_s: float) -> None:
    """Free the place of a batch that was answered."""
    if flights.turn[place] < len(flights.log.back_s):
        flights.log.back_s[flights.turn[place]] = now_s
    flights.phase[place] = FREE
    devices.in_flight[endpoint] -= 1
    left_s = devices.planned_s[endpoint] - flights.planned_s[place]
    devices.planned_s[endpoint] = left_s if devices.in_flight[endpoint] else 0.0


@inlined
def step(
    served: Served, flights: Flights, devices: Devices, endpoint: int, places: int, layout: int, now_s: float
) -> int:
    """Let happen what is due at an endpoint; returns the place of a batch that came back, or NONE."""
    count_work(served, flights, devices, endpoint, places, now_s)
    first = endpoint * places
    came_back = NONE
    for place in range(first, first + places):
        if flights.phase[place] == RUNNING and flights.until_s[place] <= _MOMENT_S:
            flights.phase[place] = COMING
            flights.until_s[place] = now_s + served.coming_s[flights.model[place], endpoint]
            if flights.turn[place] < len(flights.log.ended_s):
                flights.log.ended_s[flights.turn[place]] = now_s
        elif flights.phase[place] == GOING and flights.until_s[place] <= now_s:
            flights.phase[place] = QUEUED
    _start_queued(served, flights, endpoint, places, served.instances[layout, endpoint], now_s)
    for place in range(first, first + places):
        if flights.phase[place] == COMING and flights.until_s[place] <= now_s and came_back == NONE:
            came_back = place
            # not FREE yet: the orchestrator counts it as in flight until it has handled the answer
            flights.until_s[place] = np.inf
    look_ahead(served, flights, devices, endpoint, places)
    return came_back


@inlined
def _start_queued(served: Served, flights: Flights, endpoint: int, places: int, instances: Ints, now_s: float) -> None:
    """Start queued batches, in the order of their departure, as far as their models have idle instances."""
    first = endpoint * places
    while True:
        chosen = NONE
        for place in range(first, first + places):
            if flights.phase[place] != QUEUED:
                continue
            model = flights.model[place]
            busy = 0
            for other in range(first, first + places):
                busy += flights.phase[other] == RUNNING and flights.model[other] == model
            if busy < instances[model] and (chosen == NONE or flights.turn[place] < flights.turn[chosen]):
                chosen = place
        if chosen == NONE:
            return
        flights.phase[chosen] = RUNNING
        flights.until_s[chosen] = busy_s(served.device_busy_s[flights.model[chosen]], flights.work[chosen], endpoint)
        if flights.turn[chosen] < len(flights.log.began_s):
            flights.log.began_s[flights.turn[chosen]] = now_s
            flights.log.device_s[flights.turn[chosen]] = flights.until_s[chosen]
