"""Device time that batches and rows take, and how much of it waits in queues while everything goes as planned.

In `work_from_s` and `planned_work_s` all sequences run over the stages of one ladder entry: `reach` is the share of
entry rows that gets to a stage, `row_work_s` device-seconds per row there, `full_batch_s` device-seconds of the largest
batch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def batch_work_s(points: Sequence[tuple[int, float]], rows: float) -> float:
    """Device-seconds of one batch of `rows` rows, by (rows, seconds) points of rising rows: linear between them.

    Below the first point it is that one's; beyond the last, its time per row. Where rows are more or less work than the
    rows of the points, `rows` is as many of those as are as much work.
    """
    if rows <= points[0][0]:
        return points[0][1]
    for (low, low_s), (high, high_s) in pairwise(points):
        if rows <= high:
            return low_s + (high_s - low_s) * (rows - low) / (high - low)
    return points[-1][1] * rows / points[-1][0]


def largest_batch_work(work: float, rows: int, max_batch: int) -> float:
    """Work of the largest batch of `rows` waiting rows that are `work` in all, if they are alike."""
    return work if rows <= max_batch else work * max_batch / rows


def mean_work_s(work_s: Sequence[float], shares: Sequence[float]) -> float:
    """Device-seconds that a batch takes on average, where endpoint by endpoint it would take `work_s`.

    `shares` says how the device time is divided among them while all are busy: by load weight x slots. In a second of
    it an endpoint finishes 1 / work_s batches, so the faster ones have more of them: this is the harmonic mean. That of
    equals is theirs, to the last bit.
    """
    if min(work_s) == max(work_s):
        return work_s[0]
    batches = 0.0
    for each_s, share in zip(work_s, shares, strict=True):
        batches += share / each_s
    return sum(shares) / batches


def work_from_s(reach: Sequence[float], row_work_s: Sequence[float], stage: int) -> float:
    """Device-seconds that a row waiting at `stage` is expected to take from there on."""
    if reach[stage] <= 0.0:
        return row_work_s[stage]
    total_s = 0.0
    for later in range(stage, len(reach)):
        total_s += reach[later] / reach[stage] * row_work_s[later]
    return total_s


def share_at(there: Sequence[bool], hosts: Sequence[bool], slots: Sequence[int]) -> float:
    """Share of a model's work that the endpoints `there` do, by slots; 0 if none of them is one of its `hosts`.

    All by endpoint.
    """
    slots_there, slots_in_all = 0, 0
    for index in range(len(slots)):
        if hosts[index]:
            slots_in_all += slots[index]
            if there[index]:
                slots_there += slots[index]
    return slots_there / slots_in_all if slots_in_all else 0.0


def planned_work_s(
    rate_per_s: float,
    reach: Sequence[float],
    row_work_s: Sequence[float],
    full_batch_s: Sequence[float],
    min_batch: Sequence[int],
    max_wait_s: Sequence[float],
    slots: float,
    slo_s: float,
) -> float:
    """Device-seconds that may wait at this rate, on `slots` slots or a share of some, before it is backlog.

    A row waits for its trigger and then for the batches before it: at most one of every model on every slot. And work
    that the slots do in half an SLO is no backlog in any gear: near the end of its range so much waits now and then
    without harm, and a gear that took it for demand would be left again and again.
    """
    turn_s = 0.0
    for stage in range(len(reach)):
        turn_s += full_batch_s[stage] / slots
    planned_s = 0.0
    for stage in range(len(reach)):
        rows = rate_per_s * reach[stage] * (max_wait_s[stage] + turn_s)
        planned_s += max(float(min_batch[stage]), rows) * work_from_s(reach, row_work_s, stage)
    return max(planned_s, slots * slo_s / 2.0)
