from __future__ import annotations

import heapq

from hypothesis import example, given
from hypothesis import strategies as st

from cascadeserve.policy.batching import DUE_AGED, DUE_FULL, NOT_DUE, due_at_s, due_reason, next_queue

times = st.floats(0.0, 1e6)
waits = st.floats(0.0, 10.0)


def test_a_queue_is_due_when_it_holds_enough_rows_or_its_oldest_has_waited() -> None:
    assert due_reason(8, 0.0, 8, 1.0, 0.0) == DUE_FULL
    assert due_reason(7, 0.0, 8, 1.0, 0.999) == NOT_DUE
    assert due_reason(7, 0.0, 8, 1.0, 1.0) == DUE_AGED
    assert due_reason(1, 5.0, 8, 0.0, 5.0) == DUE_AGED, "no wait allowed: due on arrival"


@given(times, times, st.integers(1, 64), waits)
def test_an_empty_queue_is_never_due(since_s: float, now_s: float, min_batch: int, max_wait_s: float) -> None:
    assert due_reason(0, since_s, min_batch, max_wait_s, now_s) == NOT_DUE


@given(times, waits)
@example(65527.0, 9.384932056540265)  # their sum, less the first, is a bit less than the second
def test_a_queue_is_due_at_the_time_announced_for_it(since_s: float, max_wait_s: float) -> None:
    """In virtual time no later moment comes by itself: a queue not due then would be asked for at this time forever."""
    assert due_reason(1, since_s, 2, max_wait_s, due_at_s(since_s, max_wait_s)) == DUE_AGED


def test_the_earliest_deadline_goes_first_among_due_queues_only() -> None:
    same = [0.0, 0.0, 0.0]
    assert next_queue([DUE_FULL, DUE_AGED, NOT_DUE], [3.0, 2.0, 1.0], same, 0.0, 1.0) == 1
    assert next_queue([NOT_DUE] * 3, [3.0, 2.0, 1.0], same, 0.0, 1.0) == -1
    assert next_queue([], [], [], 0.0, 1.0) == -1
    assert next_queue([DUE_FULL] * 3, [2.0, 2.0, 2.0], same, 0.0, 1.0) == 0, "ties go to the first"


def test_waiting_brings_a_deadline_forward() -> None:
    due, deadlines, oldest = [DUE_FULL, DUE_FULL], [10.0, 5.0], [0.0, 4.0]
    assert next_queue(due, deadlines, oldest, 4.0, 0.0) == 1
    assert next_queue(due, deadlines, oldest, 4.0, 2.0) == 0


@given(patience_s=st.floats(1.0, 100.0), impatience_s=st.floats(0.01, 0.5), ageing=st.floats(0.5, 4.0))
def test_patient_rows_are_served_in_the_end_however_many_impatient_ones_arrive(
    patience_s: float, impatience_s: float, ageing: float
) -> None:
    """One server and twice the load it can carry, all of it more urgent: the patient row still gets its turn."""
    service_s = 0.1
    impatient = [0.0]
    now_s = next_arrival_s = 0.0
    while True:
        while next_arrival_s <= now_s:
            heapq.heappush(impatient, next_arrival_s)
            next_arrival_s += service_s / 2
        deadlines = [patience_s, impatient[0] + impatience_s]
        if next_queue([DUE_FULL, DUE_FULL], deadlines, [0.0, impatient[0]], now_s, ageing) == 0:
            break
        heapq.heappop(impatient)
        now_s += service_s
    # the head of the overloaded queue arrived half of the elapsed time ago
    assert now_s <= 2 * patience_s + 1.0
