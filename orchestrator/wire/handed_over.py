"""The connections that aiohttp has: what is under way on them, and which of them makes room for others."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from orchestrator.wire.slow_clients import SlowClients

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Iterator

    from aiohttp.web_protocol import RequestHandler

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _is_no_bad_request(record: logging.LogRecord) -> bool:
    return record.exc_info is None or not isinstance(record.exc_info[1], HttpProcessingError)


# aiohttp would write a traceback per request that it cannot parse. Its client is told what is wrong with it.
LOG = logging.getLogger(f"{__name__}.aiohttp")
LOG.addFilter(_is_no_bad_request)


class HandedOver:
    """They are asked about now and then: aiohttp does not say when one of them comes or goes."""

    def __init__(self, runner: web.AppRunner, arriving: Container[RequestHandler], timeout_s: float) -> None:
        """Those of a runner; a request whose connection is in `arriving` is not there yet."""
        self._runner = runner
        self._arriving = arriving
        # how many requests each made, and those that one is under way on
        self._num_requests: dict[RequestHandler, int] = {}
        self._under_way: set[RequestHandler] = set()
        self._slow: SlowClients[RequestHandler] = SlowClients(timeout_s)

    def __iter__(self) -> Iterator[RequestHandler]:
        """The oldest first."""
        return iter([] if self._runner.server is None else self._runner.server.connections)

    def __len__(self) -> int:
        """How many."""
        return 0 if self._runner.server is None else len(self._runner.server.connections)

    def new_connection(self) -> RequestHandler:
        """Make the protocol of another one."""
        if self._runner.server is None:
            raise RuntimeError("not started")
        return self._runner.server()

    @web.middleware
    async def note(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Handle a request, and note that it is under way."""
        connection = request.protocol
        self._under_way.add(connection)
        self._num_requests[connection] = self._num_requests.get(connection, 0) + 1
        try:
            return await handler(request)
        finally:
            self._under_way.discard(connection)

    def cut_idle(self) -> bool:
        """Cut off the oldest on which nothing is under way, if there is one."""
        return _cut(each for each in self if each not in self._under_way and not _writes(each))

    def cut_arriving(self) -> bool:
        """Cut off the oldest whose request is not there yet, if there is one."""
        return _cut(each for each in self if each in self._arriving)

    def cut_overdue(self, now_s: float) -> None:
        """Cut off those whose clients owe something for too long.

        What aiohttp waits for it does not say: it may also be the next request.
        """
        self._num_requests = {each: self._num_requests.get(each, 0) for each in self}
        waiting = [(each, number) for each, number in self._num_requests.items() if each not in self._under_way]
        for connection in self._slow.overdue(waiting, now_s):
            if connection.transport is not None:
                connection.transport.abort()


def _writes(connection: RequestHandler) -> bool:
    transport = connection.transport
    return transport is not None and transport.get_write_buffer_size() > 0


def _cut(connections: Iterator[RequestHandler]) -> bool:
    for connection in connections:
        # one that is cut off already is there for a moment longer
        if connection.transport is not None and not connection.transport.is_closing():
            connection.transport.abort()
            return True
    return False
