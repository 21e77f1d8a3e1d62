"""How much load there is: arrival rate plus a backlog that the gear in force did not plan for.

The paper switches on the queries counted in a fixed window and holds a gear while the queue is long (section 5); both
misfire (see its traps: window noise, latching). Here the rate comes from a window that always holds enough requests,
a jump test adds speed, and only work beyond the normal batching queues counts as backlog.
"""

from __future__ import annotations

from bisect import bisect_left
from math import sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# a window of 50 requests has a relative standard error of 14 % under Poisson arrivals
MIN_WINDOW_REQUESTS = 50
# an up-jump is believed at 4 standard deviations of the count it is judged by
JUMP_DEVIATIONS = 4.0
JUMP_MIN_REQUESTS = 8


def window_rate(times_s: Sequence[float], rows: Sequence[int], start: int, now_s: float, min_window_s: float) -> float:
    """Rows per second over the requests from index `start` on (`times_s` rises; shapes [n]).

    The window reaches from the oldest of them to now, so that the rate falls by itself when arrivals stop.
    """
    total = 0
    for index in range(start, len(times_s)):
        total += rows[index]
    if total == 0:
        return 0.0
    return total / max(now_s - times_s[start], min_window_s)


def is_up_jump(count: int, span_s: float, requests_per_s: float, dispersion: float) -> bool:
    """Whether `count` requests in the last `span_s` seconds are too many for `requests_per_s`.

    Requests are counted, not rows, so that a few large requests are no jump. Their variance is that of Poisson
    arrivals times the plan's index of `dispersion`; the second term (Cornish-Fisher) corrects for the Poisson tail,
    which is heavier than the normal one.
    """
    if count < JUMP_MIN_REQUESTS:
        return False
    expected = requests_per_s * span_s
    limit = JUMP_DEVIATIONS * sqrt(max(expected, 1.0) * dispersion) + JUMP_DEVIATIONS**2 / 6 * dispersion
    return count > expected + limit


def demand_per_s(
    arrival_per_s: float, queued_work_s: float, planned_work_s: float, work_per_row_s: float, drain_time_s: float
) -> float:
    """Rows per second that must be served to keep up and to drain the unplanned backlog within `drain_time_s`.

    `queued_work_s` and `planned_work_s` are device-seconds over all stages; `work_per_row_s` turns them back into
    entry rows.
    """
    backlog_s = max(0.0, queued_work_s - planned_work_s)
    return arrival_per_s + backlog_s / max(work_per_row_s, 1e-9) / drain_time_s


class ArrivalWindow:
    """The recent arrivals of one family, and the rate they tell of."""

    def __init__(self, *, dispersion: float = 1.0, window_s: float = 1.0, jump_span_s: float = 0.1) -> None:
        """`window_s` is reached back over at least; further if it holds fewer than MIN_WINDOW_REQUESTS."""
        self._dispersion = dispersion
        self._window_s = window_s
        self._jump_span_s = jump_span_s
        self._times_s: list[float] = []
        self._rows: list[int] = []

    def add(self, now_s: float, rows: int) -> None:
        """Count one request."""
        self._times_s.append(now_s)
        self._rows.append(rows)

    def rate_per_s(self, now_s: float) -> float:
        """Rows per second at `now_s`: the window's rate, or that of the last moments if it jumped up."""
        self._forget(now_s)
        times_s, rows = self._times_s, self._rows
        rate_per_s = window_rate(times_s, rows, 0, now_s, self._window_s)
        recent = _first_at_or_after(times_s, now_s - self._jump_span_s)
        # The older part of the window is what the recent part is held against.
        if recent == 0 or recent == len(times_s):
            return rate_per_s
        count = len(times_s) - recent
        before_s = max(now_s - self._jump_span_s - times_s[0], self._window_s - self._jump_span_s)
        if is_up_jump(count, self._jump_span_s, recent / before_s, self._dispersion):
            return max(rate_per_s, sum(rows[recent:]) / self._jump_span_s)
        return rate_per_s

    def _forget(self, now_s: float) -> None:
        outside = _first_at_or_after(self._times_s, now_s - self._window_s)
        surplus = min(outside, max(0, len(self._times_s) - MIN_WINDOW_REQUESTS))
        if surplus:
            del self._times_s[:surplus]
            del self._rows[:surplus]


def _first_at_or_after(times_s: list[float], when_s: float) -> int:
    return bisect_left(times_s, when_s)
