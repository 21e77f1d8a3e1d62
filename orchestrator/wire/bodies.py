"""The bodies of requests that aiohttp has, read within the limits of each and of all."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp import web

from cascadeserve.errors import InvalidRequest, RequestTooLarge, Unavailable
from orchestrator.wire.compression import Unfolder
from orchestrator.wire.slow_clients import STEP_BYTES, steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.web_protocol import RequestHandler

    from orchestrator.wire.limits import Limits


class _Arriving:
    """A body that is not all there."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.is_refused = False
        self.timeout: asyncio.Timeout


class Bodies:
    """Counts what has arrived, not what is announced: that costs its client nothing."""

    def __init__(
        self, max_body_bytes: int, limits: Limits, default_deadline_s: Callable[[str, str], float | None]
    ) -> None:
        """`max_body_bytes` bounds each as sent and as it unfolds.

        `default_deadline_s` says of a model and its version how long its answers are worth waiting for.
        """
        self._default_deadline_s = default_deadline_s
        self._max_body_bytes = max_body_bytes
        self._limits = limits
        self._unfolder = Unfolder()
        # bytes of all that are arriving or wait to be unfolded
        self._held_bytes = 0
        # by connection: each reads one at a time
        self.arriving: dict[RequestHandler, _Arriving] = {}

    async def read(self, request: web.Request) -> tuple[bytes, float]:
        """Read a whole body, decompressed; with it, the seconds for which it has waited for that.

        Raises:
            Unavailable: all together are too large, and this one is the largest.
            Overloaded: too much waits to be decompressed.

        """
        if (request.content_length or 0) > self._max_body_bytes:
            # Refused unread: this is what the limit is for.
            raise self._too_large()
        mine = _Arriving()
        self.arriving[request.protocol] = mine
        try:
            try:
                body = await self._arrived(request, mine)
            finally:
                del self.arriving[request.protocol]
            encoding = request.headers.get("Content-Encoding", "").strip().lower()
            asked = request.match_info
            deadline_s = self._default_deadline_s(asked.get("model", ""), asked.get("version", ""))
            return await self._unfolder.unfold(body, encoding, self._max_body_bytes, deadline_s)
        finally:
            self._held_bytes -= mine.num_bytes

    async def _arrived(self, request: web.Request, mine: _Arriving) -> bytes:
        timeout_s = self._limits.client_timeout_s
        loop = asyncio.get_running_loop()
        parts = []
        try:
            async with asyncio.timeout(timeout_s) as mine.timeout:
                while not mine.is_refused and (part := await request.content.readany()):
                    parts.append(part)
                    # what is there already is read on without a look at the clock
                    if steps(mine.num_bytes + len(part)) > steps(mine.num_bytes) and not mine.timeout.expired():
                        mine.timeout.reschedule(loop.time() + timeout_s)
                    mine.num_bytes += len(part)
                    self._held_bytes += len(part)
                    if mine.num_bytes > self._max_body_bytes:
                        raise self._too_large()
                    self._keep_limit()
        except TimeoutError:
            if not mine.is_refused:
                reason = f"neither the rest of the request body nor {STEP_BYTES} bytes of it arrived in {timeout_s:g} s"
                raise web.HTTPRequestTimeout(reason=reason) from None
        except web.RequestPayloadError:
            raise InvalidRequest("the request body cannot be read; it is broken or cut short") from None
        if mine.is_refused:
            raise Unavailable("too much is being received from all clients; try again shortly")
        return b"".join(parts)

    def _keep_limit(self) -> None:
        """Refuse the largest while all together are too large."""
        while self._held_bytes > max(self._limits.max_received_bytes, self._max_body_bytes):
            largest = max(self.arriving.values(), key=lambda each: each.num_bytes)
            if not largest.num_bytes:
                break
            largest.is_refused = True
            # one whose time is over ends by itself
            if not largest.timeout.expired():
                largest.timeout.reschedule(0.0)
            self._held_bytes -= largest.num_bytes
            largest.num_bytes = 0

    def _too_large(self) -> RequestTooLarge:
        limit = self._max_body_bytes
        return RequestTooLarge(f"the request body is larger than the limit of {limit} bytes; send fewer rows")
