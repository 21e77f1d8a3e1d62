"""How much load there is: arrival rate plus a backlog that the gear in force did not plan for.

The paper switches on the queries counted in a fixed window and holds a gear while the queue is long (section 5); both
misfire (see its traps: window noise, latching). Here the rate comes from a long window, so that it stands still under
constant load, unless some recent span of it holds significantly more or fewer requests than the rest: then from that
span. And only work beyond the normal batching queues counts as backlog.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# Under Poisson arrivals the rate of 6,000 requests has a relative standard error of 1.3 %: at nine tenths of the range
# of a gear that ends at twice the rate it begins with, 5 % from its end, it stays. Burstier arrivals need more of
# them, by their index of dispersion.
WINDOW_REQUESTS = 6000
MIN_WINDOW_S = 1.0
MAX_WINDOW_S = 300.0
# recent spans that are held against what was before: this long, and each this many times the one before
SHORTEST_SPAN_S = 0.1
SPAN_GROWTH = 1.5
# A change is believed at this many standard deviations. Some hundred pairs of spans are compared ten times a second: at
# 4 a constant load would seem to change now and then.
CHANGE_DEVIATIONS = 4.7
CHANGE_MIN_REQUESTS = 8
# a span is held against at least a fifth of itself
_LEAST_BEFORE_FRAC = 0.2
# of Anscombe's transform, which makes counts nearly normal with a variance of 1/4 whatever their mean
_ANSCOMBE = 0.375


def window_start(times_s: Sequence[float], start: int, stop: int, now_s: float, dispersion: float) -> int:
    """Index of the oldest request that still counts, of those from `start` to `stop` (`times_s` rises)."""
    oldest = first_at_or_after(times_s, start, stop, now_s - MAX_WINDOW_S)
    surplus = stop - int(WINDOW_REQUESTS * dispersion)
    if surplus > oldest:
        oldest = max(oldest, min(surplus, first_at_or_after(times_s, oldest, stop, now_s - MIN_WINDOW_S)))
    return oldest


def arrival_rate_per_s(
    times_s: Sequence[float], rows_before: Sequence[float], start: int, stop: int, now_s: float, dispersion: float
) -> tuple[float, float]:
    """(Rows per second at `now_s`, its standard error), from the requests with index `start` to `stop` (exclusive).

    `times_s` [n] rises; `rows_before` [n + 1] is the number of rows before each request, and last the total. The past
    is looked at further and further back, until some recent span of it holds significantly more or fewer requests than
    the rest: the load changed then, and what was before says nothing any more, however significant it is. If nothing
    changed, the rate is that of the window but for its oldest third, in which a change that has just begun would hide.
    The span reaches to now, so that the rate falls by itself when arrivals stop.
    """
    if stop <= start:
        return 0.0, 0.0
    window_s = max(now_s - times_s[start], MIN_WINDOW_S)
    span_s = 0.0
    past_s = SHORTEST_SPAN_S * SPAN_GROWTH
    while span_s == 0.0 and past_s < window_s:
        past_s = past_s * SPAN_GROWTH
        if past_s * SPAN_GROWTH > window_s:
            past_s = window_s
        span_s = _changed_span_s(times_s, start, stop, now_s, past_s, dispersion)
    if span_s == 0.0:
        span_s = max(window_s / SPAN_GROWTH, MIN_WINDOW_S)
    first = first_at_or_after(times_s, start, stop, now_s - span_s)
    rate_per_s = (rows_before[stop] - rows_before[first]) / span_s
    return rate_per_s, rate_per_s * sqrt(dispersion / max(stop - first, 1))


def _changed_span_s(
    times_s: Sequence[float], start: int, stop: int, now_s: float, past_s: float, dispersion: float
) -> float:
    """Span within the last `past_s` seconds that differs most from what was before it; 0 if none does significantly.

    Requests are counted, not rows, so that a few large requests are no change; their variance is that of Poisson
    arrivals times the index of `dispersion`. Of several spans the most significant one is about as long as the change
    is old. After a fall it may still hold some of what was before, so the next shorter one is taken.
    """
    oldest = first_at_or_after(times_s, start, stop, now_s - past_s)
    most = CHANGE_DEVIATIONS
    found_s = 0.0
    span_s = SHORTEST_SPAN_S
    while span_s * (1.0 + _LEAST_BEFORE_FRAC) < past_s:
        first = first_at_or_after(times_s, oldest, stop, now_s - span_s)
        recent = stop - first
        to_before = span_s / (past_s - span_s)
        expected = (first - oldest) * to_before
        change = 2.0 * (sqrt(recent + _ANSCOMBE) - sqrt(expected + _ANSCOMBE)) / sqrt(dispersion * (1.0 + to_before))
        if change > most and recent >= CHANGE_MIN_REQUESTS:
            most = change
            found_s = span_s
        elif change < -most:
            most = -change
            found_s = max(span_s / SPAN_GROWTH, SHORTEST_SPAN_S)
        span_s *= SPAN_GROWTH
    return found_s


def first_at_or_after(times_s: Sequence[float], start: int, stop: int, when_s: float) -> int:
    """Index of the first of `times_s[start:stop]` that is not before `when_s`; `stop` if there is none."""
    low, high = start, stop
    while low < high:
        middle = (low + high) // 2
        if times_s[middle] < when_s:
            low = middle + 1
        else:
            high = middle
    return low


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
    """The recent arrivals of one family."""

    def __init__(self, *, dispersion: float = 1.0) -> None:
        """`dispersion` is the plan's index of dispersion of the requests; 1 is Poisson."""
        self.dispersion = dispersion
        self._times_s: list[float] = []
        self._rows_before: list[float] = [0]

    def add(self, now_s: float, rows: float) -> None:
        """Count one request."""
        self._times_s.append(now_s)
        self._rows_before.append(self._rows_before[-1] + rows)

    def rate_per_s(self, now_s: float) -> tuple[float, float]:
        """(Rows per second at `now_s`, its standard error)."""
        start = window_start(self._times_s, 0, len(self._times_s), now_s, self.dispersion)
        if start:
            del self._times_s[:start]
            # counted anew from here, or in a long life what comes would be too small beside what has come
            first = self._rows_before[start]
            self._rows_before = [rows - first for rows in self._rows_before[start:]]
        return arrival_rate_per_s(self._times_s, self._rows_before, 0, len(self._times_s), now_s, self.dispersion)
