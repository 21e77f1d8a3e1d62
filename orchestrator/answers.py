"""What becomes of the rows of an answered batch: answers, or the next stage. The decision is `cascadeserve.policy`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cascadeserve.errors import Unavailable
from cascadeserve.policy.escalation import accepted, next_stage_in_time, stage_threshold

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from orchestrator.backend import BatchAnswer
    from orchestrator.metrics import Metrics
    from orchestrator.rows import Segment, Ticket
    from orchestrator.state import Batch, EndpointState, FamilyQueue


class _Ahead(NamedTuple):
    """What a row that goes on to a model will find there, but for the rows that wait."""

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
    stop = 0
    given: list[tuple[Ticket, int]] = []
    # of the whole batch, by threshold: rows of one batch seldom left in more than one gear
    accepted_at: dict[float | None, NDArray[np.bool_]] = {}
    answered_at: dict[int, int] = {}
    ahead: dict[str, _Ahead] = {}
    for segment in batch.segments:
        start, stop = stop, stop + segment.rows
        ticket = segment.ticket
        if ticket.done:
            continue
        if segment.entry is None:
            raise RuntimeError("rows left without a gear")
        options = ticket.options
        threshold = stage_threshold(
            segment.entry.stages[segment.stage].threshold, segment.stage, options.max_stage, options.min_certainty
        )
        if not segment.stage:
            ticket.unheard -= segment.rows
        # Also of those that go on: it is what they have if the next stage comes too late.
        ticket.store(segment.indices, answer, slice(start, stop), segment.stage)
        if threshold not in accepted_at:
            accepted_at[threshold] = accepted(answer.certainty, threshold)
        taken = accepted_at[threshold][start:stop]
        num_taken = int(np.count_nonzero(taken))
        if num_taken:
            answered_at[segment.stage] = answered_at.get(segment.stage, 0) + num_taken
        num_cut = 0
        if num_taken < segment.rows:
            model = segment.entry.stages[segment.stage + 1].model
            if model not in ahead:
                ahead[model] = _look_ahead(batch, model, endpoints)
            num_cut = _escalate(ahead[model], segment, np.flatnonzero(~taken), now_s)
            if num_cut:
                ticket.cut(num_cut)
        if num_taken + num_cut:
            given.append((ticket, num_taken + num_cut))
    for stage, rows in answered_at.items():
        metrics.answered(batch.family.name, stage, rows)
    num_nan = int(np.count_nonzero(np.isnan(answer.certainty)))
    if num_nan:
        metrics.nan_certainty(batch.model.name, num_nan)
    return given


def _look_ahead(batch: Batch, model: str, endpoints: Sequence[EndpointState]) -> _Ahead:
    """What a row of an answered batch will find at its next model."""
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


def _escalate(ahead: _Ahead, segment: Segment, rows: NDArray[np.intp], now_s: float) -> int:
    """Queue rows of a segment at their next stage; returns how many of them, the last ones, would be too late there."""
    queue = ahead.queue
    if not ahead.slots:
        gone = f"no endpoint serves model '{queue.model.name}' of family '{queue.family.name}' now"
        segment.ticket.fail(Unavailable(gone))
        return 0
    planned = queue.family.plan.models[queue.model.name]

    def in_time(before: int) -> bool:
        return next_stage_in_time(
            segment.ticket.deadline_s,
            now_s,
            ahead.in_flight_s,
            queue.rows + before,
            ahead.row_work_s,
            ahead.slots,
            planned.batch_busy_s(min(queue.rows + before + 1, ahead.max_batch), ahead.quickest),
        )

    go = len(rows)
    if not in_time(go - 1):
        go = next(before for before in range(go) if not in_time(before))
    if go:
        queue.push(segment.onward(rows[:go], now_s))
    return len(rows) - go
