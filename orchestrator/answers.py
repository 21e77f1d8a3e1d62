"""What becomes of the rows of an answered batch: answers, or the next stage. The decision is `cascadeserve.policy`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.policy.escalation import accepted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from orchestrator.backend import BatchAnswer
    from orchestrator.metrics import Metrics
    from orchestrator.rows import Segment, Ticket
    from orchestrator.state import Batch, FamilyState


def absorb(batch: Batch, answer: BatchAnswer, metrics: Metrics, now_s: float) -> list[tuple[Ticket, int]]:
    """Give accepted rows to their tickets and queue the others at their next stage.

    Returns the tickets that got rows and how many; they are not told of it yet.
    """
    stop = 0
    given: list[tuple[Ticket, int]] = []
    # of the whole batch, by threshold: rows of one batch seldom left in more than one gear
    accepted_at: dict[float | None, NDArray[np.bool_]] = {}
    answered_at: dict[int, int] = {}
    for segment in batch.segments:
        start, stop = stop, stop + segment.rows
        ticket = segment.ticket
        if ticket.done:
            continue
        if segment.entry is None:
            raise RuntimeError("rows left without a gear")
        threshold = segment.entry.stages[segment.stage].threshold
        if threshold not in accepted_at:
            accepted_at[threshold] = accepted(answer.certainty, threshold)
        taken = accepted_at[threshold][start:stop]
        num_taken = int(np.count_nonzero(taken))
        if num_taken:
            answered_at[segment.stage] = answered_at.get(segment.stage, 0) + num_taken
            if num_taken == segment.rows:
                ticket.store(segment.indices, answer, slice(start, stop), segment.stage)
            else:
                mine = np.flatnonzero(taken)
                indices = mine if segment.indices is None else segment.indices[mine]
                ticket.store(indices, answer, mine + start, segment.stage)
            given.append((ticket, num_taken))
        if num_taken < segment.rows:
            _escalate(batch.family, segment, np.flatnonzero(~taken), now_s)
    for stage, rows in answered_at.items():
        metrics.answered(batch.family.name, stage, rows)
    num_nan = int(np.count_nonzero(np.isnan(answer.certainty)))
    if num_nan:
        metrics.nan_certainty(batch.model.name, num_nan)
    return given


def _escalate(family: FamilyState, segment: Segment, rows: NDArray[np.intp], now_s: float) -> None:
    if segment.entry is None:
        raise RuntimeError("rows left without a gear")
    queue = family.queues[segment.entry.stages[segment.stage + 1].model]
    queue.push(segment.onward(rows, now_s))
