from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeserve.errors import Unavailable
from orchestrator.backend import BatchAnswer
from orchestrator.request_options import RequestOptions
from orchestrator.rows import ModelQueue, Segment, Ticket, bind
from tests.fakes import tiny

if TYPE_CHECKING:
    from numpy.typing import NDArray


def ticket(rows: int, *, first: int = 0, num_classes: int | None = None, work_per_row: float = 1.0) -> Ticket:
    """A request whose row k holds the number first + k, in two inputs."""
    values = np.arange(first, first + rows, dtype=np.float32)
    future: Any = Future()  # a ticket needs of it only what both kinds of future have
    inputs: list[NDArray[Any]] = [values.reshape(-1, 1), np.stack([values, values], axis=1)]
    return Ticket(
        inputs,
        arrived_s=0.0,
        deadline_s=1.0,
        num_classes=num_classes,
        future=future,
        options=RequestOptions(work_per_row=work_per_row),
    )


def segment(of: Ticket, *, since_s: float = 0.0) -> Segment:
    return Segment(of, of.rows, since_s)


def numbers(segments: list[Segment]) -> list[int]:
    return [int(value) for each in segments for value in each.gather(0)[:, 0]]


def test_a_request_is_answered_once_when_its_last_row_is() -> None:
    request = ticket(3)
    assert not request.finish_rows(2)
    assert not request.done
    assert request.finish_rows(1)
    assert request.future.result() is request


def test_the_first_answer_of_a_request_stands() -> None:
    request = ticket(1)
    assert request.fail(Unavailable("first"))
    assert not request.fail(Unavailable("second"))
    assert not request.finish_rows(1)
    with pytest.raises(Unavailable, match="first"):
        request.future.result()


def test_a_request_whose_client_left_takes_no_answer() -> None:
    request = ticket(1)
    request.future.cancel()
    assert request.done
    assert not request.finish_rows(1)
    assert not request.fail(Unavailable("too late"))


def test_scores_have_room_only_if_they_were_asked_for() -> None:
    assert ticket(2).scores is None
    scores = ticket(2, num_classes=5).scores
    assert scores is not None
    assert scores.shape == (2, 5)


@given(st.integers(2, 20), st.data())
def test_a_split_shares_out_the_rows_in_order_and_everything_else_alike(rows: int, data: st.DataObject) -> None:
    whole = segment(ticket(rows), since_s=3.0)
    whole.entry, whole.stage = tiny.plan().families["family"].ladder[1], 1
    parts = []
    while whole.rows > 1:
        parts.append(whole.split(data.draw(st.integers(1, whole.rows - 1))))
    parts.append(whole)
    assert numbers(parts) == list(range(rows))
    for part in parts:
        assert part.rows == part.gather(0).shape[0] == part.gather(1).shape[0]
        assert (part.ticket, part.since_s, part.entry, part.stage) == (whole.ticket, 3.0, whole.entry, 1)


def test_a_whole_request_is_gathered_without_a_copy() -> None:
    request = ticket(4)
    assert segment(request).gather(1) is request.inputs[1]


operations = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(1, 9)),
        st.tuples(st.just("push ahead"), st.integers(1, 9)),
        st.tuples(st.just("take"), st.integers(1, 12)),
        st.tuples(st.just("abandon"), st.integers(0, 30)),
        st.tuples(st.just("forget head"), st.just(0)),
        st.tuples(st.just("forget all"), st.just(0)),
    ),
    max_size=40,
)


@given(operations)
def test_rows_leave_a_queue_once_in_order_and_never_after_their_request_was_abandoned(
    steps: list[tuple[str, int]],
) -> None:
    queue, requests, waiting = ModelQueue(), [], []
    next_number, front = 0, 0.0
    for step, value in steps:
        if step.startswith("push"):
            request = ticket(value, first=next_number, work_per_row=value / 4)
            requests.append(request)
            rows = [(request, next_number + k) for k in range(value)]
            if step == "push":
                queue.push(segment(request), 0.0)
                waiting += rows
            else:
                front -= 1.0
                queue.push(segment(request), front)
                waiting = rows + waiting
            next_number += value
        elif step == "abandon" and requests:
            requests[value % len(requests)].future.cancel()
        elif step == "take":
            waiting = [(request, number) for request, number in waiting if not request.done]
            assert numbers(queue.take(value)) == [number for _, number in waiting[:value]]
            del waiting[:value]
        elif step == "forget head":
            queue.drop_done_head()
            assert queue.head is None or not queue.head.ticket.done
        elif step == "forget all":
            queue.drop_done()
            waiting = [(request, number) for request, number in waiting if not request.done]
            assert queue.rows == len(waiting)
        assert queue.rows == sum(each.rows for each in queue.segments)
        assert queue.work == sum(each.rows * each.ticket.work_per_row for each in queue.segments)
        assert queue.work_before(0.0) == queue.work
        assert queue.rows >= sum(not request.done for request, _ in waiting)


def test_what_goes_before_a_rank_is_known() -> None:
    queue = ModelQueue()
    for rank_s, work in ((3.0, 0.5), (1.0, 2.0), (2.0, 1.0)):
        queue.push(segment(ticket(2, work_per_row=work), since_s=10.0 - rank_s), rank_s)
    assert [queue.work_before(rank_s) for rank_s in (0.5, 1.0, 2.5, 3.0)] == [0.0, 4.0, 6.0, 7.0]
    assert queue.head_rank_s == 1.0
    assert queue.oldest_since_s() == 7.0, "whatever its rank"


def test_taking_from_an_empty_queue_gives_nothing() -> None:
    assert ModelQueue().take(8) == []


def test_rows_get_the_gear_in_force_when_they_first_leave_and_keep_it() -> None:
    family = tiny.plan().families["family"]
    calm, busy = family.gears[:2]
    reference, cascade = family.ladder
    part = segment(ticket(4))
    first = part.split(2)
    bind(first, calm, reference)
    bind(first, busy, cascade)
    assert first.entry is reference
    bind(part, busy, cascade)
    assert part.entry is cascade, "rows that left later took the gear of that moment"
    assert part.ticket.gears == ["calm", "busy"], "a request names every gear that its rows left in"


def test_only_rows_without_a_gear_can_be_taken_to_another_queue() -> None:
    family = tiny.plan().families["family"]
    queue = ModelQueue()
    bound, unbound = segment(ticket(3)), segment(ticket(2, first=10))
    bind(bound, family.gears[0], family.ladder[0])
    queue.push(unbound, 0.0)
    queue.push(bound, 0.0)
    assert numbers(queue.take_unbound()) == [10, 11]
    assert queue.rows == 3
    assert numbers(queue.take(9)) == [0, 1, 2]


def test_rows_that_go_on_keep_what_they_were_answered_with_until_the_next_stage_answers() -> None:
    request = ticket(3)
    first = BatchAnswer(np.array([1, 2, 3, 4]), np.array([0.1, 0.2, 0.3, 0.4], np.float32), None)
    request.store(None, first, slice(1, 4), 0)
    second = BatchAnswer(np.array([9]), np.array([0.9], np.float32), None)
    request.store(np.array([1]), second, slice(0, 1), 1)
    assert request.label.tolist() == [2, 9, 4]
    assert request.certainty.tolist() == pytest.approx([0.2, 0.9, 0.4])
    assert request.stage.tolist() == [0, 1, 0]
    assert first.label.tolist() == [1, 2, 3, 4]  # not ours to write to
