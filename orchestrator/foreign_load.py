"""Notices when somebody else sends requests to a Triton that this orchestrator counts on having for itself.

Slots, gears and deadlines rest on knowing all that a device has to do. Triton counts the requests that wait in its
queues; with slots + 1 batches in flight of ours there can never be more of these than that.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING

from cascadeserve.http_connection import ConnectionClosed, ConnectionPool, NotHttp

if TYPE_CHECKING:
    from orchestrator.metrics import Metrics
    from orchestrator.state import EndpointState

_log = logging.getLogger(__name__)

PERIOD_S = 1.0
TIMEOUT_S = 2.0
# So many looks in a row have to find some: one alone may have fallen between an answer and our reading it.
SURE_LOOKS = 3
_PENDING = re.compile(rb"^nv_inference_pending_request_count\{[^}]*\} (\S+)$", re.MULTILINE)


def pending_requests(text: bytes) -> int:
    """Requests that wait in Triton's queues by its metrics, over all models."""
    return int(sum(float(value) for value in _PENDING.findall(text)))


class ForeignLoad:
    """Looks at the metrics of one endpoint once a second."""

    def __init__(self, endpoint: EndpointState, address: str, metrics: Metrics) -> None:
        """`address` is host:port of the endpoint's metrics."""
        self._endpoint = endpoint
        self._metrics = metrics
        self._pool = ConnectionPool(f"http://{address}")
        self._request = f"GET /metrics HTTP/1.1\r\nHost: {self._pool.host_header}\r\n\r\n".encode()
        self._looks = 0

    async def run(self) -> None:
        """Look forever."""
        while True:
            await asyncio.sleep(PERIOD_S)
            if not self._endpoint.up:
                self.found(0)
                continue
            ours = self._endpoint.in_flight
            text = await self._read()
            if text is not None:
                self.found(pending_requests(text) - max(ours, self._endpoint.in_flight))

    async def close(self) -> None:
        """Close the connection."""
        await self._pool.close()

    def found(self, foreign: int) -> None:
        """Take what a look found: requests that are not ours."""
        name = self._endpoint.name
        was_sure = self._looks >= SURE_LOOKS
        self._looks = self._looks + 1 if foreign > 0 else 0
        is_sure = self._looks >= SURE_LOOKS
        self._metrics.foreign_load(name, foreign if is_sure else 0)
        if is_sure and not was_sure:
            _log.warning(
                "endpoint %s: %d requests wait there that are not of this orchestrator; whoever sends them takes time "
                "that the plan counts on", name, foreign,
            )  # fmt: skip
        elif was_sure and not is_sure:
            _log.info("endpoint %s: no requests of others wait there any more", name)

    async def _read(self) -> bytes | None:
        connection = None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                connection = await self._pool.acquire()
                answer = await connection.exchange(self._request)
        except (OSError, TimeoutError, ConnectionClosed, NotHttp):
            # whether the endpoint is there is its monitor's business; its metrics may be closed to us
            if connection is not None:
                self._pool.drop(connection)
            return None
        (self._pool.release if answer.keep_alive else self._pool.drop)(connection)
        return answer.body
