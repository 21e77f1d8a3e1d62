"""Rows that failed at one endpoint are tried at another, which tells whether the rows are bad or the endpoint is.

A row that makes a model fail does so wherever it is tried. So no row, and no number of them, can do what takes a model
out of use at an endpoint: batch after batch fails there with none answered between, and other endpoints answer the same
rows. It is back when it has answered one of those rows.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascadeserve.policy.admission import in_time
from orchestrator.backend import BackendError
from orchestrator.rows import give_up, still_open, work_of
from orchestrator.state import Batch, ErrorRun, KnownRow

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from orchestrator.backend import ModelVersion
    from orchestrator.metrics import Metrics
    from orchestrator.rows import Segment
    from orchestrator.state import EndpointState, FamilyQueue

_log = logging.getLogger(__name__)

# in place of a row, of a model that is not out of use
_IN_USE = KnownRow((), ())


@dataclass(frozen=True, slots=True, eq=False)
class Stray:
    """Rows of a batch that failed, on their way to another endpoint."""

    queue: FamilyQueue
    segments: list[Segment]
    failed_at: EndpointState


class SecondOpinions:
    """Rows that wait for another endpoint, and what follows from its answers."""

    def __init__(
        self, endpoints: Sequence[EndpointState], *, metrics: Metrics, depart: Callable[[Batch], None]
    ) -> None:
        """`depart` sends a batch."""
        self.waiting: deque[Stray] = deque()
        self._endpoints = endpoints
        self._metrics = metrics
        self._depart = depart

    def ask(self, batch: Batch, segments: list[Segment], *, begun: bool = True) -> bool:
        """Note that a batch failed, and have its rows tried elsewhere; returns False where nothing is learnt from it.

        `begun` says that the model had them. Where it answers others, a batch is better halved than tried whole.
        """
        run = batch.endpoint.error_runs.setdefault(batch.model, ErrorRun())
        run.failed += 1
        is_first = begun and batch.rows > 1 and run.failed == 1 and batch.endpoint.hosts(batch.model)
        if batch.failed_at is not None or is_first or not self._others(batch.model, batch.endpoint):
            return False
        self.waiting.append(Stray(batch.family.queues[batch.model.name], segments, batch.endpoint))
        return True

    def answered(self, batch: Batch) -> None:
        """Draw the conclusion from a batch that was answered."""
        model = batch.model
        batch.endpoint.error_runs.pop(model, None)
        if any(each.failing.get(model, _IN_USE) is None for each in self._endpoints):
            self._keep_row(batch)
        wrong = batch.failed_at
        run = None if wrong is None else wrong.error_runs.get(model)
        if wrong is None or run is None:
            return
        run.refuted += 1
        if run.is_broken and model not in wrong.failing and self._others(model, wrong):
            _log.error(
                "endpoint %s: the last %d batches of %s failed there, none was answered, and others answer their rows; "
                "nothing is sent to it until it answers one", wrong.name, run.failed, model,
            )  # fmt: skip
            self._take_out(wrong, model)
            self._keep_row(batch)

    def is_silent(self, endpoint: EndpointState, model: ModelVersion) -> bool:
        """Take a model out of use that hangs there; False if it is nowhere else."""
        if model in endpoint.failing or not self._others(model, endpoint):
            return False
        _log.error("endpoint %s: %s hangs; nothing is sent to it until it answers", endpoint.name, model)
        self._take_out(endpoint, model)
        return True

    def send(self, now_s: float) -> None:
        """Send what waits and has room elsewhere; where no other endpoint is left, the rows wait with all others."""
        strays, self.waiting = self.waiting, deque()
        for stray in strays:
            segments = still_open(stray.segments)
            others = self._others(stray.queue.model, stray.failed_at)
            if segments and not others:
                stray.queue.push_half(segments)
            elif segments:
                free = [each for each in others if each.has_room(stray.queue.occupied)]
                if free:
                    self._send_to(min(free, key=lambda each: each.work_s), stray, segments, now_s)
                else:
                    self.waiting.append(stray)

    async def look_again(self, endpoint: EndpointState, *, timeout_s: float) -> bool:
        """Ask what is out of use there for a row that others answered; returns whether anything is back."""
        before = len(endpoint.failing)
        for model in endpoint.failing.keys() - endpoint.instances.keys():
            self._is_back(endpoint, model)  # unloaded: what is loaded some day is another one
        models = list(endpoint.failing)
        for model, answers in zip(
            models, await asyncio.gather(*(_answers(endpoint, each, timeout_s) for each in models)), strict=True
        ):
            # with no row to ask it, and nowhere else to send rows to, it is tried with the next ones
            if answers or (endpoint.failing[model] is None and not self._others(model, endpoint)):
                _log.info("endpoint %s: %s is in use again", endpoint.name, model)
                self._is_back(endpoint, model)
        return len(endpoint.failing) < before

    def _others(self, model: ModelVersion, endpoint: EndpointState) -> list[EndpointState]:
        return [each for each in self._endpoints if each is not endpoint and each.hosts(model)]

    def _send_to(self, endpoint: EndpointState, stray: Stray, segments: list[Segment], now_s: float) -> None:
        queue = stray.queue
        family, ahead_s = queue.family, endpoint.work_s / endpoint.slots
        busy_s = family.plan.models[queue.model.name].batch_busy_s(work_of(segments), endpoint.name)
        leaving = []
        for segment in segments:
            if in_time(family.admission, segment.ticket.deadline_s, now_s, ahead_s, busy_s):
                leaving.append(segment)
            else:
                give_up(segment, "the answer would have come too late after it failed at another endpoint")
        if leaving:
            rows = sum(segment.rows for segment in leaving)
            self._metrics.retried(queue.model.name, rows)
            self._depart(
                Batch(
                    queue.model, family, endpoint, leaving, rows, busy_s, endpoint.generation,
                    apart=True, failed_at=stray.failed_at,
                )
            )  # fmt: skip

    def _take_out(self, endpoint: EndpointState, model: ModelVersion) -> None:
        endpoint.failing[model] = None
        endpoint.hosted.pop(model, None)
        self._metrics.model_failing(endpoint.name, model.name, failing=True)

    def _keep_row(self, batch: Batch) -> None:
        """Keep a row that was answered, for endpoints where the model has yet to answer one."""
        specs = batch.family.plan.inputs
        row = [batch.segments[0].gather(position)[:1].copy() for position in range(len(specs))]
        for endpoint in self._endpoints:
            if endpoint.failing.get(batch.model, _IN_USE) is None:
                endpoint.failing[batch.model] = KnownRow(specs, row)

    def _is_back(self, endpoint: EndpointState, model: ModelVersion) -> None:
        endpoint.failing.pop(model, None)
        endpoint.error_runs.pop(model, None)
        self._metrics.model_failing(endpoint.name, model.name, failing=False)


async def _answers(endpoint: EndpointState, model: ModelVersion, timeout_s: float) -> bool:
    known = endpoint.failing[model]
    if known is None:
        return False
    try:
        await endpoint.backend.infer(model, known.specs, known.inputs, want_scores=False, timeout_s=timeout_s)
    except BackendError:
        return False
    return True
