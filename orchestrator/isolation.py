"""What becomes of the rows of a batch that failed, so that one bad row does not fail strangers.

- The endpoint did not begin the batch: its rows go back to their queue; once, if the endpoint was there.
- It answered with an error: the rows leave again in two halves, and so on; a row that fails alone is refused, once it
  has done so at a second endpoint, if there is one (`second_opinion`).
- It went away, or the model's Python process ended: the rows are suspects. They are tried one at a time, by themselves,
  on one endpoint; a row that crashes it is refused. The last endpoint with the model is not risked while another may
  come back, unless half of the time until the row's deadline has passed.

None of it outlasts a deadline. A row may be refused with its request only: what else of it waits is dropped.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascadeserve.errors import InternalError, InvalidRequest, Unavailable
from cascadeserve.policy.admission import in_time
from orchestrator.backend import (
    BatchNotTaken,
    CallRejected,
    ConnectionLost,
    EndpointDown,
    ModelSilent,
    NoConnection,
    NotServed,
    StubDead,
)
from orchestrator.rows import give_up, in_two, still_open
from orchestrator.state import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from orchestrator.backend import BackendError
    from orchestrator.metrics import Metrics
    from orchestrator.rows import Segment
    from orchestrator.second_opinion import SecondOpinions
    from orchestrator.state import EndpointState, FamilyQueue

_log = logging.getLogger(__name__)

# An endpoint is emptied for suspects for so long; a batch that hangs must not keep it idle.
_EMPTY_WITHIN_S = 5.0
_BAD_REQUEST = 400


@dataclass(frozen=True, slots=True, eq=False)
class Suspect:
    """One row that may have caused a crash, and where it waited before that."""

    queue: FamilyQueue
    segment: Segment
    # until then the last endpoint is spared
    patient_until_s: float


class Isolation:
    """Rows of failed batches on their way to an answer."""

    def __init__(
        self,
        endpoints: Sequence[EndpointState],
        in_flight: Collection[Batch],
        *,
        metrics: Metrics,
        opinions: SecondOpinions,
        depart: Callable[[Batch], None],
    ) -> None:
        """`in_flight` is looked at, `depart` sends a batch."""
        self._opinions = opinions
        self.suspects: deque[Suspect] = deque()
        self._endpoints = endpoints
        self._in_flight = in_flight
        self._metrics = metrics
        self._depart = depart
        # where suspects are tried, and since when nothing else is sent there
        self._endpoint: EndpointState | None = None
        self._reserved_s = 0.0

    def failed(self, batch: Batch, error: BackendError, now_s: float) -> None:
        """Decide what becomes of the rows of a batch."""
        segments = still_open(batch.segments)
        if not segments:
            return
        queue = batch.family.queues[batch.model.name]
        if isinstance(error, BatchNotTaken | NotServed):
            self._not_begun(queue, segments, batch, error, now_s)
        elif isinstance(error, EndpointDown | StubDead):
            if batch.alone and isinstance(error, ConnectionLost | StubDead):
                what = "its server went away" if isinstance(error, EndpointDown) else f"Triton said: {error.answer}"
                self._refuse(batch, InternalError(f"{_which(batch)} crashed it, alone: {what}"), "crash")
            else:
                self._suspect(queue, segments, now_s)
        elif isinstance(error, ModelSilent) and batch.failed_at is not None:
            # at a third endpoint they would make it hang as well
            for segment in segments:
                give_up(segment, f"'{batch.model}' did not answer it at two endpoints")
        elif self._opinions.ask(batch, segments):
            return
        elif batch.rows == 1:
            answer = error.answer if isinstance(error, CallRejected) else str(error)
            is_invalid = isinstance(error, CallRejected) and error.status == _BAD_REQUEST
            kind = InvalidRequest if is_invalid else InternalError
            self._refuse(batch, kind(f"{_which(batch)} failed, alone: {answer}"), "error")
        else:
            for half in reversed(in_two(segments)):
                queue.push_half(half)

    def try_suspect(self, now_s: float) -> None:
        """Send the next suspect, once the endpoint for it is empty; let go of the endpoint after the last one."""
        while self.suspects or self._endpoint is not None:
            self.suspects = deque(each for each in self.suspects if not each.segment.ticket.done)
            if any(batch.alone for batch in self._in_flight):
                return
            places = ((suspect, self._place(suspect, now_s)) for suspect in self.suspects)
            suspect, endpoint = next(((each, place) for each, place in places if place is not None), (None, None))
            self._reserve(endpoint, now_s)
            if suspect is None or endpoint is None:
                return
            waits = endpoint.in_flight > 0 and now_s < self._reserved_s + _EMPTY_WITHIN_S
            if waits or endpoint.in_flight > endpoint.slots:
                return
            self.suspects.remove(suspect)
            self._try(suspect, endpoint, now_s)

    def _not_begun(
        self, queue: FamilyQueue, segments: list[Segment], batch: Batch, error: BackendError, now_s: float
    ) -> None:
        if batch.alone:
            self.suspects.appendleft(_suspect(queue, segments[0], now_s))
        elif type(error) is BatchNotTaken and self._opinions.ask(batch, segments, begun=False):
            for segment in segments:
                segment.retried = True
        else:
            self._retry(queue, segments, batch, error)

    def _retry(self, queue: FamilyQueue, segments: list[Segment], batch: Batch, error: BackendError) -> None:
        again = segments
        if not isinstance(error, NoConnection):
            again = [segment for segment in segments if not segment.retried]
            for segment in segments:
                if segment.retried:
                    why = f"endpoint '{batch.endpoint.name}' took no batch: {error}; try again"
                    segment.ticket.fail(Unavailable(why))
                segment.retried = True
        if again:
            self._metrics.retried(batch.model.name, sum(segment.rows for segment in again))
            if batch.apart:
                queue.push_half(again)
            else:
                for segment in again:
                    queue.add(segment)

    def _suspect(self, queue: FamilyQueue, segments: list[Segment], now_s: float) -> None:
        rows = sum(segment.rows for segment in segments)
        self._metrics.suspects(queue.model.name, rows)
        for segment in segments:
            self.suspects.extend(_suspect(queue, segment.split(1), now_s) for _ in range(segment.rows - 1))
            self.suspects.append(_suspect(queue, segment, now_s))

    def _refuse(self, batch: Batch, error: InternalError | InvalidRequest, failure: str) -> None:
        _log.warning("%s", error)
        self._metrics.poison(batch.model.name, failure)
        batch.segments[0].ticket.fail(error)

    def _place(self, suspect: Suspect, now_s: float) -> EndpointState | None:
        """The endpoint where a suspect can be tried: where others were before it, or the one with least to do."""
        hosts = [endpoint for endpoint in self._endpoints if endpoint.hosts(suspect.queue.model)]
        if len(hosts) == 1 and now_s < suspect.patient_until_s:
            names = {model.name for model in suspect.queue.occupied}
            if any(not endpoint.up or names & endpoint.dead for endpoint in self._endpoints):
                return None
        if self._endpoint in hosts:
            return self._endpoint
        return min(hosts, key=lambda endpoint: endpoint.work_s, default=None)

    def _reserve(self, endpoint: EndpointState | None, now_s: float) -> None:
        if endpoint is self._endpoint:
            return
        if self._endpoint is not None:
            self._endpoint.reserved = False
        if endpoint is not None:
            endpoint.reserved = True
        self._endpoint = endpoint
        self._reserved_s = now_s

    def _try(self, suspect: Suspect, endpoint: EndpointState, now_s: float) -> None:
        queue, segment = suspect.queue, suspect.segment
        busy_s = queue.family.plan.models[queue.model.name].batch_busy_s(segment.ticket.work_per_row, endpoint.name)
        if not in_time(
            queue.family.admission, segment.ticket.deadline_s, now_s, endpoint.work_s / endpoint.slots, busy_s
        ):
            give_up(segment, "the answer would have come too late after its endpoint went away")
            return
        alone = endpoint.in_flight == 0
        self._depart(
            Batch(
                queue.model, queue.family, endpoint, [segment], 1, busy_s, endpoint.generation, apart=True, alone=alone
            )
        )


def _suspect(queue: FamilyQueue, segment: Segment, now_s: float) -> Suspect:
    return Suspect(queue, segment, (now_s + segment.ticket.deadline_s) / 2)


def _which(batch: Batch) -> str:
    """The model, and the row of the request that a batch of one row is."""
    indices = batch.segments[0].indices
    return f"model '{batch.model.name}': row {0 if indices is None else int(indices[0])} of the request"
