"""The dispatcher: queues, slots and batches. Decisions are `cascadeserve.policy`; here they are carried out.

Everything runs on one event loop and only `_send` awaits, so that state never changes in the middle of a decision.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from cascadeserve.errors import DeadlineExceeded, InternalError, Unavailable
from cascadeserve.policy.admission import in_time
from cascadeserve.policy.balancing import least_expected_work
from cascadeserve.policy.batching import AGEING, NOT_DUE, PATIENCE_SLOS, due_at_s, due_reason, next_queue
from cascadeserve.policy.escalation import accepted
from orchestrator.backend import BackendError, EndpointDown
from orchestrator.deadlines import Deadlines
from orchestrator.rows import ModelQueue, Segment, Ticket, bind, gather
from orchestrator.state import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import Gear
    from orchestrator.backend import BatchAnswer
    from orchestrator.metrics import Metrics
    from orchestrator.state import EndpointState, FamilyState

_log = logging.getLogger(__name__)

# A batch is waited for this long, whatever the deadlines of its rows: they expire by themselves, its slot stays busy
# until Triton answers anyway: it runs a batch to its end even where nobody waits for it any more (2.51, measured).
HANG_LIMIT_S = 60.0
# at shutdown, calls whose rows have expired may take this much longer before they are cancelled
CLOSE_GRACE_S = 3.0


class Dispatcher:
    """Carries rows of all families through their cascades over all endpoints."""

    def __init__(
        self, families: Iterable[FamilyState], endpoints: Iterable[EndpointState], *, plan_name: str, metrics: Metrics
    ) -> None:
        """Endpoints are all down until `endpoint_is_up` says otherwise."""
        self.families = {family.name: family for family in families}
        self.endpoints = list(endpoints)
        self.plan_name = plan_name
        self.on_endpoint_error: Callable[[EndpointState], None] = lambda _: None
        self._metrics = metrics
        self._owner = {model: family for family in self.families.values() for model in family.plan.models}
        self._used = {name for family in self.families.values() for name in family.plan.models_in_triton}
        self._queues = {model: ModelQueue() for model in self._owner}
        self._in_flight: set[Batch] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._deadlines = Deadlines(self._expire)
        self._wake: asyncio.TimerHandle | None = None
        self._wake_s = float("inf")
        self._loop = asyncio.get_running_loop()

    # -- from the data plane ------------------------------------------------------------------------------------

    def submit(
        self, family: FamilyState, inputs: list[NDArray[Any]], *, timeout_s: float, want_scores: bool
    ) -> asyncio.Future[Ticket]:
        """Queue a request; the future gives the answered ticket or raises one RequestError.

        Cancelling the future drops the rows that have not left yet.
        """
        now_s = self._loop.time()
        future: asyncio.Future[Ticket] = self._loop.create_future()
        ticket = Ticket(
            inputs,
            arrived_s=now_s,
            deadline_s=now_s + timeout_s,
            num_classes=family.plan.num_classes if want_scores else None,
            future=future,
        )
        if (model := self._unserved_model(family)) is not None:
            ticket.fail(Unavailable(f"no endpoint serves model '{model}' now; try again shortly"))
            return future
        self._deadlines.add(ticket)
        model = family.entry_model
        queue = self._queues[model]
        queue.drop_done_head()
        had_head = bool(queue.segments)
        queue.push(Segment(ticket, ticket.rows, now_s))
        # Whatever else could leave now has left: only this queue has changed. Behind a head it can only have become
        # full; while there is no room for it, the answer that makes some pumps.
        if not had_head or (queue.rows >= family.trigger(model)[0] and any(self._room(model))):
            self.pump()
        return future

    def can_serve(self, family: FamilyState) -> bool:
        """Whether every model of the gear in force stands on some endpoint that is up."""
        return self._unserved_model(family) is None

    @property
    def open_tickets(self) -> int:
        """Requests that have no answer yet."""
        return self._deadlines.clear_stale()

    # -- from the control loops ---------------------------------------------------------------------------------

    def set_gear(self, family: FamilyState, gear: Gear) -> None:
        """Put a gear in force: rows that have not left yet will take it."""
        old_model = family.entry_model
        family.shift(gear)
        if family.entry_model != old_model:
            self._queues[family.entry_model].merge(self._queues[old_model].take_unbound())
        self.pump()

    def endpoint_is_up(self, endpoint: EndpointState, instances: dict[str, int]) -> None:
        """Send to an endpoint from now on, to the models that have instances and are not about to leave."""
        if not endpoint.up:
            for each in self.endpoints:
                each.sent_s = 0.0  # what came up again need not catch up with what the others did meanwhile
            endpoint.generation += 1
        endpoint.up = True
        endpoint.instances = {model: count for model, count in instances.items() if model in self._used}
        hosted = endpoint.instances.keys() - endpoint.leaving
        endpoint.hosted = {model: endpoint.hosted.get(model) for model in hosted}
        self._metrics.endpoint(endpoint.name, up=True, instances=endpoint.instances)
        self.pump()

    def limit_in_flight(self, endpoint: EndpointState, model: str, limit: int | None) -> None:
        """Keep at most `limit` batches of a model in flight at an endpoint; None: as many as its slots allow."""
        if model in endpoint.hosted:
            endpoint.hosted[model] = limit
            self.pump()

    def stop_sending(self, endpoint: EndpointState, model: str) -> None:
        """Send no more batches of a model to an endpoint, which is about to unload it."""
        endpoint.leaving.add(model)
        endpoint.hosted.pop(model, None)

    def endpoint_is_down(self, endpoint: EndpointState) -> None:
        """Send nothing to it; rows that wait for a model which now stands nowhere are refused."""
        endpoint.up = False
        self._metrics.endpoint(endpoint.name, up=False, instances={})
        for model, queue in self._queues.items():
            if queue.rows and not self._is_hosted(model):
                for segment in queue.take(queue.rows):
                    segment.ticket.fail(Unavailable(f"the last endpoint with model '{model}' went down; try again"))

    def queued_work_s(self, family: FamilyState) -> float:
        """Device-seconds, over all stages still to come, of the family's waiting rows."""
        work_s = 0.0
        for model, queue in self._queues.items():
            if self._owner[model] is family:
                queue.drop_done()
                work_s += queue.rows * family.work_from_s(model)
        return work_s

    def is_needed(self, model: str) -> bool:
        """Whether rows that are waiting or on their way may still come to a model, under the gear they left in."""
        waiting = (segment for queue in self._queues.values() for segment in queue.segments)
        on_the_way = (segment for batch in self._in_flight for segment in batch.segments)
        return any(
            stage.model == model
            for segment in (*waiting, *on_the_way)
            if segment.entry is not None
            for stage in segment.entry.stages[segment.stage :]
        )

    def queued_rows(self, model: str) -> int:
        """Rows waiting for a model."""
        return self._queues[model].rows

    async def drain(self, timeout_s: float) -> bool:
        """Wait until every request is answered; returns whether that came in time."""
        give_up_s = self._loop.time() + timeout_s
        while self.open_tickets and self._loop.time() < give_up_s:  # noqa: ASYNC110 - rare, at shutdown only
            await asyncio.sleep(0.01)
        return not self.open_tickets

    async def close(self) -> None:
        """Refuse what is still waiting and end the calls in flight."""
        if self._wake is not None:
            self._wake.cancel()
        self._deadlines.stop()
        for queue in self._queues.values():
            for segment in queue.take(queue.rows):
                segment.ticket.fail(Unavailable("the server is shutting down"))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_GRACE_S)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- batching -----------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Send every batch that is due and has a free slot, then sleep until the next one can be due."""
        now_s = self._loop.time()
        while True:
            models, due, deadlines, oldest = [], [], [], []
            wake_s = float("inf")
            for model, queue in self._queues.items():
                queue.drop_done_head()
                if not queue.segments:
                    continue
                head = queue.segments[0]
                family = self._owner[model]
                min_batch, _, max_wait_s = family.trigger(model)
                reason = due_reason(queue.rows, head.since_s, min_batch, max_wait_s, now_s)
                if reason == NOT_DUE:
                    wake_s = min(wake_s, due_at_s(head.since_s, max_wait_s))
                    continue
                if not any(self._room(model)):
                    continue  # the answer that frees a slot pumps again
                models.append(model)
                due.append(reason)
                # Capped: a client that says it can wait for an hour must not hold up those behind it in the queue.
                deadlines.append(min(head.ticket.deadline_s, head.since_s + PATIENCE_SLOS * family.plan.slo_s))
                oldest.append(head.since_s)
            chosen = next_queue(due, deadlines, oldest, now_s, AGEING)
            if chosen < 0:
                break
            self._dispatch(models[chosen], now_s)
        self._wake_at(wake_s)

    def _dispatch(self, model: str, now_s: float) -> None:
        family = self._owner[model]
        queue = self._queues[model]
        _, max_batch, _ = family.trigger(model)
        planned = family.plan.models[model]
        work_s = planned.batch_busy_s(min(queue.rows, max_batch))
        endpoint = self.endpoints[
            least_expected_work(
                [endpoint.work_s for endpoint in self.endpoints],
                [endpoint.sent_s for endpoint in self.endpoints],
                self._weights(model),
                self._room(model),
                work_s,
            )
        ]
        # the slots share what is in flight: all of it over the slots is ahead of this batch
        ahead_s = endpoint.work_s / endpoint.slots
        segments: list[Segment] = []
        room = max_batch
        while room > 0 and (taken := queue.take(room)):
            for segment in taken:
                if in_time(segment.ticket.deadline_s, now_s, ahead_s, work_s):
                    bind(segment, family.gear, family.entry)
                    segments.append(segment)
                    room -= segment.rows
                else:
                    segment.ticket.fail(DeadlineExceeded("the answer would have come too late, so it was not begun"))
        rows = sum(segment.rows for segment in segments)
        if not rows:
            return
        batch = Batch(model, family, endpoint, segments, rows, planned.batch_busy_s(rows), endpoint.generation)
        self._in_flight.add(batch)
        endpoint.depart(batch)
        task = self._loop.create_task(self._send(batch), name=f"batch-{model}-{endpoint.name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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
            self._metrics.batch(endpoint.name, batch.model, batch.rows, self._loop.time() - started_s)
            taken = self._absorb(batch, answer)
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
            self._in_flight.discard(batch)
            try:
                self.pump()
            finally:
                # Last, so that the next batch is on its way before the answers of this one are written, one by one:
                # the loop does things in the order in which they were asked for.
                for ticket, rows in taken:
                    ticket.finish_rows(rows)

    def _absorb(self, batch: Batch, answer: BatchAnswer) -> list[tuple[Ticket, int]]:
        """Give accepted rows to their tickets and queue the others at their next stage.

        Returns the tickets that got rows and how many; they are not told of it yet.
        """
        stop = 0
        now_s = self._loop.time()
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
                self._escalate(batch.family, segment, np.flatnonzero(~taken), now_s)
        for stage, rows in answered_at.items():
            self._metrics.answered(batch.family.name, stage, rows)
        num_nan = int(np.count_nonzero(np.isnan(answer.certainty)))
        if num_nan:
            self._metrics.nan_certainty(batch.model, num_nan)
        return given

    def _escalate(self, family: FamilyState, segment: Segment, rows: NDArray[np.intp], now_s: float) -> None:
        if len(rows) == segment.rows:
            indices = segment.indices
        else:
            indices = rows if segment.indices is None else segment.indices[rows]
        if segment.entry is None:
            raise RuntimeError("rows left without a gear")
        model = segment.entry.stages[segment.stage + 1].model
        onward = Segment(segment.ticket, len(rows), now_s, indices, segment.entry, segment.stage + 1)
        if self._is_hosted(model):
            self._queues[model].push(onward)
        else:
            onward.ticket.fail(Unavailable(f"no endpoint serves model '{model}' of family '{family.name}' now"))

    def _failed(self, batch: Batch, error: BackendError) -> None:
        _log.warning("batch of %d rows failed: %s", batch.rows, error)
        self._metrics.batch_failed(batch.endpoint.name, batch.model)
        for segment in batch.segments:
            if isinstance(error, EndpointDown):
                segment.ticket.fail(Unavailable(f"endpoint '{batch.endpoint.name}' went away; try again"))
            else:
                segment.ticket.fail(InternalError(f"model '{batch.model}' could not answer: {error}"))
        # what an earlier life of the server left unanswered says nothing about this one
        if isinstance(error, EndpointDown) and batch.generation == batch.endpoint.generation:
            self.on_endpoint_error(batch.endpoint)

    # -- helpers of the above -----------------------------------------------------------------------------------

    def _weights(self, model: str) -> list[float]:
        """The gear's load weights; alike for all where it names none or only endpoints that are down."""
        planned = self._owner[model].gear.load.get(model)
        if planned is None:
            return [1.0] * len(self.endpoints)
        weights = [planned.get(endpoint.name, 0.0) for endpoint in self.endpoints]
        live = (endpoint.hosts(model) for endpoint in self.endpoints)
        return weights if any(w > 0.0 for w, up in zip(weights, live, strict=True) if up) else [1.0] * len(weights)

    def _room(self, model: str) -> list[bool]:
        """Which endpoints a batch of the model may leave for now."""
        parts, weights = self._owner[model].plan.models[model].composed_of, self._weights(model)
        return [w > 0.0 and at.has_room(model, parts) for at, w in zip(self.endpoints, weights, strict=True)]

    def _is_hosted(self, model: str) -> bool:
        return any(endpoint.hosts(model) for endpoint in self.endpoints)

    def _unserved_model(self, family: FamilyState) -> str | None:
        return next((stage.model for stage in family.entry.stages if not self._is_hosted(stage.model)), None)

    def _expire(self, ticket: Ticket) -> None:
        waited_s = self._loop.time() - ticket.arrived_s
        ticket.fail(DeadlineExceeded(f"the deadline passed after {waited_s:.3f} s before the answer was complete"))

    def _wake_at(self, when_s: float) -> None:
        if when_s == self._wake_s:
            return
        if self._wake is not None:
            self._wake.cancel()
        self._wake = None if when_s == float("inf") else self._loop.call_at(when_s, self._wake_up)
        self._wake_s = when_s

    def _wake_up(self) -> None:
        self._wake_s = float("inf")
        self.pump()
