"""HTTP/1.1 as inference clients speak it, at a third of what aiohttp's server takes per request.

A plain request is one with a known path, a stated length and nothing special about it: no chunks, no compression, no
`Expect`, no escapes in its path. It is answered here. At the first request of another kind its connection goes to
aiohttp, with all that was received, and stays there: what is rare or wrong is judged by a complete implementation, and
nothing here has to guess how long a body is.
"""

from __future__ import annotations

import asyncio
import re
import socket
from datetime import UTC, datetime
from email.utils import format_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

from orchestrator.wire.endpoints import answer_to
from orchestrator.wire.exchange import Answer, Call, Route
from orchestrator.wire.open_connections import OpenConnections
from orchestrator.wire.plain_heads import Heads
from orchestrator.wire.slow_clients import steps
from orchestrator.wire.unread import transport_below, unread_bytes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# aiohttp's limit of a line; a longer head is for it to refuse
_MAX_HEAD_BYTES = 8190
# what a client may have sent ahead while its request is under way before it is made to wait
_MAX_AHEAD_BYTES = 1 << 18
# What comes in smaller pieces is put together: a piece alone takes some 50 bytes more than it holds.
_MIN_CHUNK_BYTES = 1 << 10
# A connection is closed after once to twice this long without a byte.
_IDLE_S = 3600.0

# What a plain head may begin with. With anything else (TLS, lines without CR) no end of a head may ever come.
_BEGINNING = re.compile(rb"[GP][\t\x20-\x7e]*(?:\r\n[\t\x20-\x7e]*)*\r?")
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}


class PlainHttp:
    """Its connections, and what they have in common."""

    def __init__(
        self,
        table: list[Route],
        *,
        max_body_bytes: int,
        closing: Callable[[], bool],
        hand_over: Callable[[], asyncio.Protocol],
    ) -> None:
        """While `closing()`, an answer is its connection's last; `hand_over` makes a protocol for other requests."""
        self.closing = closing
        self.hand_over = hand_over
        self.connections: OpenConnections[_Connection] = OpenConnections()
        self.is_closed = False
        self.read_head = Heads(table, max_body_bytes).read
        self._date_s = -1
        self._date = ""

    def new_connection(self) -> asyncio.Protocol:
        """Make the protocol of a new connection."""
        return _Connection(self)

    async def close(self, timeout_s: float) -> None:
        """Close idle connections, wait for the answers under way, and cancel what is left after `timeout_s`."""
        # Also without a word from outside: a connection made or handed over from now on would be closed by nobody.
        self.closing = lambda: True
        self.is_closed = True
        tasks = [task for connection in tuple(self.connections) if (task := connection.close_when_idle()) is not None]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=timeout_s)
            for connection in tuple(self.connections):
                connection.end()
            await asyncio.gather(*late, return_exceptions=True)

    def render(self, answer: Answer, *, last: bool, now_s: float) -> bytes:
        """Write a response as bytes; `last` tells the client that its connection will be closed."""
        if now_s >= self._date_s + 1:
            self._date_s = int(now_s)
            self._date = f"Date: {format_datetime(datetime.now(UTC), usegmt=True)}\r\n"
        headers = "".join([f"{name}: {value}\r\n" for name, value in answer.headers.items()])
        close = "Connection: close\r\n" if last else ""
        head = f"{_STATUS_LINES[answer.status]}{headers}Content-Length: {len(answer.body)}\r\n{self._date}{close}\r\n"
        return head.encode() + answer.body


class _Connection(asyncio.Protocol):
    """One client's connection: one request at a time, in order."""

    __slots__ = (
        "_admitted", "_below", "_chunks", "_drained", "_idle_check", "_loop", "_needed", "_reading_paused", "_server",
        "_size", "_skip", "_task", "_transport", "_used", "num_requests",
    )  # fmt: skip

    def __init__(self, server: PlainHttp) -> None:
        self._server = server
        self.num_requests = 0
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        # with TLS
        self._below: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        # what was received and not used yet, its length, and the length from which on there is something to do
        self._chunks: list[bytes] = []
        self._size = 0
        self._needed = 1
        # what the gate said to the request of which the head is there, once it was asked; and bytes to come of one that
        # was refused
        self._admitted: bool | None = None
        self._skip = 0
        self._used = True
        self._reading_paused = False
        # while the client does not read its answer
        self._drained: asyncio.Future[None] | None = None

    # -- called by asyncio --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        # a cast: the transports of other event loops are no subclasses
        self._transport = cast("asyncio.Transport", transport)
        self._below = transport_below(self._transport)
        if (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._idle_check = self._loop.call_later(_IDLE_S, self._check_idle)
        self._server.connections.add(self)
        if self._server.is_closed:
            transport.close()

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        self._used = True
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
            if not data:
                return
        if self._chunks and len(self._chunks[-1]) < _MIN_CHUNK_BYTES:
            self._chunks[-1] += data
        else:
            self._chunks.append(data)
        self._size += len(data)
        if self._task is None:
            if self._size >= self._needed:
                self._take_next()
        elif self._size > _MAX_AHEAD_BYTES and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        """Let the answer under way wait for the client, which does not read."""
        self._drained = self._loop.create_future()

    def resume_writing(self) -> None:
        """Let it end."""
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    def connection_lost(self, _error: Exception | None) -> None:
        """Cancel the request under way: nobody waits for its answer."""
        self._leave()
        if self._task is not None:
            self._task.cancel()

    # -- called by the server -----------------------------------------------------------------------------------

    def close_when_idle(self) -> asyncio.Task[None] | None:
        """Close now if nothing is under way, else return what is; its answer will be the last."""
        if self._task is None:
            self._transport.close()
        return self._task

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way; the beginning of one may be there."""
        return self._task is None

    @property
    def owes(self) -> bool:
        """Whether its client must do something: send the rest of a request or read an answer."""
        return self._must_read or (self._task is None and self._size + self._skip > 0)

    @property
    def _must_read(self) -> bool:
        return self._drained is not None or (self._below is not None and self._below.get_write_buffer_size() > 0)

    @property
    def progress(self) -> tuple[int, int]:
        """Changes with each request, and with each step of what its client owes."""
        return self.num_requests, steps(self.unread_bytes if self._must_read else self._size - self._skip)

    @property
    def unread_bytes(self) -> int:
        """What its client has not read yet of its answers."""
        return unread_bytes(self._transport)

    @property
    def received_bytes(self) -> int:
        """What it holds of requests that are not under way."""
        return self._size

    def abort(self) -> None:
        """Cut it off, with what was not read yet."""
        self._transport.abort()

    def end(self) -> None:
        """Close, and cancel what is under way."""
        if self._task is not None:
            self._task.cancel()
        self._transport.close()

    # -- one request after the other ----------------------------------------------------------------------------

    def _take_next(self) -> None:
        """Begin the next request if all of it is there; refuse it as soon as its JSON is, if it must wait too long."""
        if not self._size or self._transport.is_closing():
            return
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        head_end = data.find(b"\r\n\r\n", 0, _MAX_HEAD_BYTES)
        head = None if head_end < 0 else self._server.read_head(data[:head_end])
        if head is None:
            if head_end >= 0 or len(data) >= _MAX_HEAD_BYTES or not _BEGINNING.fullmatch(data):
                self._hand_over(data)
            else:
                self._await(data, len(data) + 1)
            return
        body_start = head_end + 4
        body_end = body_start + head.body_bytes
        # a connection that is about to be closed would be closed on a client that is still sending
        if self._admitted is None and head.gate is not None and not self._server.closing():
            peek_end = body_start + head.peek_bytes
            if len(data) < peek_end:
                self._await(data, peek_end)
                return
            try:
                self._admitted = head.gate(head.model, head.version, data[body_start:peek_end])
            except Exception as error:  # noqa: BLE001 - logged there
                self._refuse(answer_to(error), data, body_end)
                return
        if len(data) < body_end:
            self._await(data, body_end)
            return
        admitted, self._admitted = self._admitted is not False, None
        self._keep(data[body_end:], 1)
        body = data[body_start:body_end]
        self._count_request()
        call = Call(head.model, head.version, head.header_length, body, head.accept_encoding, admitted)
        self._task = self._loop.create_task(self._answer(head.handler, call))

    def _count_request(self) -> None:
        if not self.num_requests:
            self._server.connections.asked(self)
        self.num_requests += 1

    def _await(self, data: bytes, needed: int) -> None:
        """Wait for more of a request."""
        if not self.num_requests:
            self._server.connections.begun(self)
        self._keep(data, needed)

    def _keep(self, data: bytes, needed: int) -> None:
        self._chunks = [data] if data else []
        self._size = len(data)
        self._needed = needed

    def _refuse(self, answer: Answer, data: bytes, body_end: int) -> None:
        """Answer without a task of its own, and without the body, which is thrown away as it comes."""
        self._count_request()
        self._skip = max(body_end - len(data), 0)
        self._keep(data[body_end:], 1)
        self._transport.write(self._server.render(answer, last=False, now_s=self._loop.time()))
        # A task only for a client that does not read, or has sent ahead: it is the one made to wait by what follows.
        if self._drained is not None or self._size:
            self._task = self._loop.create_task(self._written(last=False))

    async def _answer(self, handler: Callable[[Call], Awaitable[Answer]], call: Call) -> None:
        try:
            try:
                answer = await handler(call)
            except Exception as error:  # noqa: BLE001 - logged there
                answer = answer_to(error)
            if self._transport.is_closing():
                return  # the client hung up a moment ago
            last = self._server.closing()
            self._transport.write(self._server.render(answer, last=last, now_s=self._loop.time()))
            await self._written(last=last)
        except BaseException:
            # Cancelled, or a bug: no answer will come, and its client must not wait for one.
            self._transport.close()
            raise

    async def _written(self, *, last: bool) -> None:
        """Wait until the client reads its answer, then go on with what it has sent meanwhile."""
        if self._drained is not None:
            await self._drained
        self._task = None
        if last:
            self._transport.close()
            return
        if self._reading_paused:
            self._reading_paused = False
            self._transport.resume_reading()
        self._take_next()

    def _hand_over(self, data: bytes) -> None:
        """Let another protocol have the connection, from the first byte not used yet."""
        if self._server.is_closed:
            self._transport.close()
            return
        self._leave()
        other = self._server.hand_over()
        self._transport.set_protocol(other)
        other.connection_made(self._transport)
        other.data_received(data)

    def _leave(self) -> None:
        self._idle_check.cancel()
        self._server.connections.leave(self)

    def _check_idle(self) -> None:
        if self._task is None and not self._used:
            self._transport.close()
            return
        self._used = False
        self._idle_check = self._loop.call_later(_IDLE_S, self._check_idle)
