"""The dispatcher: queues, slots and batches. Decisions are `cascadeserve.policy`; here they are carried out.

Everything runs on one event loop and only the batches in flight wait for anything, so that state never changes in the
middle of a decision.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from cascadeserve.errors import DeadlineExceeded, Overloaded, Unavailable
from cascadeserve.policy.admission import NONE, in_time
from cascadeserve.policy.balancing import choose_endpoint
from cascadeserve.policy.batching import DUE_FULL, NOT_DUE, due_at_s, due_reason, handicap_s, next_queue
from orchestrator.deadlines import Deadlines
from orchestrator.flights import Flights
from orchestrator.passing import Passing
from orchestrator.request_options import NO_OPTIONS
from orchestrator.routing import is_hosted, load_weights, with_room, work_there_s
from orchestrator.rows import Segment, Ticket, bind, give_up, still_open, work_of
from orchestrator.state import Batch

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import Gear, LadderEntry
    from orchestrator.backend import ModelVersion
    from orchestrator.metrics import Metrics
    from orchestrator.request_options import RequestOptions
    from orchestrator.state import EndpointState, FamilyQueue, FamilyState


class Dispatcher:
    """Carries rows of all families through their cascades over all endpoints."""

    def __init__(
        self, families: Iterable[FamilyState], endpoints: Iterable[EndpointState], *, metrics: Metrics
    ) -> None:
        """Endpoints are all down until `endpoint_is_up` says otherwise."""
        self.families: dict[str, FamilyState] = {}
        self.endpoints = list(endpoints)
        self._metrics = metrics
        # families of earlier plans that still have rows
        self._leaving: list[FamilyState] = []
        self._queues: list[FamilyQueue] = []
        self.flights = Flights(self.endpoints, metrics=metrics, pump=self.pump)
        self.passing = Passing(self.endpoints, metrics=metrics, pump=self.pump)
        self._deadlines = Deadlines(self._expire)
        self._wake: asyncio.TimerHandle | None = None
        self._wake_s = float("inf")
        # batches so far, and the endpoint that the last of them left for
        self._turn = 0
        self._last_endpoint = -1
        self._loop = asyncio.get_running_loop()
        self.take_families(families)

    # -- from the data plane ------------------------------------------------------------------------------------

    def submit(
        self,
        family: FamilyState,
        inputs: list[NDArray[Any]],
        *,
        timeout_s: float,
        want_scores: bool,
        options: RequestOptions = NO_OPTIONS,
        admitted: bool = True,
    ) -> asyncio.Future[Ticket]:
        """Queue a request; the future gives the answered ticket or raises one RequestError.

        Cancelling the future drops the rows that have not left yet. `admitted` False: the entry would have refused it
        but for its priority, so it is let in only if what it does not overtake leaves it time within the SLO.
        """
        now_s = self._loop.time()
        future: asyncio.Future[Ticket] = self._loop.create_future()
        ticket = Ticket(
            inputs,
            arrived_s=now_s,
            deadline_s=now_s + timeout_s,
            num_classes=family.plan.num_classes if want_scores else None,
            future=future,
            options=options,
            handicap_s=handicap_s(options.priority, family.plan.slo_s),
        )
        entry = family.reference_alone if options.reference else None
        if (model := self._unserved_model(family, entry)) is not None:
            ticket.fail(Unavailable(f"no endpoint serves model '{model}' now; try again shortly"))
            return future
        model = family.entry_model
        if entry is not None:  # bound from the first, whatever gear is in force when it leaves
            model = entry.stages[0].model
            ticket.gears.append(family.gear.name)
        queue = family.queues[model]
        queue.drop_done_head()
        until_s = ticket.deadline_s if admitted else min(ticket.deadline_s, now_s + family.plan.slo_s)
        if not self._let_in(queue, ticket, now_s, until_s):
            sentence = "what waits already takes longer than this request may; try again later"
            ticket.fail(Overloaded(sentence, retry_after_s=family.plan.slo_s))
            return future
        self._deadlines.add(ticket)
        queue.add(Segment(ticket, ticket.rows, now_s, entry=entry))
        # Whatever else could leave now has left: only this queue has changed. Behind a head it can only have become
        # full, or due for an important row; while there is no room for it, the answer that makes some pumps.
        is_head = queue.head is not None and queue.head.ticket is ticket
        may_be_due = ticket.handicap_s < 0.0 or queue.rows >= family.trigger(model)[0]
        if is_head or (may_be_due and any(with_room(queue, self.endpoints))):
            self.pump()
        return future

    def can_serve(self, family: FamilyState) -> bool:
        """Whether every model of the gear in force stands on some endpoint that is up."""
        return self._unserved_model(family) is None

    def can_serve_in(self, family: FamilyState, gear: Gear) -> bool:
        """Whether every model of a gear stands on some endpoint that is up."""
        stages = family.plan.entry(gear.ladder_entry).stages
        return all(is_hosted(family.queues[stage.model].model, self.endpoints) for stage in stages)

    @property
    def open_tickets(self) -> int:
        """Requests that have no answer yet."""
        return self._deadlines.clear_stale() + self.passing.open

    # -- from the control loops ---------------------------------------------------------------------------------

    def set_gear(self, family: FamilyState, gear: Gear) -> None:
        """Put a gear in force: rows that have not left yet will take it."""
        old_model = family.entry_model
        family.shift(gear)
        if family.entry_model != old_model:
            for segment in family.queues[old_model].take_unbound():
                family.queues[family.entry_model].add(segment)
        self.pump()

    def take_families(self, families: Iterable[FamilyState]) -> None:
        """Give requests to these from now on; what the former ones have is answered as they would have."""
        self._leaving += self.families.values()
        self.families = {family.name: family for family in families}
        self._list_queues()

    def forget_drained(self) -> list[FamilyState]:
        """Let go of the families of earlier plans that have no rows left, and return them."""
        busy = {batch.family for batch in self.flights.batches}
        busy |= {queue.family for queue, _ in self.flights.waiting_again()}
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
        unused = endpoint.leaving | self._made_of(endpoint.dead) | endpoint.failing.keys()
        endpoint.hosted = {model: endpoint.hosted.get(model) for model in instances.keys() - unused}
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
        """Send nothing to it; rows that wait for a model which now stands nowhere wait on, until their deadline."""
        endpoint.up = False
        # started again, it has new processes
        endpoint.dead.clear()
        self._metrics.endpoint(endpoint.name, up=False, instances={})
        self.flights.recall_soon(endpoint)
        self.passing.recall(endpoint)
        self.pump()

    def model_is_dead(self, endpoint: EndpointState, name: str) -> None:
        """Send nothing there to a model whose Python process has ended, or to what is made of it; see `Reloads`."""
        endpoint.dead.add(name)
        for model in self._made_of({name}):
            endpoint.hosted.pop(model, None)

    def queued_work_s(self, family: FamilyState) -> float:
        """Device-seconds, over all stages still to come, of the family's waiting rows, those of earlier plans too."""
        for queue in self._queues:
            if queue.family.name == family.name:
                queue.drop_done()
        return self.roughly_queued_work_s(family)

    def roughly_queued_work_s(self, family: FamilyState) -> float:
        """The same, with rows that were answered since that was asked."""
        queues = (queue for queue in self._queues if queue.family.name == family.name)
        return sum(queue.work * queue.family.work_from_s(queue.model.name) for queue in queues)

    def is_needed(self, model: ModelVersion) -> bool:
        """Whether a gear in force, or rows that wait or are on their way under another, may still come to a model."""
        if any(model in family.in_gear() for family in (*self.families.values(), *self._leaving)):
            return True
        waiting = (
            (queue.family, segment)
            for queue in self._queues
            for segments in (queue.segments, *queue.halves)
            for segment in segments
        )
        again = ((queue.family, segment) for queue, segment in self.flights.waiting_again())
        on_the_way = ((batch.family, segment) for batch in self.flights.batches for segment in batch.segments)
        return any(
            family.served(stage.model) == model
            for family, segment in (*waiting, *again, *on_the_way)
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
        self._refuse_waiting()
        await self.flights.close()
        # what came back from them
        self._refuse_waiting()

    # -- batching -----------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Send every batch that is due and has a free slot, then sleep until the next one can be due."""
        now_s = self._loop.time()
        self.flights.send_again(now_s)
        while True:
            queues, due, ranks_s = [], [], []
            wake_s = float("inf")
            for queue in self._queues:
                queue.drop_done_head()
                if queue.head is None:
                    continue
                min_batch, _, max_wait_s = queue.family.trigger(queue.model.name)
                since_s = now_s if queue.halves or queue.rows >= min_batch else queue.oldest_since_s()
                reason = DUE_FULL if queue.halves else due_reason(queue.rows, since_s, min_batch, max_wait_s, now_s)
                if reason == NOT_DUE:
                    wake_s = min(wake_s, due_at_s(since_s, max_wait_s))
                    continue
                if not any(with_room(queue, self.endpoints)):
                    continue  # the answer that frees a slot pumps again
                queues.append(queue)
                due.append(reason)
                ranks_s.append(queue.head_rank_s)
            chosen = next_queue(due, ranks_s)
            if self.passing.take_turn(contested=chosen >= 0):
                continue
            if chosen < 0:
                break
            self._dispatch(queues[chosen], now_s)
        self._wake_at(wake_s)

    def _dispatch(self, queue: FamilyQueue, now_s: float) -> None:
        family = queue.family
        _, room, _ = family.trigger(queue.model.name)
        planned = family.plan.models[queue.model.name]
        half = still_open(queue.take_half()) if queue.halves else []
        taken = half or queue.take(room)
        work = work_of(taken)
        works_s = [planned.batch_busy_s(work, endpoint.name) for endpoint in self.endpoints]
        chosen = choose_endpoint(
            family.balancer,
            self._turn,
            self._last_endpoint,
            [endpoint.in_flight for endpoint in self.endpoints],
            [endpoint.work_s for endpoint in self.endpoints],
            [endpoint.sent_s for endpoint in self.endpoints],
            load_weights(queue, self.endpoints),
            with_room(queue, self.endpoints),
            works_s,
        )
        self._turn += 1
        self._last_endpoint = chosen
        endpoint, work_s = self.endpoints[chosen], works_s[chosen]
        # the slots share what is in flight: all of it over the slots is ahead of this batch
        ahead_s = endpoint.work_s / endpoint.slots
        segments: list[Segment] = []
        while taken:
            for segment in taken:
                if in_time(family.admission, segment.ticket.deadline_s, now_s, ahead_s, work_s):
                    bind(segment, family.gear, family.entry)
                    segments.append(segment)
                    room -= segment.rows
                else:
                    give_up(segment, "the answer would have come too late, so it was not begun")
            taken = [] if half else queue.take(room)
        rows = sum(segment.rows for segment in segments)
        if not rows:
            return
        busy_s = planned.batch_busy_s(work_of(segments), endpoint.name)
        batch = Batch(queue.model, family, endpoint, segments, rows, busy_s, endpoint.generation, apart=bool(half))
        self.flights.depart(batch)

    # -- helpers of the above -----------------------------------------------------------------------------------

    def _made_of(self, names: Collection[str]) -> set[ModelVersion]:
        """Models of these names, and those that are made of them."""
        if not names:
            return set()
        return {queue.model for queue in self._queues if any(model.name in names for model in queue.occupied)}

    def _refuse_waiting(self) -> None:
        for queue in self._queues:
            queue.refuse("the server is shutting down")
        self.flights.refuse_waiting("the server is shutting down")
        self.passing.refuse("the server is shutting down")

    def _let_in(self, queue: FamilyQueue, ticket: Ticket, now_s: float, until_s: float) -> bool:
        """Whether a request can still be answered by a time behind what waits and goes before it.

        With nothing of that it is let in: it is judged when it leaves, by what is left of the work in flight.
        """
        family = queue.family
        if family.admission == NONE or not any(each.work for each in self._queues):
            return True
        hosts = [endpoint for endpoint in self.endpoints if endpoint.hosts(queue.model)]
        if not hosts:
            return True
        rank_s = queue.rank_s(ticket)
        ahead_s = 0.0
        for each in self._queues:
            if each.rows:
                ahead_s += each.work_before(rank_s) * work_there_s(each, queue.model, self.endpoints)
        if not ahead_s:
            return True
        # all its rows but those of its last batch go before that too
        model = queue.model.name
        last_rows = min(ticket.rows, family.trigger(model)[1])
        if last_rows < ticket.rows:
            row_s = ticket.work_per_row * work_there_s(queue, queue.model, self.endpoints)
            ahead_s += (ticket.rows - last_rows) * row_s
        ahead_s += sum(endpoint.work_s for endpoint in hosts)
        planned, last_work = family.plan.models[model], last_rows * ticket.work_per_row
        busy_s = min(planned.batch_busy_s(last_work, endpoint.name) for endpoint in hosts)
        slots = sum(endpoint.slots for endpoint in hosts)
        return in_time(family.admission, until_s, now_s, ahead_s / slots, busy_s)

    def _list_queues(self) -> None:
        families = (*self.families.values(), *self._leaving)
        self._queues = [queue for family in families for queue in family.queues.values()]

    def _unserved_model(self, family: FamilyState, entry: LadderEntry | None = None) -> str | None:
        for stage in (entry or family.entry).stages:
            if not is_hosted(family.queues[stage.model].model, self.endpoints):
                return stage.model
        return None

    def _expire(self, ticket: Ticket) -> None:
        if not ticket.unheard:
            ticket.cut(ticket.remaining)
            ticket.finish_rows(ticket.remaining)
            return
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
