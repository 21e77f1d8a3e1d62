"""What was asked of each family and how long it took: the statistics that Triton's clients read."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from orchestrator.wire.descriptions import VERSION, Duration, ModelStatistics

if TYPE_CHECKING:
    from orchestrator.rows import Ticket
    from orchestrator.state import Batch


class Statistics:
    """Counts by family; a new plan goes on where the former one was."""

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self._by_family: dict[str, ModelStatistics] = {}

    def of(self, family: str) -> ModelStatistics:
        """Its counts so far."""
        found = self._by_family.get(family)
        if found is None:
            found = self._by_family[family] = ModelStatistics(family, VERSION)
        return found

    def batch(self, batch: Batch, sent_s: float, duration_s: float) -> None:
        """Count an answered batch, and what its rows waited before it was sent."""
        counted = self.of(batch.family.name)
        counted.execution_count += 1
        duration = counted.batches.get(batch.rows)
        if duration is None:
            duration = counted.batches[batch.rows] = Duration()
        duration.add(duration_s)
        for segment in batch.segments:
            ticket = segment.ticket
            ticket.waited_row_s += segment.rows * (sent_s - segment.since_s)
            ticket.computed_row_s += segment.rows * duration_s

    def answered(self, family: str, ticket: Ticket, duration_s: float) -> None:
        """Count an answered request."""
        counted = self.of(family)
        counted.last_inference_ms = _now_ms()
        counted.inference_count += ticket.rows
        counted.success.add(duration_s)
        counted.queue.add(ticket.waited_row_s / ticket.rows)
        counted.compute.add(ticket.computed_row_s / ticket.rows)

    def failed(self, family: str, duration_s: float) -> None:
        """Count a request that was refused or given up."""
        counted = self.of(family)
        counted.last_inference_ms = _now_ms()
        counted.fail.add(duration_s)


def _now_ms() -> int:
    return int(datetime.now(UTC).timestamp() * 1000)
