"""Which waiting row goes first, within a queue and among queues.

Every row gets a **rank** when it begins to wait: the time at which its request arrived, plus how long it can be made to
stand back. The least rank goes first. A rank does not change with time, so a queue is sorted once, and what has waited
longer goes before what came later in the end: that is ageing. A row stands back at most `PATIENCE_SLOS` SLOs, so it is
never passed by one that arrived later than that after it.

Ranks count from the arrival of the *request*: rows that waited through one stage of a cascade do not begin anew in the
next.
"""

from __future__ import annotations

FIFO = 0
EARLIEST_DEADLINE = 1
LEAST_REMAINING_WORK = 2
# as a plan names them, by number
ORDERS = ("fifo", "earliest_deadline", "least_remaining_work")

# No row stands back longer than this many SLOs, however late its deadline and however much its work.
PATIENCE_SLOS = 4.0
# seconds that a row stands back per second of work
BEHIND_PER_WORK = 10.0


def rank_s(order: int, arrived_s: float, deadline_s: float, work_s: float, slo_s: float) -> float:
    """Rank of a row whose request arrived at `arrived_s` and is expected to take `work_s` device-seconds in all.

    First in, first out: nothing stands back. Earliest deadline: until its deadline. Least remaining work: in proportion
    to its work, so that it goes before a request of more work unless that came earlier by as much. Work is what was
    expected of the request when it came: rows that turn out to be hard do not lose their place for it, and among
    requests that are alike it is first in, first out.
    """
    behind_s = 0.0
    if order == EARLIEST_DEADLINE:
        behind_s = deadline_s - arrived_s
    elif order == LEAST_REMAINING_WORK:
        behind_s = BEHIND_PER_WORK * work_s
    return arrived_s + min(behind_s, PATIENCE_SLOS * slo_s)
