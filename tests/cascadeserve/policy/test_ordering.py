from __future__ import annotations

import heapq
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeserve.policy.batching import due_reason, next_queue
from cascadeserve.policy.ordering import (
    EARLIEST_DEADLINE,
    FIFO,
    LEAST_REMAINING_WORK,
    ORDERS,
    PATIENCE_SLOS,
    rank_s,
)

orders = st.sampled_from(range(len(ORDERS)))
times = st.floats(0.0, 1e4)


def test_ranks_of_each_order() -> None:
    assert rank_s(FIFO, 5.0, 5.4, 0.2, 1.0) == 5.0
    assert rank_s(EARLIEST_DEADLINE, 5.0, 5.4, 0.2, 1.0) == 5.4
    little, much = (rank_s(LEAST_REMAINING_WORK, 5.0, 5.4, work_s, 1.0) for work_s in (0.01, 0.02))
    assert 5.0 < little < much
    assert rank_s(LEAST_REMAINING_WORK, 4.0, 4.4, 0.02, 1.0) < little, "it has waited longer by more than that"


@given(orders, times, times, st.floats(0.0, 1e6), st.floats(1e-3, 1e3))
def test_nothing_stands_back_longer_than_its_patience(
    order: int, arrived_s: float, timeout_s: float, work_s: float, slo_s: float
) -> None:
    rank = rank_s(order, arrived_s, arrived_s + timeout_s, work_s, slo_s)
    assert arrived_s <= rank <= arrived_s + PATIENCE_SLOS * slo_s * (1 + 1e-9)


@dataclass
class Row:
    arrived_s: float
    timeout_s: float
    work_s: float
    queue: int


@dataclass
class Queue:
    min_batch: int
    max_batch: int
    max_wait_s: float
    slo_s: float


queues_ = st.lists(
    st.builds(
        Queue,
        min_batch=st.integers(1, 4),
        max_batch=st.integers(4, 8),
        max_wait_s=st.floats(0.0, 0.5),
        slo_s=st.floats(0.1, 2.0),
    ),
    min_size=2,
    max_size=4,
)
rows_ = st.lists(
    st.builds(
        Row,
        arrived_s=st.floats(0.0, 10.0),
        timeout_s=st.floats(0.0, 100.0),
        work_s=st.floats(0.001, 0.5),
        queue=st.integers(0, 3),
    ),
    min_size=1,
    max_size=60,
)


@given(orders, queues_, rows_)
def test_no_due_queue_waits_longer_than_the_bound_while_its_device_serves_others(
    order: int, queues: list[Queue], rows: list[Row]
) -> None:
    """One device, any load, any deadlines and amounts of work.

    Let P be `PATIENCE_SLOS` times the largest SLO. From when a row is due (it has waited `max_wait_s`), the device
    serves before it only what is in progress, and batches whose first row arrived at most P later than it. So it waits
    no longer than these take, one batch each: what was there, and what comes within P, whatever comes later.
    """
    patience_s = PATIENCE_SLOS * max(queue.slo_s for queue in queues)
    coming = sorted(rows, key=lambda row: row.arrived_s)
    waiting: list[list[tuple[float, int, Row]]] = [[] for _ in queues]
    # (when it began, what it took, the first row's arrival)
    batches: list[tuple[float, float, float]] = []
    left_s: dict[int, float] = {}
    now_s = 0.0
    while len(left_s) < len(rows):
        while coming and coming[0].arrived_s <= now_s:
            row = coming.pop(0)
            which = row.queue % len(queues)
            rank = rank_s(order, row.arrived_s, row.arrived_s + row.timeout_s, row.work_s, queues[which].slo_s)
            heapq.heappush(waiting[which], (rank, id(row), row))
        due = [
            due_reason(len(heap), min(row.arrived_s for _, _, row in heap), queue.min_batch, queue.max_wait_s, now_s)
            if heap
            else 0
            for queue, heap in zip(queues, waiting, strict=True)
        ]
        chosen = next_queue(due, [heap[0][0] if heap else 0.0 for heap in waiting])
        if chosen < 0:
            later = [row.arrived_s for row in coming[:1]]
            later += [
                min(row.arrived_s for _, _, row in heap) + queue.max_wait_s
                for queue, heap in zip(queues, waiting, strict=True)
                if heap
            ]
            now_s = max(now_s, min(later))
            continue
        heap = waiting[chosen]
        taken = [heapq.heappop(heap)[2] for _ in range(min(queues[chosen].max_batch, len(heap)))]
        took_s = sum(row.work_s for row in taken)
        batches.append((now_s, took_s, taken[0].arrived_s))
        left_s |= {id(row): now_s for row in taken}
        now_s += took_s

    for row in rows:
        due_s = row.arrived_s + queues[row.queue % len(queues)].max_wait_s
        before = [each for each in batches if due_s + 1e-5 < each[0] < left_s[id(row)]]
        assert all(arrived_s <= row.arrived_s + patience_s for _, _, arrived_s in before)
        running_s = max((began_s + took_s for began_s, took_s, _ in batches if began_s <= due_s + 1e-5), default=0.0)
        bound_s = sum(took_s for _, took_s, arrived_s in before if arrived_s <= row.arrived_s + patience_s)
        assert left_s[id(row)] <= max(due_s, running_s) + bound_s + 1e-5


@pytest.mark.parametrize("order", range(len(ORDERS)))
def test_a_row_of_much_work_is_served_however_many_small_ones_keep_arriving(order: int) -> None:
    """Twice the load that the device can carry, all of it more urgent and less work: it still gets its turn."""
    slo_s, service_s = 1.0, 0.1
    patient = rank_s(order, 0.0, 100.0, 50.0, slo_s)
    now_s = next_arrival_s = 0.0
    urgent: list[float] = []
    while True:
        while next_arrival_s <= now_s:
            heapq.heappush(urgent, rank_s(order, next_arrival_s, next_arrival_s + 0.1, 0.001, slo_s))
            next_arrival_s += service_s / 2
        if next_queue([1, 1], [patient, urgent[0]]) == 0:
            break
        heapq.heappop(urgent)
        now_s += service_s
    # all that arrived within its patience went first, at half the rate at which it came
    assert now_s <= 2 * PATIENCE_SLOS * slo_s + service_s
