"""The orchestrator's queues and its pump, as arrays: when which rows leave for where.

It follows orchestrator/dispatcher.py step by step; tests/parity holds the two together.
"""

from __future__ import annotations

import numpy as np

from cascadeserve.policy import batching
from planner.simulator.compiling import inlined
from planner.simulator.device import depart
from planner.simulator.policy import due_at_s, due_reason, in_time, least_expected_work, next_queue
from planner.simulator.state import CUT, NONE, OPEN, Devices, Flights, Knobs, Load, Queues, Rows, Served

_NOT_DUE = batching.NOT_DUE
_AGEING = batching.AGEING
_PATIENCE_SLOS = batching.PATIENCE_SLOS


@inlined
def push(queues: Queues, rows: Rows, model: int, row: int, now_s: float) -> None:
    """Append a row to a model's queue."""
    rows.since_s[row] = now_s
    rows.following[row] = NONE
    if queues.first[model] == NONE:
        queues.first[model] = row
    else:
        rows.following[queues.last[model]] = row
    queues.last[model] = row
    queues.rows[model] += 1


@inlined
def _pop(queues: Queues, rows: Rows, model: int) -> int:
    row = queues.first[model]
    queues.first[model] = rows.following[row]
    if queues.first[model] == NONE:
        queues.last[model] = NONE
    queues.rows[model] -= 1
    return row


@inlined
def answer(rows: Rows, load: Load, row: int, how: int) -> bool:
    """Count a row that the stage it is at has answered; returns whether its request has all its answers now."""
    request = load.request[row]
    rows.how[row] = how
    rows.remaining[request] -= 1
    return rows.remaining[request] == 0


@inlined
def end(knobs: Knobs, load: Load, rows: Rows, request: int, now_s: float) -> None:
    """Answer a request."""
    rows.done[request] = True
    rows.latency_s[request] = now_s + knobs.path_s - load.times_s[request]


@inlined
def refuse(rows: Rows, request: int, now_s: float) -> None:
    """Answer a request with an error."""
    rows.done[request] = True
    if request < len(rows.refused_s):
        rows.refused_s[request] = now_s


@inlined
def expire(knobs: Knobs, load: Load, rows: Rows, request: int, now_s: float) -> None:
    """At its deadline a request is answered with what its rows have, or refused if one of them has nothing."""
    if rows.unheard[request] > 0:
        refuse(rows, request, now_s)
        return
    for row in range(load.offset[request], load.offset[request + 1]):
        if rows.how[row] == OPEN:
            rows.stage[row] -= 1
            answer(rows, load, row, CUT)
    end(knobs, load, rows, request, now_s + knobs.answer_s)


@inlined
def ahead_of(
    served: Served, flights: Flights, devices: Devices, layout: int, gear: int, model: int, place: int
) -> tuple[float, int, int]:
    """What rows of the answered batch at a place find at their next model, but for the rows that wait there.

    Device-seconds in flight and slots of the endpoints with the model, and the one that is quickest with it.
    """
    places = len(flights.phase) // len(served.slots)
    most = served.max_batch[gear, model]
    in_flight_s, slots, quickest = 0.0, 0, 0
    least_s = np.inf
    for endpoint in range(len(served.slots)):
        if served.instances[layout, endpoint, model] > 0:
            # the batch itself still counts as in flight
            own_s = flights.planned_s[place] if place // places == endpoint else 0.0
            in_flight_s += devices.planned_s[endpoint] - own_s
            slots += served.slots[endpoint]
            if served.planned_busy_s[model, most, endpoint] < least_s:
                least_s = served.planned_busy_s[model, most, endpoint]
                quickest = endpoint
    return in_flight_s, slots, quickest


@inlined
def drop_done_head(queues: Queues, rows: Rows, load: Load, model: int) -> None:
    """Forget rows at the head of a queue whose request was answered or refused meanwhile."""
    while queues.first[model] != NONE and rows.done[load.request[queues.first[model]]]:
        _pop(queues, rows, model)


@inlined
def drop_done(queues: Queues, rows: Rows, load: Load) -> None:
    """Forget all waiting rows of requests that were refused."""
    for model in range(len(queues.first)):
        row = queues.first[model]
        before = NONE
        while row != NONE:
            after = rows.following[row]
            if not rows.done[load.request[row]]:
                before = row
            else:
                queues.rows[model] -= 1
                if before == NONE:
                    queues.first[model] = after
                else:
                    rows.following[before] = after
                if after == NONE:
                    queues.last[model] = before
            row = after


@inlined
def move_unbound(queues: Queues, rows: Rows, source: int, target: int) -> None:
    """Rows that no gear was bound to go over to another model's queue, in order of their time."""
    kept, moved = NONE, NONE
    first_moved = NONE
    row = queues.first[source]
    queues.first[source], queues.last[source] = NONE, NONE
    while row != NONE:
        after = rows.following[row]
        rows.following[row] = NONE
        if rows.gear[row] == NONE:
            if moved == NONE:
                first_moved = row
            else:
                rows.following[moved] = row
            moved = row
            queues.rows[source] -= 1
            queues.rows[target] += 1
        else:
            if kept == NONE:
                queues.first[source] = row
            else:
                rows.following[kept] = row
            kept = row
        row = after
    queues.last[source] = kept
    _merge(queues, rows, target, first_moved)


@inlined
def _merge(queues: Queues, rows: Rows, target: int, other: int) -> None:
    own = queues.first[target]
    last = NONE
    while own != NONE or other != NONE:
        take_own = other == NONE or (own != NONE and rows.since_s[own] <= rows.since_s[other])
        row = own if take_own else other
        if take_own:
            own = rows.following[own]
        else:
            other = rows.following[other]
        if last == NONE:
            queues.first[target] = row
        else:
            rows.following[last] = row
        last = row
    if last != NONE:
        rows.following[last] = NONE
    queues.last[target] = last


@inlined
def _has_room(served: Served, devices: Devices, layout: int, gear: int, model: int, endpoint: int) -> bool:
    """Whether a batch of the model may leave for an endpoint now."""
    return (
        devices.in_flight[endpoint] <= served.slots[endpoint]
        and served.instances[layout, endpoint, model] > 0
        and served.weight[gear, model, endpoint] > 0.0
    )


@inlined
def _is_room(served: Served, devices: Devices, layout: int, gear: int, model: int) -> bool:
    """Whether a batch of the model may leave for some endpoint now; of many, the first ones nearly always tell."""
    endpoint = 0
    while endpoint < len(served.slots) and not _has_room(served, devices, layout, gear, model, endpoint):
        endpoint += 1
    return endpoint < len(served.slots)


@inlined
def pump(
    served: Served,
    knobs: Knobs,
    load: Load,
    rows: Rows,
    queues: Queues,
    flights: Flights,
    devices: Devices,
    turn: int,
    layout: int,
    gear: int,
    now_s: float,
) -> tuple[float, int]:
    """Send every batch that is due and has a free slot; returns when the next one can be due, and the next turn."""
    while True:
        wake_s = np.inf
        for model in range(len(queues.first)):
            drop_done_head(queues, rows, load, model)
            row = queues.first[model]
            queues.due[model] = _NOT_DUE
            if row == NONE:
                continue
            since_s, max_wait_s = rows.since_s[row], served.max_wait_s[gear, model]
            reason = due_reason(queues.rows[model], since_s, served.min_batch[gear, model], max_wait_s, now_s)
            if reason == _NOT_DUE:
                wake_s = min(wake_s, due_at_s(since_s, max_wait_s))
            elif _is_room(served, devices, layout, gear, model):
                queues.due[model] = reason
            deadline_s = rows.seen_s[load.request[row]] + knobs.timeout_s
            queues.deadline_s[model] = min(deadline_s, since_s + _PATIENCE_SLOS * knobs.slo_s)
            queues.oldest_s[model] = since_s
        model = next_queue(queues.due, queues.deadline_s, queues.oldest_s, now_s, _AGEING)
        if model < 0:
            return wake_s, turn
        _dispatch(served, knobs, load, rows, queues, flights, devices, turn, layout, gear, model, now_s)
        turn += 1


@inlined
def _dispatch(
    served: Served,
    knobs: Knobs,
    load: Load,
    rows: Rows,
    queues: Queues,
    flights: Flights,
    devices: Devices,
    turn: int,
    layout: int,
    gear: int,
    model: int,
    now_s: float,
) -> None:
    """Send one batch; rows that would come too late keep the answer that they have, or are refused."""
    room = served.max_batch[gear, model]
    works_s = served.planned_busy_s[model, min(queues.rows[model], room)]
    for endpoint in range(len(served.slots)):
        devices.room[endpoint] = _has_room(served, devices, layout, gear, model, endpoint)
    endpoint = least_expected_work(devices.planned_s, devices.sent_s, served.weight[gear, model], devices.room, works_s)
    work_s = works_s[endpoint]
    ahead_s = devices.planned_s[endpoint] / served.slots[endpoint]
    chain, last, count = NONE, NONE, 0
    while count < room and queues.first[model] != NONE:
        row = _pop(queues, rows, model)
        request = load.request[row]
        if rows.done[request]:
            continue
        if not in_time(rows.seen_s[request] + knobs.timeout_s, now_s, ahead_s, work_s):
            if rows.stage[row] == 0:
                refuse(rows, request, now_s)
            else:
                rows.stage[row] -= 1
                if answer(rows, load, row, CUT):
                    end(knobs, load, rows, request, now_s + knobs.answer_s)
            continue
        if rows.gear[row] == NONE:
            rows.gear[row] = gear
        rows.following[row] = NONE
        if last == NONE:
            chain = row
        else:
            rows.following[last] = row
        last = row
        count += 1
    if count:
        places = len(flights.phase) // len(served.slots)
        depart(served, flights, devices, endpoint, places, now_s, (model, chain, count, turn, gear))
