"""Just enough of an HTTP/1.1 client to send prepared bytes once and to notice everything that comes back.

aiohttp's client took 250 microseconds of CPU for a request where this takes about 100: too much for a load generator
that shares two cores with what it measures, and for an orchestrator that sends a thousand batches a second. It also
drops unasked second answers silently, and the ledger of a replay counts those.
"""

from __future__ import annotations

import asyncio
import functools
import re
import ssl
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Shorter than any server's own, so that the server does not close a connection just when it is used again.
_KEEP_ALIVE_S = 15.0
_NO_BODY = (204, 304)
_LAST_INFORMATIONAL = 199
_MAX_HEAD_BYTES = 1 << 16
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([0-9]{3})(?: .*)?", re.DOTALL)
_LENGTH = re.compile(rb"[0-9]{1,15}")
_CHUNK_LENGTH = re.compile(rb"[0-9A-Fa-f]{1,15}")


class ConnectionClosed(Exception):  # noqa: N818 - named by what happened
    """The connection ended before the answer was complete."""


class NotHttp(Exception):  # noqa: N818
    """The answer is no HTTP/1.1 response."""


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """A complete response; header names in lower case."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes
    keep_alive: bool


@dataclass(frozen=True, slots=True)
class _Head:
    """What the head of a response says; `body_bytes` is None where it states no length."""

    status: int
    headers: Mapping[bytes, bytes]
    keep_alive: bool
    chunked: bool
    body_bytes: int | None


# A server writes the same head again and again.
@functools.lru_cache(maxsize=512)
def _parse_head(head: bytes) -> _Head:
    first, *lines = head.split(b"\r\n")
    status_line = _STATUS_LINE.fullmatch(first)
    if status_line is None:
        raise NotHttp(f"it begins with {first[:40]!r}")
    headers = {}
    for line in lines:
        name, _, value = line.partition(b":")
        headers[name.strip().lower()] = value.strip()
    minor, status = int(status_line[1]), int(status_line[2])
    length = headers.get(b"content-length", b"0" if status in _NO_BODY else None)
    if length is not None and not _LENGTH.fullmatch(length):
        raise NotHttp(f"its length is {length[:40]!r}")
    return _Head(
        status,
        headers,
        keep_alive=minor == 1 and headers.get(b"connection", b"").lower() != b"close",
        chunked=headers.get(b"transfer-encoding", b"").lower() == b"chunked",
        body_bytes=None if length is None else int(length),
    )


def _join_chunks(data: bytes, place: int) -> tuple[bytes | None, int]:
    """Body of a chunked response and where it ends; or None and how much of `data` there must be at least."""
    parts: list[bytes] = []
    while True:
        line_end = data.find(b"\r\n", place)
        if line_end < 0:
            return None, len(data) + 1
        length = data[place:line_end].partition(b";")[0].strip()
        if not _CHUNK_LENGTH.fullmatch(length):
            raise NotHttp("a chunk has no size")
        size = int(length, 16)
        if size == 0:
            # trailers, if any, end with an empty line
            end = line_end if data[line_end + 2 : line_end + 4] == b"\r\n" else data.find(b"\r\n\r\n", line_end + 2)
            return (None, len(data) + 1) if end < 0 or len(data) < end + 4 else (b"".join(parts), end + 4)
        place = line_end + 2
        if len(data) < place + size + 2:
            return None, place + size + 2
        parts.append(data[place : place + size])
        place += size + 2


def parse_response(data: bytes, *, at_end: bool) -> tuple[HttpAnswer | None, int]:
    """Parse one response and its length in `data`; None while it is incomplete, and the least length to try again at.

    `at_end` says that nothing more will come, which ends a body of unstated length.

    Raises:
        NotHttp: this cannot become a response.

    """
    place = 0
    while True:
        head_end = data.find(b"\r\n\r\n", place, place + _MAX_HEAD_BYTES)
        if head_end < 0:
            if len(data) - place >= _MAX_HEAD_BYTES:
                raise NotHttp(f"it begins with {data[place : place + 40]!r} and its head does not end")
            return None, len(data) + 1
        head = _parse_head(data[place:head_end])
        place = head_end + 4
        if head.status > _LAST_INFORMATIONAL:
            break
    if head.chunked:
        body, end = _join_chunks(data, place)
        return (None if body is None else HttpAnswer(head.status, head.headers, body, head.keep_alive)), end
    if head.body_bytes is None:
        if not at_end:
            return None, len(data) + 1
        return HttpAnswer(head.status, head.headers, data[place:], keep_alive=False), len(data)
    end = place + head.body_bytes
    return (None if len(data) < end else HttpAnswer(head.status, head.headers, data[place:end], head.keep_alive)), end


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, on_unasked: Callable[[], None]) -> None:
        self._on_unasked = on_unasked
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._waiter: asyncio.Future[HttpAnswer] | None = None
        # what was received and not used yet, its length, and the length from which on there is something to do
        self._chunks: list[bytes] = []
        self._size = 0
        self._needed = 1
        self._closed = False
        self.idle_since_s = 0.0
        # not to be used again
        self.retired = False

    @property
    def peer(self) -> tuple[str, int] | None:
        """IP address and port of the other side; None if it was gone as soon as it was there."""
        name = self._transport.get_extra_info("peername")
        return None if name is None else (str(name[0]), int(name[1]))

    @property
    def is_open(self) -> bool:
        """Whether neither side has closed it, as far as is known here."""
        return not self._closed and not self._transport.is_closing()

    @property
    def is_reusable(self) -> bool:
        """Whether another request can be sent; not after an answer that came before all of its request was sent."""
        return self.is_open and not self._transport.get_write_buffer_size()

    async def exchange(self, request: bytes) -> HttpAnswer:
        """Send prepared bytes, exactly once, and return the response.

        Raises:
            ConnectionClosed: no complete response came.
            NotHttp: what came is no response.

        """
        assert self._waiter is None
        if not self.is_open:
            raise ConnectionClosed("closed before the request was sent")
        waiter: asyncio.Future[HttpAnswer] = self._loop.create_future()
        self._waiter = waiter
        self._transport.write(request)
        try:
            return await waiter
        finally:
            self._waiter = None

    def close(self) -> None:
        """Drop the connection with all that is under way."""
        self._closed = True
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (called by asyncio)."""
        # a cast: the transports of other event loops are no subclasses
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Take what came (called by asyncio)."""
        self._chunks.append(data)
        self._size += len(data)
        if self._size >= self._needed:
            self._advance(at_end=False)

    def _advance(self, *, at_end: bool) -> None:
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._keep(data, 1)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            try:
                answer, length = parse_response(data, at_end=at_end)
            except NotHttp as error:
                waiter.set_exception(error)
                self.close()
                return
            if answer is None:
                self._needed = length
                return
            data = data[length:]
            self._keep(data, 1)
            waiter.set_result(answer)
        if data and not self._closed:
            # Nobody waits for these bytes. A proxy may say 408 before it closes an idle connection; a success is a
            # second answer.
            if data.split(b" ", 2)[1:2] == [b"200"]:
                self._on_unasked()
            self.close()

    def _keep(self, data: bytes, needed: int) -> None:
        self._chunks = [data] if data else []
        self._size = len(data)
        self._needed = needed

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits (called by asyncio)."""
        if exc is None and not self._closed:
            self._advance(at_end=True)
        self._closed = True
        if self._waiter is not None and not self._waiter.done():
            what = "incomplete answer" if self._size else "no answer"
            self._waiter.set_exception(ConnectionClosed(f"{type(exc).__name__ if exc else 'closed'}, {what}"))


class ConnectionPool:
    """As many connections to one server as there are requests under way; `unasked` counts second answers."""

    def __init__(self, address: str) -> None:
        """Open nothing yet; `address` is a URL, of which scheme, host and port count."""
        parts = urlsplit(address)
        self.unasked = 0
        self.host_header = parts.netloc
        self._name = parts.hostname or ""
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._named_peer = (self._name, parts.port or (443 if self._ssl else 80))
        self._peer = self._named_peer
        self._idle: deque[Connection] = deque()
        self._all: set[Connection] = set()

    def _count_unasked(self) -> None:
        self.unasked += 1

    async def acquire(self) -> Connection:
        """Take an idle connection, or open one; raises OSError."""
        return self.take_idle() or await self.open()

    def take_idle(self) -> Connection | None:
        """Take the connection that has been idle longest, if it is still good.

        So all are used in turn, and those that a burst will need do not grow stale between two bursts.
        """
        while self._idle:
            connection = self._idle.popleft()
            if connection.is_reusable and asyncio.get_running_loop().time() < connection.idle_since_s + _KEEP_ALIVE_S:
                return connection
            self.drop(connection)
        return None

    async def open(self) -> Connection:
        """Open a connection; raises OSError."""
        loop = asyncio.get_running_loop()
        server_name = self._name if self._ssl else None
        try:
            _, connection = await loop.create_connection(
                lambda: Connection(self._count_unasked), *self._peer, ssl=self._ssl, server_hostname=server_name
            )
        except BaseException:
            # The server may have moved.
            self._peer = self._named_peer
            raise
        # Names are looked up once: a look-up takes a thread and time that is not the server's.
        self._peer = connection.peer or self._named_peer
        self._all.add(connection)
        return connection

    def release(self, connection: Connection) -> None:
        """Give a connection back for the next request."""
        if connection.is_reusable and not connection.retired:
            connection.idle_since_s = asyncio.get_running_loop().time()
            self._idle.append(connection)
        else:
            self.drop(connection)

    def drop(self, connection: Connection) -> None:
        """Close a connection for good."""
        connection.close()
        self._all.discard(connection)

    def retire(self) -> None:
        """Close connections not in use now and the others when they come back; look the server's name up again."""
        self._peer = self._named_peer
        while self._idle:
            self.drop(self._idle.pop())
        for connection in self._all:
            connection.retired = True

    async def close(self) -> None:
        """Close all connections."""
        for connection in tuple(self._all):
            self.drop(connection)
        # asyncio closes the sockets in its next round.
        await asyncio.sleep(0)
