"""What the compiled simulator works on: numbers and arrays only.

Axes: M models, P endpoints, E ladder entries, K stages (of the longest entry), G gears, L layouts, S states (the
layouts first, then what is between them), R records, n requests, r rows, F batches in flight (of the endpoint with most
slots), B largest batch, or number of rows that a busy time is stated for, + 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cascadeserve.policy.admission import DEADLINE_SLOS, LOOK_S, NOT_STANDING
from cascadeserve.policy.gear_switch import HOLD

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]

# phases of a place for a batch in flight
FREE, GOING, QUEUED, RUNNING, COMING = range(5)
NONE = -1
# how rows are answered: not yet, by a stage that was certain of them or the last one, by one that was not
OPEN, SURE, CUT = range(3)
# places in `Control.at` and `Control.since_s`
GEAR, LAYOUT, GEAR_LAYOUT, AIM, WISH = range(5)
LOW, CHANGE = 0, 1
# places in what the door knows: when it is looked at next; how long what waits takes, and each row let in adds to it;
# how long a request's own batches take; how many SLOs may wait in a surge; the mean work of a request; since when the
# wait has been too long
LOOK, WAIT, ROW, OWN, SURGE, ROWS_OF_ONE, STANDING = range(7)


class Served(NamedTuple):
    """A gear plan, the devices under it, and how the recorded rows fare: all that stays as it is during a run."""

    # of ladder entries
    entry_stages: Ints  # [E]
    stage_model: Ints  # [E, K]
    reach: Floats  # [E, K]
    leaves_at: NDArray[np.int8]  # [E, R] stage at which a record leaves
    # of gears
    gear_entry: Ints  # [G]
    min_batch: Ints  # [G, M]
    max_batch: Ints  # [G, M]
    max_wait_s: Floats  # [G, M]
    weight: Floats  # [G, M, P] load weight x slots, as a share of the most slots
    # by stage of the gear's entry, for the demand; work is the mean of endpoints as in `gear_work`
    stage_row_work_s: Floats  # [G, K]
    stage_full_batch_s: Floats  # [G, K]
    stage_min_batch: Ints  # [G, K]
    stage_max_wait_s: Floats  # [G, K]
    # of a request that comes: device-seconds of its own batches, and how much may wait before it in a surge
    own_s: Floats  # [G]
    surge_slos: Floats  # [G]
    # device-seconds a row waiting for a model still takes
    onward_work_s: Floats  # [G, M]
    # and for the model alone
    row_work_s: Floats  # [G, M]
    # and of that, what the endpoints with the gear's entry model take of it; 0 where none of them has the model
    work_there_s: Floats  # [S, G, M]
    # of layouts and the states between them: gears by rising rate
    gears_in: Ints  # [S]
    layout_gear: Ints  # [S, G]
    upper_rate_per_s: Floats  # [S, G]
    max_rate_per_s: Floats  # [L]
    instances: Ints  # [S, P, M]
    # seconds until a layout's instances stand, coming from another one without states between
    change_s: Floats  # [L, L]
    first_state: Ints  # [L, L] on the way from one layout to another, or NONE
    follows: Ints  # [S]
    stays_s: Floats  # [S]
    # of models and endpoints
    slots: Ints  # [P]
    planned_busy_s: Floats  # [M, B, P] by rows, as the plan has it
    device_busy_s: Floats  # [M, B, P] by rows, as the device has it
    going_s: Floats  # [M, P] from the orchestrator to the device
    coming_s: Floats  # [M, P] and back
    efficiency: Floats  # [P, M, M] work done per second while two models share a slot


class Knobs(NamedTuple):
    """Numbers of a run; all durations in seconds."""

    slo_s: float
    dispersion: float
    gear_dwell_s: float
    layout_up_after_s: float
    layout_down_after_s: float
    layout_down_fraction: float
    # numbers of `cascadeserve.policy`
    balancer: int
    order: int
    admission: int
    # what the orchestrator's own core spends on a request, its answer, a batch, a row of a batch
    request_s: float
    answer_s: float
    batch_s: float
    row_s: float
    # what a request's answer takes beside that
    path_s: float
    # gear that is never left, or NONE
    held_gear: int
    first_layout: int
    until_s: float


class Load(NamedTuple):
    """Requests as the kernel sees them."""

    times_s: Floats  # [n]
    offset: Ints  # [n + 1] first row of each request
    record: Ints  # [r]
    request: Ints  # [r] the request of a row
    work: Floats  # [n] rows of the plan's busy times that one row of a request is
    timeout_s: Floats  # [n]


class Rows(NamedTuple):
    """Rows and requests on their way."""

    following: Ints  # [r] next row in the same queue or batch
    preceding: Ints  # [r] the row before it in the same queue
    rank_s: Floats  # [r] in that queue
    since_s: Floats  # [r]
    gear: NDArray[np.int16]  # [r] NONE until the row first leaves
    stage: NDArray[np.int8]  # [r]
    how: NDArray[np.int8]  # [r] OPEN, SURE or CUT
    seen_s: Floats  # [n] when the orchestrator took the request in
    work_before: Floats  # [n + 1] of all requests seen before each, by what the orchestrator knows of them
    deadline_s: Floats  # [n]
    remaining: Ints  # [n] rows that are OPEN
    unheard: Ints  # [n] rows that no stage has answered
    done: NDArray[np.bool_]  # [n]
    latency_s: Floats  # [n] NaN: refused
    # when it was refused, NaN: it was not; of length 0 where nothing is logged
    refused_s: Floats  # [n]


class Queues(NamedTuple):
    """One queue per model, as a chain of rows by rank, and room to compare them."""

    first: Ints  # [M]
    last: Ints  # [M]
    rows: Ints  # [M]
    work: Floats  # [M] the same in rows of the plan's busy times
    due: Ints  # [M]
    rank_s: Floats  # [M]


class Log(NamedTuple):
    """The first b batches by departure; b is 0 where nobody asked. Times in seconds, NaN: not yet."""

    endpoint: Ints  # [b]
    place: Ints  # [b] at its endpoint
    model: Ints  # [b]
    rows: Ints  # [b]
    gear: Ints  # [b] in force at the departure
    left_s: Floats  # [b]
    began_s: Floats  # [b] running, maybe beside others
    ended_s: Floats  # [b]
    back_s: Floats  # [b] its answer was handled
    device_s: Floats  # [b] device-seconds it takes, NaN until it runs


class Flights(NamedTuple):
    """Batches in flight, F places per endpoint."""

    phase: Ints  # [P * F]
    model: Ints  # [P * F]
    first: Ints  # [P * F] chain of rows
    rows: Ints  # [P * F]
    work: Floats  # [P * F] the same in rows of the plan's busy times
    # end of the phase while GOING or COMING, device-seconds left while RUNNING
    until_s: Floats  # [P * F]
    planned_s: Floats  # [P * F]
    turn: Ints  # [P * F] order of departure
    log: Log


class Devices(NamedTuple):
    """Endpoints."""

    in_flight: Ints  # [P]
    planned_s: Floats  # [P] sent and not answered, by the plan's busy times
    sent_s: Floats  # [P] ever sent
    as_of_s: Floats  # [P] time to which the work of running batches is counted
    next_s: Floats  # [P] when something happens there next
    done_s: Floats  # [P] device-seconds done
    room: NDArray[np.bool_]  # [P]
    works_s: Floats  # [P] what a batch would take there
    last: Ints  # [1] the endpoint that was sent to last
    batches: Ints  # [M] batches sent by model
    batch_rows: Ints  # [M] and rows in them


class Control(NamedTuple):
    """The gear loop: `at` [5] is the gear in force, the layout, that of the gear, the one aimed at, and the wish.

    `since_s` [5]: since when demand is low (LOW), when the layout aimed at will stand (CHANGE), since when the wish
    lasts (WISH).
    """

    at: Ints
    since_s: Floats


class Ticks(NamedTuple):
    """What the gear loop saw and decided, tick by tick."""

    gear: NDArray[np.int16]  # [t]
    layout: NDArray[np.int16]  # [t]
    demand_per_s: Floats  # [t]


def empty_rows(load: Load, *, logged: bool = False) -> Rows:
    """All requests still to come; `logged`: note when requests are refused."""
    requests, rows = len(load.times_s), len(load.record)
    return Rows(
        following=np.full(rows, NONE, np.int64),
        preceding=np.full(rows, NONE, np.int64),
        rank_s=np.zeros(rows),
        since_s=np.zeros(rows),
        gear=np.full(rows, NONE, np.int16),
        stage=np.zeros(rows, np.int8),
        how=np.full(rows, OPEN, np.int8),
        seen_s=np.zeros(requests),
        work_before=np.zeros(requests + 1),
        deadline_s=np.full(requests, np.inf),
        remaining=np.diff(load.offset),
        unheard=np.diff(load.offset),
        done=np.zeros(requests, np.bool_),
        latency_s=np.full(requests, np.nan),
        refused_s=np.full(requests if logged else 0, np.nan),
    )


def empty_queues(models: int) -> Queues:
    """Nothing waits."""
    return Queues(
        first=np.full(models, NONE, np.int64),
        last=np.full(models, NONE, np.int64),
        rows=np.zeros(models, np.int64),
        work=np.zeros(models),
        due=np.zeros(models, np.int64),
        rank_s=np.zeros(models),
    )


def first_gear(gear: int, layout: int) -> Control:
    """As at the start of the orchestrator."""
    return Control(at=np.array([gear, layout, layout, layout, HOLD]), since_s=np.array([-1.0, np.inf, 0.0, 0.0, 0.0]))


def first_door() -> Floats:
    """It knows nothing yet, so everybody is let in."""
    return np.array([LOOK_S / 2, 0.0, 0.0, 0.0, DEADLINE_SLOS, 1.0, NOT_STANDING])


def empty_log(batches: int) -> Log:
    """Room for that many batches."""
    ints, floats = (np.full((5, batches), NONE, np.int64), np.full((5, batches), np.nan))
    return Log(*ints, *floats)


def idle_flights(endpoints: int, places: int, *, logged_batches: int = 0) -> Flights:
    """Nothing is in flight."""
    total = endpoints * places
    ints = [np.zeros(total, np.int64) for _ in range(5)]
    return Flights(
        phase=ints[0],
        model=ints[1],
        first=ints[2],
        rows=ints[3],
        work=np.zeros(total),
        until_s=np.zeros(total),
        planned_s=np.zeros(total),
        turn=ints[4],
        log=empty_log(logged_batches),
    )


def idle_devices(endpoints: int, models: int) -> Devices:
    """All endpoints are up and idle."""
    floats = [np.zeros(endpoints) for _ in range(4)]
    return Devices(
        in_flight=np.zeros(endpoints, np.int64),
        planned_s=floats[0],
        sent_s=floats[1],
        as_of_s=floats[2],
        next_s=np.full(endpoints, np.inf),
        done_s=floats[3],
        room=np.zeros(endpoints, np.bool_),
        works_s=np.zeros(endpoints),
        last=np.full(1, NONE, np.int64),
        batches=np.zeros(models, np.int64),
        batch_rows=np.zeros(models, np.int64),
    )
