"""Just enough of an HTTP/1.1 client to send prepared bytes once and to notice everything that comes back.

aiohttp's client took 250 microseconds of CPU for a request where this takes about 100, too much for a generator that
shares two cores with what it measures: in a backlog it opened connections faster than it could use them. It also drops
unasked second answers silently, and the ledger counts those.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable

# Shorter than any server's own, so that the server does not close a connection just when it is used again.
_KEEP_ALIVE_S = 15.0
_NO_BODY = (204, 304)
_LAST_INFORMATIONAL = 199


class ConnectionClosed(Exception):  # noqa: N818 - named by what happened
    """The connection ended before the answer was complete."""


class NotHttp(Exception):  # noqa: N818
    """The answer is no HTTP/1.1 response."""


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """A complete response; header names in lower case."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    keep_alive: bool


def _parse_head(head: bytes) -> tuple[int, dict[bytes, bytes], bool]:
    first, *lines = head.split(b"\r\n")
    version, _, rest = first.partition(b" ")
    if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
        raise NotHttp(f"it begins with {first[:40]!r}")
    headers = {}
    for line in lines:
        name, _, value = line.partition(b":")
        headers[name.strip().lower()] = value.strip()
    keep_alive = version == b"HTTP/1.1" and headers.get(b"connection", b"").lower() != b"close"
    return int(rest[:3]), headers, keep_alive


def _join_chunks(data: bytes) -> tuple[bytes, int] | None:
    """Body of a chunked response and its length on the wire; None while incomplete."""
    parts: list[bytes] = []
    place = 0
    while True:
        line_end = data.find(b"\r\n", place)
        if line_end < 0:
            return None
        try:
            size = int(data[place:line_end].partition(b";")[0], 16)
        except ValueError as error:
            raise NotHttp("a chunk has no size") from error
        if size == 0:
            # trailers, if any, end with an empty line
            end = line_end if data[line_end + 2 : line_end + 4] == b"\r\n" else data.find(b"\r\n\r\n", line_end + 2)
            return None if end < 0 or len(data) < end + 4 else (b"".join(parts), end + 4)
        place = line_end + 2
        if len(data) < place + size + 2:
            return None
        parts.append(data[place : place + size])
        place += size + 2


def parse_response(data: bytes, *, at_end: bool) -> tuple[HttpAnswer, int] | None:
    """Parse one response and its length in `data`; None while it is incomplete.

    `at_end` says that nothing more will come, which ends a body of unstated length.

    Raises:
        NotHttp: this cannot become a response.

    """
    place = 0
    while True:
        head_end = data.find(b"\r\n\r\n", place)
        if head_end < 0:
            return None
        status, headers, keep_alive = _parse_head(data[place:head_end])
        place = head_end + 4
        if status > _LAST_INFORMATIONAL:
            break
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        joined = _join_chunks(data[place:])
        return None if joined is None else (HttpAnswer(status, headers, joined[0], keep_alive), place + joined[1])
    stated = headers.get(b"content-length", b"0" if status in _NO_BODY else None)
    if stated is None:
        return (HttpAnswer(status, headers, data[place:], keep_alive=False), len(data)) if at_end else None
    if not stated.isdigit():
        raise NotHttp(f"its length is {stated!r}")
    end = place + int(stated)
    return None if len(data) < end else (HttpAnswer(status, headers, data[place:end], keep_alive), end)


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, on_unasked: Callable[[], None]) -> None:
        self._on_unasked = on_unasked
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[HttpAnswer] | None = None
        self._received = b""
        self.closed = False
        self.idle_since_s = 0.0

    @property
    def peer(self) -> tuple[str, int]:
        """IP address and port of the other side."""
        assert self._transport is not None
        host, port = self._transport.get_extra_info("peername")[:2]
        return str(host), int(port)

    async def exchange(self, request: bytes) -> HttpAnswer:
        """Send prepared bytes, exactly once, and return the response.

        Raises:
            ConnectionClosed: no complete response came.
            NotHttp: what came is no response.

        """
        assert self._transport is not None
        assert self._waiter is None
        if self.closed:
            raise ConnectionClosed("closed before the request was sent")
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._waiter
        finally:
            self._waiter = None

    def close(self) -> None:
        """Drop the connection with all that is under way."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (called by asyncio)."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Take what came (called by asyncio)."""
        self._received = self._received + data if self._received else data
        self._advance(at_end=False)

    def _advance(self, *, at_end: bool) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            try:
                parsed = parse_response(self._received, at_end=at_end)
            except NotHttp as error:
                waiter.set_exception(error)
                self.close()
                return
            if parsed is None:
                return
            answer, length = parsed
            self._received = self._received[length:]
            waiter.set_result(answer)
        if self._received and not self.closed:
            # Nobody waits for these bytes. A proxy may say 408 before it closes an idle connection; a success is a
            # second answer.
            if self._received.split(b" ", 2)[1:2] == [b"200"]:
                self._on_unasked()
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits (called by asyncio)."""
        if exc is None and not self.closed:
            self._advance(at_end=True)
        self.closed = True
        if self._waiter is not None and not self._waiter.done():
            what = "incomplete answer" if self._received else "no answer"
            self._waiter.set_exception(ConnectionClosed(f"{type(exc).__name__ if exc else 'closed'}, {what}"))


class ConnectionPool:
    """As many connections to one server as there are requests under way; `unasked` counts second answers."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self.unasked = 0
        self.host_header = parts.netloc
        self._name = parts.hostname or ""
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._peer = (self._name, parts.port or (443 if self._ssl else 80))
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()

    def _count_unasked(self) -> None:
        self.unasked += 1

    async def acquire(self) -> Connection:
        """Take the connection used last, or open one; raises OSError."""
        loop = asyncio.get_running_loop()
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and loop.time() - connection.idle_since_s < _KEEP_ALIVE_S:
                return connection
            self.drop(connection)
        server_name = self._name if self._ssl else None
        _, connection = await loop.create_connection(
            lambda: Connection(self._count_unasked), *self._peer, ssl=self._ssl, server_hostname=server_name
        )
        # Names are looked up once: a look-up takes a thread and time that is not the server's.
        self._peer = connection.peer
        self._all.add(connection)
        return connection

    def release(self, connection: Connection) -> None:
        """Give a connection back for the next request."""
        connection.idle_since_s = asyncio.get_running_loop().time()
        self._idle.append(connection)

    def drop(self, connection: Connection) -> None:
        """Close a connection for good."""
        connection.close()
        self._all.discard(connection)

    async def close(self) -> None:
        """Close all connections."""
        for connection in tuple(self._all):
            self.drop(connection)
        # asyncio closes the sockets in its next round.
        await asyncio.sleep(0)
