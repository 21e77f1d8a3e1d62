"""Which requests are let in, and which rows are still worth sending."""

from __future__ import annotations

NONE = 0
PREDICTED_WORK = 1
# as a plan names them, by number
ADMISSIONS = ("none", "predicted_work")

# without a deadline of its own, a request is given up after this many SLOs (or busy times of its rows, if longer)
DEADLINE_SLOS = 4.0


def in_time(admission: int, deadline_s: float, now_s: float, work_ahead_s: float, busy_s: float) -> bool:
    """Whether what takes `busy_s` can be answered before a deadline, by the plan's busy times.

    `work_ahead_s` is what is still to be done before it, per slot. It is asked twice: when a request arrives behind
    others, and when a batch leaves. Without it a first-in-first-out queue under overload serves rows that expire on the
    way, and nothing is answered in time.
    """
    return admission == NONE or now_s + work_ahead_s + busy_s <= deadline_s
