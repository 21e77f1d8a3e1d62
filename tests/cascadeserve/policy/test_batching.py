from __future__ import annotations

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


def test_the_least_rank_goes_first_among_due_queues_only() -> None:
    assert next_queue([DUE_FULL, DUE_AGED, NOT_DUE], [3.0, 2.0, 1.0]) == 1
    assert next_queue([NOT_DUE] * 3, [3.0, 2.0, 1.0]) == -1
    assert next_queue([], []) == -1
    assert next_queue([DUE_FULL] * 3, [2.0, 2.0, 2.0]) == 0, "ties go to the first"
