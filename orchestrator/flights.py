"""Batches on their way: each is sent, and what comes back is given to its rows."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from cascadeserve.errors import InternalError, Unavailable
from orchestrator.answers import absorb
from orchestrator.backend import BackendError, EndpointDown
from orchestrator.rows import gather

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from orchestrator.metrics import Metrics
    from orchestrator.rows import Ticket
    from orchestrator.state import Batch, EndpointState

_log = logging.getLogger(__name__)

# A batch is waited for this long, whatever the deadlines of its rows: they expire by themselves, its slot stays busy
# until Triton answers anyway: it runs a batch to its end even where nobody waits for it any more (2.51, measured).
HANG_LIMIT_S = 60.0
# at shutdown, calls whose rows have expired may take this much longer before they are cancelled
CLOSE_GRACE_S = 3.0


class Flights:
    """The batches in flight, each with a task that waits for its answer."""

    def __init__(self, endpoints: Sequence[EndpointState], *, metrics: Metrics, pump: Callable[[], None]) -> None:
        """`pump` is called when a slot has become free."""
        self.on_endpoint_error: Callable[[EndpointState], None] = lambda _: None
        self.batches: set[Batch] = set()
        self._endpoints = endpoints
        self._metrics = metrics
        self._pump = pump
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    def depart(self, batch: Batch) -> None:
        """Send a batch; its rows are answered, queued at their next stage or refused when it comes back."""
        self.batches.add(batch)
        batch.endpoint.depart(batch)
        task = self._loop.create_task(self._send(batch), name=f"batch-{batch.model.name}-{batch.endpoint.name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End the calls in flight."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_GRACE_S)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _send(self, batch: Batch) -> None:
        endpoint = batch.endpoint
        specs = batch.family.plan.inputs
        started_s = self._loop.time()
        want_scores = any(segment.ticket.scores is not None for segment in batch.segments)
        taken: list[tuple[Ticket, int]] = []
        try:
            inputs = [gather(batch.segments, position) for position in range(len(specs))]
            answer = await endpoint.backend.infer(
                batch.model, specs, inputs, want_scores=want_scores, timeout_s=HANG_LIMIT_S
            )
            duration_s = self._loop.time() - started_s
            self._metrics.batch(endpoint.name, batch.model.name, batch.rows, duration_s)
            self._metrics.statistics.batch(batch, started_s, duration_s)
            taken = absorb(batch, answer, self._endpoints, self._metrics, self._loop.time())
        except BackendError as error:
            self._failed(batch, error)
        except BaseException as error:
            for segment in batch.segments:
                segment.ticket.fail(InternalError("the orchestrator failed while it handled this batch"))
            if not isinstance(error, asyncio.CancelledError):
                _log.exception("batch of %s for %s failed", batch.model, endpoint.name)
            else:
                raise
        finally:
            endpoint.arrive(batch)
            self.batches.discard(batch)
            try:
                self._pump()
            finally:
                # Last, so that the next batch is on its way before the answers of this one are written, one by one:
                # the loop does things in the order in which they were asked for.
                for ticket, rows in taken:
                    ticket.finish_rows(rows)

    def _failed(self, batch: Batch, error: BackendError) -> None:
        _log.warning("batch of %d rows failed: %s", batch.rows, error)
        self._metrics.batch_failed(batch.endpoint.name, batch.model.name)
        for segment in batch.segments:
            if isinstance(error, EndpointDown):
                segment.ticket.fail(Unavailable(f"endpoint '{batch.endpoint.name}' went away; try again"))
            else:
                segment.ticket.fail(InternalError(f"model '{batch.model.name}' could not answer: {error}"))
        # what an earlier life of the server left unanswered says nothing about this one
        if isinstance(error, EndpointDown) and batch.generation == batch.endpoint.generation:
            self.on_endpoint_error(batch.endpoint)
