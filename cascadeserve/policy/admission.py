"""Which rows are still worth sending."""

from __future__ import annotations

# without a deadline of its own, a request is given up after this many SLOs (or busy times of its rows, if longer)
DEADLINE_SLOS = 4.0


def in_time(deadline_s: float, now_s: float, work_ahead_s: float, batch_busy_s: float) -> bool:
    """Whether a batch that leaves now can be answered before a deadline, by the plan's busy times.

    `work_ahead_s` is what the endpoint still has to do before it. Without this test a first-in-first-out queue under
    overload serves rows that expire on the way, and nothing is answered in time.
    """
    return now_s + work_ahead_s + batch_busy_s <= deadline_s
