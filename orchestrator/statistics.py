"""What was asked of each family and how long it took: the statistics that Triton's clients read."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from orchestrator.wire.descriptions import VERSION, Duration, ModelStatistics

if TYPE_CHECKING:
    from orchestrator.rows import Ticket
    from orchestrator.state import Batch


@dataclass(slots=True)
class _Counted:
    """Sums of one family, in what they are counted in: this is done for every request."""

    answered: int = 0
    rows: int = 0
    answered_s: float = 0.0
    waited_s: float = 0.0
    computed_s: float = 0.0
    failed: int = 0
    failed_s: float = 0.0
    last_s: float | None = None
    # rows of a batch -> how many there were, and their seconds
    batches: dict[int, tuple[int, float]] = field(default_factory=dict)


class Statistics:
    """Counts by family; a new plan goes on where the former one was."""

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self._by_family: defaultdict[str, _Counted] = defaultdict(_Counted)

    def of(self, family: str, now_s: float) -> ModelStatistics:
        """Its counts so far; `now_s` is of the clock of the others."""
        counted = self._by_family[family]
        last_ms = 0
        if counted.last_s is not None:
            last_ms = round((datetime.now(UTC).timestamp() - (now_s - counted.last_s)) * 1000)
        return ModelStatistics(
            name=family,
            version=VERSION,
            last_inference_ms=last_ms,
            inference_count=counted.rows,
            execution_count=sum(count for count, _ in counted.batches.values()),
            success=_duration(counted.answered, counted.answered_s),
            fail=_duration(counted.failed, counted.failed_s),
            queue=_duration(counted.answered, counted.waited_s),
            compute=_duration(counted.answered, counted.computed_s),
            batches={rows: _duration(count, total_s) for rows, (count, total_s) in counted.batches.items()},
        )

    def batch(self, batch: Batch, sent_s: float, duration_s: float) -> None:
        """Count an answered batch, and what its rows waited before it was sent."""
        batches = self._by_family[batch.family.name].batches
        count, total_s = batches.get(batch.rows, (0, 0.0))
        batches[batch.rows] = (count + 1, total_s + duration_s)
        for segment in batch.segments:
            ticket, rows = segment.ticket, segment.rows
            ticket.waited_row_s += rows * (sent_s - segment.since_s)
            ticket.computed_row_s += rows * duration_s

    def answered(self, family: str, ticket: Ticket, duration_s: float, now_s: float) -> None:
        """Count an answered request."""
        counted = self._by_family[family]
        rows = ticket.rows
        counted.answered += 1
        counted.rows += rows
        counted.answered_s += duration_s
        counted.waited_s += ticket.waited_row_s / rows
        counted.computed_s += ticket.computed_row_s / rows
        counted.last_s = now_s

    def failed(self, family: str, duration_s: float, now_s: float) -> None:
        """Count a request that was refused or given up."""
        counted = self._by_family[family]
        counted.failed += 1
        counted.failed_s += duration_s
        counted.last_s = now_s


def _duration(count: int, total_s: float) -> Duration:
    return Duration(count, round(total_s * 1e9))
