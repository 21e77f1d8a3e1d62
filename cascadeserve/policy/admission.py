"""Which requests are let in, and which rows are still worth sending."""

from __future__ import annotations

NONE = 0
PREDICTED_WORK = 1
# as a plan names them, by number
ADMISSIONS = ("none", "predicted_work")

# without a deadline of its own, a request is given up after this many SLOs (or busy times of its rows, if longer)
DEADLINE_SLOS = 4.0
# A backlog stands when it has meant a wait of more than an SLO for this long: a surge is answered by a faster gear two
# or three ticks later, and until then what can be served before its deadline is worth having.
STANDING_AFTER_S = 0.3
# In the fastest gear nothing will answer it, so only chance is allowed for: at the highest rate that keeps the SLO some
# requests wait for longer than that now and then.
LAST_GEAR_SLOS = 2.0
# Of a standing backlog no more is let in than can be answered within this many SLOs: predictions miss a little.
STANDING_SLOS = 0.9
# Yet this much may always wait, or there would not be enough for full batches.
LEAST_WAIT_SLOS = 0.5
# and it is over when it means less than this
CLEARED_SLOS = 0.25
# In the fastest gear it has to mean less for this long: what overloads it goes on, and the next surge would be let in
# as the first one was, time and again, with few answers within the SLO.
CLEARED_FOR_S = 1.0
NOT_STANDING = float("inf")
# How often what waits is looked at. Between two looks it is what it was, and what has been let in since.
LOOK_S = 0.02
# weight of a request in the moving mean of rows per request
LAST_WEIGHT = 0.02


def wait_ahead_s(in_flight_s: float, queued_s: float, slots: float, own_slots: float) -> float:
    """How long a request would wait behind the work of batches in flight and of the rows of its family's queues.

    Batches are on the `slots` of all endpoints that serve its family's gear. Its queues go to `own_slots` of them: a
    family that has a backlog delays the others no further than its share of the devices goes.
    """
    return in_flight_s / slots + queued_s / own_slots


def in_time(admission: int, deadline_s: float, now_s: float, work_ahead_s: float, busy_s: float) -> bool:
    """Whether what takes `busy_s` can be answered before a deadline, by the plan's busy times.

    `work_ahead_s` is what is still to be done before it, per slot, where it may go. It is asked twice: when a request
    arrives behind others, and when a batch leaves. Without it a first-in-first-out queue under overload serves rows
    that expire on the way, and nothing is answered in time.
    """
    return admission == NONE or now_s + work_ahead_s + busy_s <= deadline_s


def admits(
    wait_s: float, own_s: float, slo_s: float, surge_slos: float, now_s: float, standing_since_s: float
) -> tuple[bool, float, float]:
    """(Whether a request is let in that would wait for `wait_s`, the longest wait that is, standing_since_s).

    `own_s` is how long its own batches take then. `surge_slos` is how much may wait in a surge: DEADLINE_SLOS, or
    LAST_GEAR_SLOS where there is no faster gear. standing_since_s is when the wait came to be more than an SLO,
    NOT_STANDING while it is not, and is to be passed back at the next call. Without the lower limit a lasting overload
    would be served at the very end of every deadline: busy, and all of it late.
    """
    stood_s = now_s - standing_since_s
    stands = stood_s >= STANDING_AFTER_S
    if not stands:
        standing_since_s = NOT_STANDING if wait_s <= slo_s else min(standing_since_s, now_s)
    elif wait_s > CLEARED_SLOS * slo_s:
        # for no longer than that, so that what it comes to beyond tells how long it has been cleared
        standing_since_s = max(standing_since_s, now_s - CLEARED_FOR_S)
    elif surge_slos >= DEADLINE_SLOS or stood_s >= 2 * CLEARED_FOR_S:
        standing_since_s, stands = NOT_STANDING, False
    limit_s = max(STANDING_SLOS * slo_s - own_s, LEAST_WAIT_SLOS * slo_s) if stands else surge_slos * slo_s
    return wait_s <= limit_s, limit_s, standing_since_s
