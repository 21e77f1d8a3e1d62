"""The open loop: every request leaves at its scheduled time, whatever became of those before it."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascadeserve.replay.client import GRACE_S, Outcome, Reply
from cascadeserve.replay.ledger import Records
from cascadeserve.virtual_machine import stolen_s

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cascadeserve.replay.client import Sender
    from cascadeserve.replay.rows import RequestRows

# Time between the start of the loop and time 0 of the schedule, so that the first arrivals are not late by its set-up.
_LEAD_S = 0.05
# Such a request counts as lost, and the lag of the generator makes the run void.
_TOO_LATE = "the generator itself was later than the deadline"


@dataclass(frozen=True)
class Load:
    """What is sent when: `scheduled_s` increasing [requests], and the rows of each request.

    `timeout_s` is every request's deadline, from its scheduled time.
    """

    scheduled_s: NDArray[np.float64]
    rows: RequestRows
    timeout_s: float


class OpenLoop:
    """One run of a load; `records` fill up while it goes on."""

    def __init__(self, load: Load, sender: Sender) -> None:
        self.records = Records(load.scheduled_s, load.rows)
        self._load = load
        self._sender = sender
        # Ids of two runs against one server never meet.
        self._run_id = secrets.token_hex(4)
        self._in_flight: set[asyncio.Task[None]] = set()
        self._pacer: asyncio.Task[None] | None = None

    async def run(self) -> Records:
        """Send everything and wait until the end of every request is known."""
        self._start_s = asyncio.get_running_loop().time() + _LEAD_S
        self.records.start_s = self._start_s
        cpu_before_s, stolen_before_s, began_s = time.process_time(), stolen_s(), time.monotonic()
        async with asyncio.TaskGroup() as group:
            self._pacer = group.create_task(self._pace(group), name="replay pacer")
        self.records.cpu_s = time.process_time() - cpu_before_s
        if stolen_before_s is not None and (stolen_after_s := stolen_s()) is not None:
            passed_s = (time.monotonic() - began_s) * (os.cpu_count() or 1)
            self.records.stolen_frac = (stolen_after_s - stolen_before_s) / max(passed_s, 1e-9)
        self.records.add_unasked(self._sender.unasked)
        return self.records

    def interrupt(self) -> None:
        """Send nothing more and wait for what is in flight; when called again, abandon that too.

        Abandoned requests do not count as sent.
        """
        if self._pacer is not None and not self._pacer.done():
            self._pacer.cancel()
            return
        for task in self._in_flight:
            task.cancel()

    async def _pace(self, group: asyncio.TaskGroup) -> None:
        clock = asyncio.get_running_loop().time
        scheduled_s = self._load.scheduled_s.tolist()
        rows = self._load.rows.row_index.tolist()
        offset = self._load.rows.offset.tolist()
        index, count = 0, len(scheduled_s)
        while index < count:
            # Also when late: the requests made last time must get their turn to be written.
            await asyncio.sleep(max(self._start_s + scheduled_s[index] - clock(), 0.0))
            now_s = clock() - self._start_s
            while index < count and scheduled_s[index] <= now_s:
                task = group.create_task(
                    self._send(index, rows[offset[index] : offset[index + 1]]), name="replay request"
                )
                self._in_flight.add(task)
                task.add_done_callback(self._in_flight.discard)
                self.records.live.sent += 1
                index += 1

    async def _send(self, index: int, rows: list[int]) -> None:
        sent_s = asyncio.get_running_loop().time()
        until_s = self._start_s + float(self._load.scheduled_s[index]) + self._load.timeout_s + GRACE_S
        request_id = f"{self._run_id}-{index:08d}"
        if sent_s >= until_s:
            self.records.store(index, sent_s - self._start_s, Reply(Outcome.LOST, sent_s - self._start_s, _TOO_LATE))
            return
        reply = await self._sender.send(request_id, rows, until_s)
        # Errors are counted by their text, and Triton puts the id into it.
        reply.error = reply.error.replace(request_id, "<id>")
        reply.done_s -= self._start_s
        self.records.store(index, sent_s - self._start_s, reply)
