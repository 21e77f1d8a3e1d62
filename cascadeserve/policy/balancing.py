"""Which endpoint a batch leaves for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def least_expected_work(
    work_in_flight_s: Sequence[float],
    work_sent_s: Sequence[float],
    weights: Sequence[float],
    has_room: Sequence[bool],
    batch_work_s: Sequence[float],
) -> int:
    """Index of the endpoint with room whose work, this batch included, is least for its weight; -1 if none has room.

    All by endpoint. `batch_work_s` is device time that the batch would take there, more on a slower device;
    `work_in_flight_s` is what was sent and is not yet answered, `work_sent_s` all that was ever sent. A weight of 0
    excludes an endpoint. Among equals the one that was sent less takes it, so that a light load is spread too.
    """
    best = -1
    best_cost = 0.0
    best_sent = 0.0
    for index in range(len(weights)):
        if not has_room[index] or weights[index] <= 0.0:
            continue
        cost = (work_in_flight_s[index] + batch_work_s[index]) / weights[index]
        sent = work_sent_s[index] / weights[index]
        if best < 0 or cost < best_cost or (cost == best_cost and sent < best_sent):
            best = index
            best_cost = cost
            best_sent = sent
    return best
