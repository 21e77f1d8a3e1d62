"""Which endpoint a batch leaves for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def least_expected_work(
    work_in_flight_s: Sequence[float], weights: Sequence[float], has_room: Sequence[bool], batch_work_s: float
) -> int:
    """Index of the endpoint with room whose work, this batch included, is least for its weight; -1 if none has room.

    `work_in_flight_s` is device time sent and not yet answered; a weight of 0 excludes an endpoint. Ties go to the
    first, which is the order of the cluster file.
    """
    best = -1
    best_cost = 0.0
    for index in range(len(weights)):
        if not has_room[index] or weights[index] <= 0.0:
            continue
        cost = (work_in_flight_s[index] + batch_work_s) / weights[index]
        if best < 0 or cost < best_cost:
            best = index
            best_cost = cost
    return best
