"""The orchestrator's queues and its pump, as arrays: when which rows leave for where.

It follows orchestrator/dispatcher.py step by step; tests/parity holds the two together.
"""

from __future__ import annotations

import numpy as np

from cascadeserve.policy import admission, batching
from planner.simulator.compiling import inlined
from planner.simulator.device import busy_s, depart
from planner.simulator.policy import choose_endpoint, due_at_s, due_reason, in_time, next_queue, rank_s
from planner.simulator.state import CUT, NONE, OPEN, Devices, Flights, Knobs, Load, Queues, Rows, Served

_NOT_DUE = batching.NOT_DUE
_LETS_ALL_IN = admission.NONE


@inlined
def gone(rows: Rows, request: int, now_s: float) -> bool:
    """Whether a request was answered or refused, or its deadline has passed."""
    return rows.done[request] or now_s > rows.deadline_s[request]


@inlined
def rank(served: Served, knobs: Knobs, load: Load, rows: Rows, request: int, gear: int) -> float:
    """Rank of rows of a request that begin to wait somewhere now."""
    size = load.offset[request + 1] - load.offset[request]
    work_s = size * load.work[request] * served.onward_work_s[gear, served.stage_model[served.gear_entry[gear], 0]]
    return rank_s(knobs.order, rows.seen_s[request], rows.deadline_s[request], work_s, knobs.slo_s)


@inlined
def push(queues: Queues, rows: Rows, load: Load, model: int, row: int, rank_s_: float) -> None:
    """Put a row into a model's queue, behind all that do not have a higher rank."""
    rows.rank_s[row] = rank_s_
    before = queues.last[model]
    while before != NONE and rows.rank_s[before] > rank_s_:
        before = rows.preceding[before]
    after = queues.first[model] if before == NONE else rows.following[before]
    rows.preceding[row], rows.following[row] = before, after
    if before == NONE:
        queues.first[model] = row
    else:
        rows.following[before] = row
    if after == NONE:
        queues.last[model] = row
    else:
        rows.preceding[after] = row
    queues.rows[model] += 1
    queues.work[model] += load.work[load.request[row]]


@inlined
def _take_out(queues: Queues, rows: Rows, load: Load, model: int, row: int) -> None:
    before, after = rows.preceding[row], rows.following[row]
    if before == NONE:
        queues.first[model] = after
    else:
        rows.following[before] = after
    if after == NONE:
        queues.last[model] = before
    else:
        rows.preceding[after] = before
    queues.rows[model] -= 1
    queues.work[model] -= load.work[load.request[row]]
    if queues.rows[model] == 0:
        queues.work[model] = 0.0


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
def _cut_short(knobs: Knobs, load: Load, rows: Rows, row: int, now_s: float) -> None:
    """A row that would come too late keeps the answer that it has; if it has none, its request is refused."""
    request = load.request[row]
    if rows.stage[row] == 0:
        refuse(rows, request, now_s)
        return
    rows.stage[row] -= 1
    if answer(rows, load, row, CUT):
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
def drop_done(queues: Queues, rows: Rows, load: Load, now_s: float) -> None:
    """Forget all waiting rows of requests that were refused."""
    for model in range(len(queues.first)):
        row = queues.first[model]
        while row != NONE:
            after = rows.following[row]
            if gone(rows, load.request[row], now_s):
                _take_out(queues, rows, load, model, row)
            row = after


@inlined
def drop_done_head(queues: Queues, rows: Rows, load: Load, model: int, now_s: float) -> int:
    """Forget such rows at the head of a queue; returns the head, or NONE."""
    row = queues.first[model]
    while row != NONE and gone(rows, load.request[row], now_s):
        _take_out(queues, rows, load, model, row)
        row = queues.first[model]
    return row


@inlined
def move_unbound(
    served: Served, knobs: Knobs, load: Load, rows: Rows, queues: Queues, source: int, target: int, gear: int
) -> None:
    """Rows that no gear was bound to go over to another model's queue."""
    row = queues.first[source]
    while row != NONE:
        after = rows.following[row]
        if rows.gear[row] == NONE:
            _take_out(queues, rows, load, source, row)
            push(queues, rows, load, target, row, rank(served, knobs, load, rows, load.request[row], gear))
        row = after


@inlined
def lets_in(
    served: Served,
    knobs: Knobs,
    load: Load,
    rows: Rows,
    queues: Queues,
    devices: Devices,
    layout: int,
    gear: int,
    request: int,
    now_s: float,
) -> bool:
    """Whether a request that arrives can still be answered in time behind what goes before it."""
    entry = served.stage_model[served.gear_entry[gear], 0]
    drop_done_head(queues, rows, load, entry, now_s)
    if knobs.admission == _LETS_ALL_IN:
        return True
    rank_s_ = rank(served, knobs, load, rows, request, gear)
    ahead_s = 0.0
    for model in range(len(queues.first)):
        if queues.first[model] != NONE:
            ahead_s += work_before(queues, rows, load, model, rank_s_) * served.work_there_s[layout, gear, model]
    if ahead_s == 0.0:
        return True
    slots, in_flight_s, fewest_s = 0, 0.0, np.inf
    # all its rows but those of its last batch go before that too
    all_rows = load.offset[request + 1] - load.offset[request]
    last_rows = min(all_rows, served.max_batch[gear, entry])
    ahead_s += (all_rows - last_rows) * load.work[request] * served.work_there_s[layout, gear, entry]
    work = last_rows * load.work[request]
    for endpoint in range(len(served.slots)):
        if served.instances[layout, endpoint, entry] > 0:
            in_flight_s += devices.planned_s[endpoint]
            slots += served.slots[endpoint]
            fewest_s = min(fewest_s, busy_s(served.planned_busy_s[entry], work, endpoint))
    if slots == 0:
        return True
    ahead_s = (ahead_s + in_flight_s) / slots
    return in_time(knobs.admission, rows.deadline_s[request], now_s, ahead_s, fewest_s)


@inlined
def work_before(queues: Queues, rows: Rows, load: Load, model: int, rank_s_: float) -> float:
    """Work in a queue that goes before a row of this rank."""
    if rows.rank_s[queues.last[model]] <= rank_s_:
        return queues.work[model]
    work = 0.0
    row = queues.first[model]
    while row != NONE and rows.rank_s[row] <= rank_s_:
        work += load.work[load.request[row]]
        row = rows.following[row]
    return work


@inlined
def _oldest_since_s(rows: Rows, load: Load, row: int, now_s: float) -> float:
    """Since when the row that has waited for longest, of a queue from `row` on, does so."""
    oldest_s = np.inf
    while row != NONE:
        if not gone(rows, load.request[row], now_s):
            oldest_s = min(oldest_s, rows.since_s[row])
        row = rows.following[row]
    return oldest_s


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
            row = drop_done_head(queues, rows, load, model, now_s)
            queues.due[model] = _NOT_DUE
            if row == NONE:
                continue
            min_batch, since_s = served.min_batch[gear, model], now_s
            if queues.rows[model] < min_batch:
                since_s = _oldest_since_s(rows, load, row, now_s)
            max_wait_s = served.max_wait_s[gear, model]
            reason = due_reason(queues.rows[model], since_s, min_batch, max_wait_s, now_s)
            if reason == _NOT_DUE:
                wake_s = min(wake_s, due_at_s(since_s, max_wait_s))
            elif _is_room(served, devices, layout, gear, model):
                queues.due[model] = reason
            queues.rank_s[model] = rows.rank_s[row]
        model = next_queue(queues.due, queues.rank_s)
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
    most = served.max_batch[gear, model]
    chain, last, count, work = NONE, NONE, 0, 0.0
    while count < most and queues.first[model] != NONE:
        row = queues.first[model]
        _take_out(queues, rows, load, model, row)
        if gone(rows, load.request[row], now_s):
            continue
        chain, last = _append(rows, chain, last, row)
        count += 1
        work += load.work[load.request[row]]
    for endpoint in range(len(served.slots)):
        devices.room[endpoint] = _has_room(served, devices, layout, gear, model, endpoint)
        devices.works_s[endpoint] = busy_s(served.planned_busy_s[model], work, endpoint)
    endpoint = choose_endpoint(
        knobs.balancer,
        turn,
        devices.last[0],
        devices.in_flight,
        devices.planned_s,
        devices.sent_s,
        served.weight[gear, model],
        devices.room,
        devices.works_s,
    )
    devices.last[0] = endpoint
    work_s = devices.works_s[endpoint]
    ahead_s = devices.planned_s[endpoint] / served.slots[endpoint]
    taken, chain, last, count, work = chain, NONE, NONE, 0, 0.0
    while count < most and (taken != NONE or queues.first[model] != NONE):
        row = taken
        if taken != NONE:
            taken = rows.following[row]
        else:
            row = queues.first[model]
            _take_out(queues, rows, load, model, row)
        request = load.request[row]
        if gone(rows, request, now_s):
            continue
        if not in_time(knobs.admission, rows.deadline_s[request], now_s, ahead_s, work_s):
            _cut_short(knobs, load, rows, row, now_s)
            continue
        if rows.gear[row] == NONE:
            rows.gear[row] = gear
        chain, last = _append(rows, chain, last, row)
        count += 1
        work += load.work[request]
    if count:
        places = len(flights.phase) // len(served.slots)
        depart(served, flights, devices, endpoint, places, now_s, (model, chain, count, turn, gear), work)


@inlined
def _append(rows: Rows, chain: int, last: int, row: int) -> tuple[int, int]:
    """Put a row at the end of a chain; returns its first and its last row."""
    rows.following[row] = NONE
    if last == NONE:
        return row, row
    rows.following[last] = row
    return chain, row
