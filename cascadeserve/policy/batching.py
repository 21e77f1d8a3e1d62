"""When a queue may send a batch, and which queue is served first (paper sections 4.5 and 5).

The functions of this package take scalars and sequences and return numbers, so that a compiled simulator can share
them: no clock, no I/O, no objects. Reason codes are small integers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

NOT_DUE = 0
DUE_FULL = 1
DUE_AGED = 2
# A timer may fire a clock tick early; without slack its queue would not be due yet and the timer be set again for now.
CLOCK_SLACK_S = 1e-6
# Triton's priority 0, the default, counts as this one: 1 is more important, larger ones less.
DEFAULT_PRIORITY = 2
# a row of the next level may be overtaken by what comes up to this many SLOs after it
PRIORITY_STEP_SLOS = 1.0
# From here on levels count alike: for its level no row is overtaken by what comes more than 5 SLOs after it.
LOWEST_PRIORITY = 6


def due_reason(rows: int, oldest_since_s: float, min_batch: int, max_wait_s: float, now_s: float) -> int:
    """Whether a queue of `rows` rows, the oldest queued at `oldest_since_s`, is due, and why."""
    if rows <= 0:
        return NOT_DUE
    if rows >= min_batch:
        return DUE_FULL
    if now_s + CLOCK_SLACK_S >= due_at_s(oldest_since_s, max_wait_s):
        return DUE_AGED
    return NOT_DUE


def due_at_s(oldest_since_s: float, max_wait_s: float) -> float:
    """When a queue that is not due yet will be, if no row arrives."""
    return oldest_since_s + max_wait_s


def next_queue(due: Sequence[int], rank_s: Sequence[float]) -> int:
    """Index of the due queue to serve next, the one whose first row has the least rank (`ordering`); -1 if none is."""
    best = -1
    for index in range(len(due)):
        if due[index] != NOT_DUE and (best < 0 or rank_s[index] < rank_s[best]):
            best = index
    return best


def handicap_s(priority: int, slo_s: float) -> float:
    """Seconds by which rows of a priority count as having come later than they did; negative: earlier.

    A queue is kept in order of arrival plus handicap. So a more important row goes first among what came at about its
    time, and nothing starves: however many important rows keep arriving, each row is overtaken only for so long.
    """
    level = min(priority, LOWEST_PRIORITY) if priority else DEFAULT_PRIORITY
    return (level - DEFAULT_PRIORITY) * PRIORITY_STEP_SLOS * slo_s
