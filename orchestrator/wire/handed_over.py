"""The connections that aiohttp has: what is under way on them, and which of them makes room for others."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from orchestrator.wire.slow_clients import steps
from orchestrator.wire.unread import transport_below, unread_bytes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Iterator

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# for what is left of a request that was answered before it was there
_LINGERING_S = 10.0


def _is_no_bad_request(record: logging.LogRecord) -> bool:
    return record.exc_info is None or not isinstance(record.exc_info[1], HttpProcessingError)


# aiohttp would write a traceback per request that it cannot parse. Its client is told what is wrong with it.
LOG = logging.getLogger(f"{__name__}.aiohttp")
LOG.addFilter(_is_no_bad_request)


class Connection(web.RequestHandler):
    """One of them, and what its client owes."""

    __slots__ = ("_has_begun", "_wire", "num_requests")

    _wire: asyncio.Transport

    def __init__(self, server: web.Server, timeout_s: float) -> None:
        """Made for a client that has begun a request: the one that is not plain."""
        no_log = cast("logging.Logger", None)
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=no_log,
            auto_decompress=False,
            lingering_time=min(_LINGERING_S, timeout_s),
            logger=LOG,
        )
        self.num_requests = 0
        # something came while a request was waited for, and its head is not there
        self._has_begun = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what tells how much is not read."""
        mine = cast("asyncio.Transport", transport)
        self._wire = transport_below(mine) or mine
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Note whether it is only the beginning of a request."""
        super().data_received(data)
        # aiohttp itself calls this with nothing
        if data and self._waits:
            self._has_begun = True

    def note_request(self) -> None:
        """Count a request of which the head is there."""
        self.num_requests += 1
        self._has_begun = False

    @property
    def _waits(self) -> bool:
        """Whether no request is under way, nor one there that begins in the next turn of the event loop."""
        return self._waiter is not None and not self._waiter.done()

    @property
    def _writes(self) -> bool:
        return self._wire.get_write_buffer_size() > 0

    @property
    def makes_room(self) -> bool:
        """Whether its client loses least: it waits for nothing, and has sent a part of a head at most."""
        return self._waits and not self._writes

    @property
    def owes(self) -> bool:
        """Whether its client must do something: send the rest of a head or read an answer; `Bodies` times the rest."""
        return self._writes or (self._waits and self._has_begun)

    @property
    def progress(self) -> tuple[int, int]:
        """Changes with each request, and with each step of an answer that is read."""
        return self.num_requests, steps(self.unread_bytes) if self._writes else 0

    @property
    def unread_bytes(self) -> int:
        """What its client has not read yet of its answers."""
        return unread_bytes(self.transport or self._wire)

    @property
    def is_closing(self) -> bool:
        """Whether it is there for a moment longer only."""
        return self._wire.is_closing()

    def abort(self) -> None:
        """Cut it off, with what was not read yet."""
        self._wire.abort()


class HandedOver:
    """They are asked about now and then: aiohttp does not say when one of them comes or goes."""

    def __init__(self, runner: web.AppRunner, arriving: Container[web.RequestHandler], timeout_s: float) -> None:
        """Those of a runner; a request whose connection is in `arriving` is not there yet."""
        self._runner = runner
        self._arriving = arriving
        self._timeout_s = timeout_s

    def __iter__(self) -> Iterator[Connection]:
        """The oldest first."""
        return iter([] if self._runner.server is None else cast("list[Connection]", self._runner.server.connections))

    def __len__(self) -> int:
        """How many."""
        return 0 if self._runner.server is None else len(self._runner.server.connections)

    def new_connection(self) -> Connection:
        """Make the protocol of another one."""
        if self._runner.server is None:
            raise RuntimeError("not started")
        return Connection(self._runner.server, self._timeout_s)

    def cut_idle(self) -> bool:
        """Cut off the oldest on which nothing is under way, if there is one."""
        return _cut(each for each in self if each.makes_room)

    def cut_arriving(self) -> bool:
        """Cut off the oldest whose request is not there yet, if there is one."""
        return _cut(each for each in self if each in self._arriving)


@web.middleware
async def note(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Note on its connection that a request is there."""
    cast("Connection", request.protocol).note_request()
    return await handler(request)


def _cut(connections: Iterator[Connection]) -> bool:
    for connection in connections:
        if not connection.is_closing:
            connection.abort()
            return True
    return False
