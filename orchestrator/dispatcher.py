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
from orchestrator.routing import is_hosted, load_weights, with_room
from orchestrator.rows import Segment, Ticket, bind, gather
from orchestrator.state import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import Gear
    from orchestrator.backend import BatchAnswer, ModelVersion
    from orchestrator.metrics import Metrics
    from orchestrator.state import EndpointState, FamilyQueue, FamilyState

_log = logging.getLogger(__name__)

# A batch is waited for this long, whatever the deadlines of its rows: they expire by themselves, its slot stays busy
# until Triton answers anyway: it runs a batch to its end even where nobody waits for it any more (2.51, measured).
HANG_LIMIT_S = 60.0
# at shutdown, calls whose rows have expired may take this much longer before they are cancelled
CLOSE_GRACE_S = 3.0


class Dispatcher:
    """Carries rows of all families through their cascades over all endpoints."""

    def __init__(
        self, families: Iterable[FamilyState], endpoints: Iterable[EndpointState], *, metrics: Metrics
    ) -> None:
        """Endpoints are all down until `endpoint_is_up` says otherwise."""
        self.families: dict[str, FamilyState] = {}
        self.endpoints = list(endpoints)
        self.on_endpoint_error: Callable[[EndpointState], None] = lambda _: None
        self._metrics = metrics
        # families of earlier plans that still have rows
        self._leaving: list[FamilyState] = []
        self._queues: list[FamilyQueue] = []
        self._in_flight: set[Batch] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._deadlines = Deadlines(self._expire)
        self._wake: asyncio.TimerHandle | None = None
        self._wake_s = float("inf")
        self._loop = asyncio.get_running_loop()
        self.take_families(families)

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
        queue = family.queues[model]
        queue.drop_done_head()
        had_head = bool(queue.segments)
        queue.push(Segment(ticket, ticket.rows, now_s))
        # Whatever else could leave now has left: only this queue has changed. Behind a head it can only have become
        # full; while there is no room for it, the answer that makes some pumps.
        if not had_head or (queue.rows >= family.trigger(model)[0] and any(with_room(queue, self.endpoints))):
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
            family.queues[family.entry_model].merge(family.queues[old_model].take_unbound())
        self.pump()

    def take_families(self, families: Iterable[FamilyState]) -> None:
        """Give requests to these from now on; what the former ones have is answered as they would have."""
        self._leaving += self.families.values()
        self.families = {family.name: family for family in families}
        self._list_queues()

    def forget_drained(self) -> list[FamilyState]:
        """Let go of the families of earlier plans that have no rows left, and return them."""
        busy = {batch.family for batch in self._in_flight}
        drained = [family for family in self._leaving if family not in busy and not family.waiting_rows()]
        if drained:
            self._leaving = [family for family in self._leaving if family not in drained]
            self._list_queues()
        return drained

    def endpoint_is_up(self, endpoint: EndpointState, instances: dict[ModelVersion, int]) -> None:
        """Send to an endpoint from now on, to the models that have instances and are not about to leave."""
        if not endpoint.up:
            for each in self.endpoints:
                each.sent_s = 0.0  # what came up again need not catch up with what the others did meanwhile
            endpoint.generation += 1
        endpoint.up = True
        endpoint.instances = instances
        endpoint.hosted = {model: endpoint.hosted.get(model) for model in instances.keys() - endpoint.leaving}
        self._metrics.endpoint(endpoint.name, up=True, instances=instances)
        self.pump()

    def limit_in_flight(self, endpoint: EndpointState, model: ModelVersion, limit: int | None) -> None:
        """Keep at most `limit` batches of a model in flight at an endpoint; None: as many as its slots allow."""
        if model in endpoint.hosted:
            endpoint.hosted[model] = limit
            self.pump()

    def stop_sending(self, endpoint: EndpointState, model: ModelVersion) -> None:
        """Send no more batches of a model to an endpoint, which is about to unload it."""
        endpoint.leaving.add(model)
        endpoint.hosted.pop(model, None)

    def endpoint_is_down(self, endpoint: EndpointState) -> None:
        """Send nothing to it; rows that wait for a model which now stands nowhere are refused."""
        endpoint.up = False
        self._metrics.endpoint(endpoint.name, up=False, instances={})
        for queue in self._queues:
            if queue.rows and not is_hosted(queue.model, self.endpoints):
                queue.refuse(f"the last endpoint with model '{queue.model.name}' went down; try again")

    def queued_work_s(self, family: FamilyState) -> float:
        """Device-seconds, over all stages still to come, of the family's waiting rows, those of earlier plans too."""
        work_s = 0.0
        for queue in self._queues:
            if queue.family.name == family.name:
                queue.drop_done()
                work_s += queue.rows * queue.family.work_from_s(queue.model.name)
        return work_s

    def is_needed(self, model: ModelVersion) -> bool:
        """Whether a gear in force, or rows that wait or are on their way under another, may still come to a model."""
        if any(model in family.in_gear() for family in (*self.families.values(), *self._leaving)):
            return True
        waiting = ((queue.family, segment) for queue in self._queues for segment in queue.segments)
        on_the_way = ((batch.family, segment) for batch in self._in_flight for segment in batch.segments)
        return any(
            family.served(stage.model) == model
            for family, segment in (*waiting, *on_the_way)
            if segment.entry is not None
            for stage in segment.entry.stages[segment.stage :]
        )

    def queued_rows(self, model: str) -> int:
        """Rows waiting for a model, whichever version of it."""
        return sum(queue.rows for queue in self._queues if queue.model.name == model)

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
        for queue in self._queues:
            queue.refuse("the server is shutting down")
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
            queues, due, deadlines, oldest = [], [], [], []
            wake_s = float("inf")
            for queue in self._queues:
                queue.drop_done_head()
                if not queue.segments:
                    continue
                head = queue.segments[0]
                min_batch, _, max_wait_s = queue.family.trigger(queue.model.name)
                reason = due_reason(queue.rows, head.since_s, min_batch, max_wait_s, now_s)
                if reason == NOT_DUE:
                    wake_s = min(wake_s, due_at_s(head.since_s, max_wait_s))
                    continue
                if not any(with_room(queue, self.endpoints)):
                    continue  # the answer that frees a slot pumps again
                queues.append(queue)
                due.append(reason)
                # Capped: a client that says it can wait for an hour must not hold up those behind it in the queue.
                deadlines.append(min(head.ticket.deadline_s, head.since_s + PATIENCE_SLOS * queue.family.plan.slo_s))
                oldest.append(head.since_s)
            chosen = next_queue(due, deadlines, oldest, now_s, AGEING)
            if chosen < 0:
                break
            self._dispatch(queues[chosen], now_s)
        self._wake_at(wake_s)

    def _dispatch(self, queue: FamilyQueue, now_s: float) -> None:
        family = queue.family
        _, max_batch, _ = family.trigger(queue.model.name)
        planned = family.plan.models[queue.model.name]
        works_s = [planned.batch_busy_s(min(queue.rows, max_batch), endpoint.name) for endpoint in self.endpoints]
        chosen = least_expected_work(
            [endpoint.work_s for endpoint in self.endpoints],
            [endpoint.sent_s for endpoint in self.endpoints],
            load_weights(queue, self.endpoints),
            with_room(queue, self.endpoints),
            works_s,
        )
        endpoint, work_s = self.endpoints[chosen], works_s[chosen]
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
        busy_s = planned.batch_busy_s(rows, endpoint.name)
        batch = Batch(queue.model, family, endpoint, segments, rows, busy_s, endpoint.generation)
        self._in_flight.add(batch)
        endpoint.depart(batch)
        task = self._loop.create_task(self._send(batch), name=f"batch-{queue.model.name}-{endpoint.name}")
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
            self._metrics.batch(endpoint.name, batch.model.name, batch.rows, self._loop.time() - started_s)
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
            num_taken = int(taken[0]) if segment.rows == 1 else int(np.count_nonzero(taken))
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
            self._metrics.nan_certainty(batch.model.name, num_nan)
        return given

    def _escalate(self, family: FamilyState, segment: Segment, rows: NDArray[np.intp], now_s: float) -> None:
        if segment.entry is None:
            raise RuntimeError("rows left without a gear")
        queue = family.queues[segment.entry.stages[segment.stage + 1].model]
        if is_hosted(queue.model, self.endpoints):
            queue.push(segment.onward(rows, now_s))
        else:
            gone = f"no endpoint serves model '{queue.model.name}' of family '{family.name}' now"
            segment.ticket.fail(Unavailable(gone))

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

    # -- helpers of the above -----------------------------------------------------------------------------------

    def _list_queues(self) -> None:
        families = (*self.families.values(), *self._leaving)
        self._queues = [queue for family in families for queue in family.queues.values()]

    def _unserved_model(self, family: FamilyState) -> str | None:
        for stage in family.entry.stages:
            if not is_hosted(family.queues[stage.model].model, self.endpoints):
                return stage.model
        return None

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
