"""Batches on their way: each is sent, and what comes back is given to its rows."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from cascadeserve.errors import InternalError, Unavailable
from orchestrator.answers import absorb
from orchestrator.backend import BackendError, EndpointDown, ModelSilent, NotServed, StubDead
from orchestrator.isolation import Isolation
from orchestrator.rows import gather
from orchestrator.second_opinion import SecondOpinions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from orchestrator.backend import ModelVersion
    from orchestrator.metrics import Metrics
    from orchestrator.rows import Segment, Ticket
    from orchestrator.state import Batch, EndpointState, FamilyQueue

_log = logging.getLogger(__name__)

# A batch is waited for this long, whatever the deadlines of its rows: they expire by themselves, its slot stays busy
# until Triton answers anyway: it runs a batch to its end even where nobody waits for it any more (2.51, measured).
HANG_LIMIT_S = 60.0
# After an endpoint was found down its batches have this long to say by themselves how they ended: that one of them
# crashed it is worth more than that it is silent.
LAST_WORDS_S = 0.1
# at shutdown, calls whose rows have expired may take this much longer before they are cancelled
CLOSE_GRACE_S = 3.0


class Flights:
    """The batches in flight, each with a task that waits for its answer."""

    def __init__(self, endpoints: Sequence[EndpointState], *, metrics: Metrics, pump: Callable[[], None]) -> None:
        """`pump` is called when a slot has become free."""
        self.on_endpoint_error: Callable[[EndpointState], None] = lambda _: None
        # told of the endpoint and the name of a model
        self.on_dead_model: Callable[[EndpointState, str], None] = lambda *_: None
        self.batches: set[Batch] = set()
        self.opinions = SecondOpinions(endpoints, metrics=metrics, depart=self.depart)
        self.isolation = Isolation(endpoints, self.batches, metrics=metrics, opinions=self.opinions, depart=self.depart)
        self._endpoints = endpoints
        self._metrics = metrics
        self._pump = pump
        self._tasks: dict[Batch, asyncio.Task[None]] = {}
        # why batches were called back, until they are
        self._recalled: dict[Batch, BackendError] = {}
        self._loop = asyncio.get_running_loop()

    def depart(self, batch: Batch) -> None:
        """Send a batch; its rows are answered, queued at their next stage or refused when it comes back."""
        self.batches.add(batch)
        batch.endpoint.depart(batch)
        task = self._loop.create_task(self._send(batch), name=f"batch-{batch.model.name}-{batch.endpoint.name}")
        self._tasks[batch] = task
        task.add_done_callback(lambda _: self._ended(batch))

    def send_again(self, now_s: float) -> None:
        """Send rows of batches that failed, where they go before all that waits."""
        self.opinions.send(now_s)
        self.isolation.try_suspect(now_s)

    def waiting_again(self) -> list[tuple[FamilyQueue, Segment]]:
        """Such rows that have not left yet, with the queues that they came from."""
        strays = [(stray.queue, segment) for stray in self.opinions.waiting for segment in stray.segments]
        return strays + [(suspect.queue, suspect.segment) for suspect in self.isolation.suspects]

    def refuse_waiting(self, why: str) -> None:
        """Answer that they cannot be served now."""
        for _, segment in self.waiting_again():
            segment.ticket.fail(Unavailable(why))
        self.opinions.waiting.clear()
        self.isolation.suspects.clear()

    def recall(self, batches: Iterable[Batch], error: BackendError) -> None:
        """Wait no longer for those of these batches that are still in flight: they have failed."""
        for batch in batches:
            if batch in self.batches and batch not in self._recalled:
                self._recalled[batch] = error
                self._tasks[batch].cancel()

    def recall_soon(self, endpoint: EndpointState) -> None:
        """Do so with all batches that are in flight at an endpoint now, which is down."""
        batches = [batch for batch in self.batches if batch.endpoint is endpoint]
        if batches:
            error = EndpointDown(f"endpoint '{endpoint.name}' does not answer any more")
            self._loop.call_later(LAST_WORDS_S, self.recall, batches, error)

    def model_is_silent(self, endpoint: EndpointState, model: ModelVersion) -> None:
        """Send nothing more to a model that hangs there, if it is elsewhere too, and try its rows there."""
        batches = [batch for batch in self.batches if batch.endpoint is endpoint and batch.model == model]
        if batches and self.opinions.is_silent(endpoint, model):
            self.recall(batches, ModelSilent(f"'{model}' does not answer at endpoint '{endpoint.name}'"))

    async def close(self) -> None:
        """End the calls in flight."""
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=CLOSE_GRACE_S)
        while self._tasks:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

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
            self.opinions.answered(batch)
            taken = absorb(batch, answer, self._endpoints, self._metrics, self._loop.time())
        except BackendError as error:
            self._failed(batch, error)
        except asyncio.CancelledError:
            self._cancelled(batch)
        except BaseException:  # noqa: BLE001 - whatever it is, its rows get an answer
            _log.exception("batch of %s for %s failed", batch.model, endpoint.name)
            self._give_up(batch)
        finally:
            self._arrived(batch, taken)

    def _ended(self, batch: Batch) -> None:
        del self._tasks[batch]
        if batch in self.batches:
            # its task was cancelled before it had begun
            self._cancelled(batch)
            self._arrived(batch, [])

    def _arrived(self, batch: Batch, taken: list[tuple[Ticket, int]]) -> None:
        batch.endpoint.arrive(batch)
        self.batches.discard(batch)
        self._recalled.pop(batch, None)
        try:
            self._pump()
        finally:
            # Last, so that the next batch is on its way before the answers of this one are written, one by one:
            # the loop does things in the order in which they were asked for.
            for ticket, rows in taken:
                ticket.finish_rows(rows)

    def _cancelled(self, batch: Batch) -> None:
        """Take a batch for failed that was called back; otherwise the orchestrator is closing."""
        if batch in self._recalled:
            self._failed(batch, self._recalled[batch])
        else:
            self._give_up(batch)

    def _give_up(self, batch: Batch) -> None:
        for segment in batch.segments:
            segment.ticket.fail(InternalError("the orchestrator failed while it handled this batch"))

    def _failed(self, batch: Batch, error: BackendError) -> None:
        _log.warning("batch of %d rows failed: %s", batch.rows, error)
        self._metrics.batch_failed(batch.endpoint.name, batch.model.name)
        self.isolation.failed(batch, error, self._loop.time())
        endpoint = batch.endpoint
        # what an earlier life of the server left unanswered says nothing about this one
        if batch.generation != endpoint.generation:
            return
        if isinstance(error, EndpointDown):
            self.on_endpoint_error(endpoint)
        elif isinstance(error, StubDead) and batch not in self._recalled and _occupies(batch, error.model):
            self.on_dead_model(endpoint, error.model)
            beside = [other for other in self.batches if other.endpoint is endpoint and _occupies(other, error.model)]
            # each would come to its own error in turn, a second after the other
            self.recall([other for other in beside if other is not batch], error)
        elif isinstance(error, NotServed):
            # the next look at what stands there tells whether it was just being changed
            endpoint.hosted.pop(batch.model, None)


def _occupies(batch: Batch, name: str) -> bool:
    return any(model.name == name for model in batch.occupied)
