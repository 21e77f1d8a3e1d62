"""What becomes of the rows of an answered batch: answers, or the next stage. The decision is `cascadeserve.policy`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cascadeserve.policy.escalation import accepted, next_stage_in_time, stage_threshold
from cascadeserve.policy.work import largest_batch_work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from orchestrator.backend import BatchAnswer
    from orchestrator.metrics import Metrics
    from orchestrator.rows import Segment, Ticket
    from orchestrator.state import Batch, EndpointState, FamilyQueue


class _Ahead(NamedTuple):
    """What a row that goes on to a model will find there, beside its queue as it then is."""

    queue: FamilyQueue
    in_flight_s: float
    row_work_s: float
    # of all endpoints with the model; 0 means that there is none
    slots: int
    max_batch: int
    # the endpoint that is quickest with the model
    quickest: str


def absorb(
    batch: Batch, answer: BatchAnswer, endpoints: Sequence[EndpointState], metrics: Metrics, now_s: float
) -> list[tuple[Ticket, int]]:
    """Give every row its answer, and queue those at their next stage that it is not certain enough for.

    A row that the next stage cannot answer before its deadline keeps the answer it has. Returns the tickets of which
    rows are done and how many; they are not told of it yet.
    """
    landed = _Landed(batch, answer, endpoints, now_s)
    stop = 0
    given: list[tuple[Ticket, int]] = []
    answered_at: dict[int, int] = {}
    for segment in batch.segments:
        start, stop = stop, stop + segment.rows
        ticket = segment.ticket
        if ticket.done:
            continue
        # Also of the rows that go on: it is what they have if the next stage comes too late.
        ticket.store(segment.indices, answer, slice(start, stop), segment.stage)
        if not segment.stage:
            ticket.unheard -= segment.rows
        taken = landed.taken(segment)[start:stop]
        done = num_taken = int(taken[0]) if segment.rows == 1 else int(np.count_nonzero(taken))
        if num_taken:
            answered_at[segment.stage] = answered_at.get(segment.stage, 0) + num_taken
        if num_taken < segment.rows and (num_cut := landed.escalate(segment, np.flatnonzero(~taken))):
            ticket.cut(num_cut)
            done += num_cut
        if done:
            given.append((ticket, done))
    for stage, rows in answered_at.items():
        metrics.answered(batch.family.name, stage, rows)
    num_nan = int(np.count_nonzero(np.isnan(answer.certainty)))
    if num_nan:
        metrics.nan_certainty(batch.model.name, num_nan)
    return given


@dataclass(slots=True)
class _Landed:
    """An answered batch, and what is worked out once for all its rows."""

    batch: Batch
    answer: BatchAnswer
    endpoints: Sequence[EndpointState]
    now_s: float
    # by threshold, [rows of the batch]: rows of one batch seldom left in more than one gear
    accepted_at: dict[float | None, NDArray[np.bool_]] = field(default_factory=dict)
    ahead: dict[str, _Ahead] = field(default_factory=dict)

    def taken(self, segment: Segment) -> NDArray[np.bool_]:
        """Which rows of the batch would be certain enough for a segment."""
        if segment.entry is None:
            raise RuntimeError("rows left without a gear")
        stage, options = segment.stage, segment.ticket.options
        threshold = stage_threshold(
            segment.entry.stages[stage].threshold, stage, options.max_stage, options.min_certainty
        )
        found = self.accepted_at.get(threshold)
        if found is None:
            found = self.accepted_at[threshold] = accepted(self.answer.certainty, threshold)
        return found

    def escalate(self, segment: Segment, rows: NDArray[np.intp]) -> int:
        """Queue rows of a segment at their next stage; returns how many of them, the last, would be too late there."""
        if segment.entry is None:
            raise RuntimeError("rows left without a gear")
        model = segment.entry.stages[segment.stage + 1].model
        ahead = self.ahead.get(model)
        if ahead is None:
            ahead = self.ahead[model] = _look_ahead(self.batch, model, self.endpoints)
        queue = ahead.queue
        go = len(rows)
        # the endpoint that has the model may come back in time
        if ahead.slots and not _in_time(ahead, segment, self.now_s, go - 1, queue.work):
            # perhaps not all that waits goes before it
            work = queue.work_before(queue.rank_s(segment.ticket))
            go = next((each for each in range(go) if not _in_time(ahead, segment, self.now_s, each, work)), go)
        if go:
            queue.add(segment.onward(rows[:go], self.now_s))
        return len(rows) - go


def _look_ahead(batch: Batch, model: str, endpoints: Sequence[EndpointState]) -> _Ahead:
    family = batch.family
    queue = family.queues[model]
    queue.drop_done_head()
    planned = family.plan.models[model]
    _, max_batch, _ = family.trigger(model)
    in_flight_s, slots, quickest = 0.0, 0, ""
    least_s = float("inf")
    for endpoint in endpoints:
        if endpoint.hosts(queue.model):
            # the batch itself still counts as in flight
            in_flight_s += endpoint.work_s - (batch.work_s if endpoint is batch.endpoint else 0.0)
            slots += endpoint.slots
            full_s = planned.batch_busy_s(max_batch, endpoint.name)
            if full_s < least_s:
                least_s, quickest = full_s, endpoint.name
    return _Ahead(queue, in_flight_s, family.row_work_s(model), slots, max_batch, quickest)


def _in_time(ahead: _Ahead, segment: Segment, now_s: float, before: int, work_before: float) -> bool:
    """Whether a row of a segment can be answered at its next stage in time, behind `before` others of it and work."""
    queue, own = ahead.queue, segment.ticket.work_per_row
    planned = queue.family.plan.models[queue.model.name]
    batch_work = largest_batch_work(queue.work + (before + 1) * own, queue.rows + before + 1, ahead.max_batch)
    return next_stage_in_time(
        segment.ticket.deadline_s,
        now_s,
        ahead.in_flight_s,
        work_before + before * own,
        ahead.row_work_s,
        ahead.slots,
        planned.batch_busy_s(batch_work, ahead.quickest),
    )
