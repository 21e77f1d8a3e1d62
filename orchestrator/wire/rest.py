"""KServe v2 over HTTP, as one Triton server speaks it: the paths of `endpoints` on a port.

Connections begin with `plain_http`, which takes plain requests fast and hands every connection that needs more of HTTP
to aiohttp.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
from typing import TYPE_CHECKING, Any, cast

from aiohttp import web

from cascadeserve.errors import InvalidRequest, RequestTooLarge, Unavailable
from orchestrator.wire.codec_http import HEADER_LENGTH
from orchestrator.wire.compression import unfolded
from orchestrator.wire.endpoints import answer_to, routes
from orchestrator.wire.exchange import JSON, Answer, Call, Route, error_answer
from orchestrator.wire.limits import Limits
from orchestrator.wire.plain_http import PlainHttp
from orchestrator.wire.slow_clients import SlowClients

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

    from aiohttp.web_protocol import RequestHandler

    from orchestrator.wire.others import Others
    from orchestrator.wire.tensors import DataPlane

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# Connections that wait to be accepted; the kernel caps it at net.core.somaxconn. Where it is full the kernel drops the
# client's SYN, which is sent again after a second: longer than most requests may take.
_BACKLOG = 4096
# asyncio accepts as many in one go as its backlog says, half a second for all of these, so it is told another number.
_ACCEPTED_IN_ONE_GO = 32
# seconds for a greeting, and for a farewell
_TLS_TIMES: dict[str, Any] = {"ssl_handshake_timeout": 15.0, "ssl_shutdown_timeout": 5.0}


class _Refused(asyncio.Protocol):
    """A connection too many: told so and closed."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        body = error_answer(503, "too many connections are open; try again shortly").body
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: {JSON}\r\nContent-Length: {len(body)}\r\n"
        with contextlib.suppress(OSError):
            cast("asyncio.Transport", transport).write(f"{head}Connection: close\r\n\r\n".encode() + body)
        transport.close()


class RestServer:
    """The HTTP server; a client that hangs up cancels its request, and no line is logged per request."""

    def __init__(
        self,
        data_plane: DataPlane,
        *,
        others: Others | None = None,
        max_body_bytes: int,
        metrics: Callable[[], Awaitable[tuple[bytes, str]]] | None = None,
        closing: Callable[[], bool] = lambda: False,
        close_timeout_s: float = 60.0,
        limits: Limits | None = None,
    ) -> None:
        """`metrics` returns the body and the content type of `GET /metrics`.

        `max_body_bytes` bounds a request body as sent and, if it is compressed, as it unfolds. While `closing()` is
        true, every answer is the last one of its connection. `close` waits for open answers `close_timeout_s`.
        """
        if max_body_bytes < 1:
            # aiohttp would read 0 as "no limit"
            raise ValueError("max_body_bytes must be at least 1")
        self._limits = limits or Limits()
        # aiohttp's connections: how many requests each made, and those that one is under way on
        self._handled: dict[RequestHandler, int] = {}
        self._under_way: set[RequestHandler] = set()
        self._watch: asyncio.Task[None] | None = None
        table = routes(data_plane, metrics, others, max_listed_elements=self._limits.max_listed_elements)
        app = _build_app(table, max_body_bytes, closing, self._limits)
        app.middlewares.append(self._note_under_way)
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=close_timeout_s, auto_decompress=False
        )
        self._plain = PlainHttp(table, max_body_bytes=max_body_bytes, closing=closing, hand_over=self._other_protocol)
        self._close_timeout_s = close_timeout_s
        self._listener: asyncio.Server | None = None
        self._tls: ssl.SSLContext | None = None
        self._tls_times: dict[str, Any] = {}
        # the connections that were taken last, until they are made
        self._late: asyncio.Future[list[Any]] | None = None

    async def start(self, host: str, port: int, *, reuse_port: bool = False, tls: ssl.SSLContext | None = None) -> None:
        """Listen; `reuse_port` lets several front processes share the port.

        Raises:
            OSError: the address cannot be bound.

        """
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        self._tls, self._tls_times = tls, _TLS_TIMES if tls else {}
        try:
            self._listener = await loop.create_server(
                self._new_connection, host, port, backlog=_ACCEPTED_IN_ONE_GO, reuse_port=reuse_port, ssl=tls,
                **self._tls_times,
            )  # fmt: skip
            for listening in self._listener.sockets:
                with _same_socket(listening.fileno()) as same:
                    same.listen(_BACKLOG)
        except OSError:
            await self._runner.cleanup()
            raise
        self._watch = asyncio.create_task(self._cut_off_slow_clients(), name="slow-clients")

    @property
    def address(self) -> str:
        """host:port of the first socket listened on."""
        if self._listener is None:
            raise RuntimeError("not started")
        host, port = self._listener.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    async def stop_listening(self) -> None:
        """Take no new connections; those that are open go on, and those that the kernel has taken already.

        It would reset them with the listening socket, with all that their clients have sent.
        """
        if self._listener is None or not self._listener.is_serving():
            return
        loop = asyncio.get_running_loop()
        for listening in self._listener.sockets:
            loop.remove_reader(listening.fileno())
        # what asyncio has accepted a moment ago becomes connections of its server, which must not be closed then
        for _ in range(2):
            await asyncio.sleep(0)
        late = [taken for listening in self._listener.sockets for taken in _accept_waiting(listening.fileno())]
        self._listener.close()
        make = functools.partial(loop.connect_accepted_socket, self._new_connection, ssl=self._tls, **self._tls_times)
        self._late = asyncio.gather(*map(make, late), return_exceptions=True)

    async def close(self) -> None:
        """Close idle connections at once and the others with their answers."""
        await self.stop_listening()
        await asyncio.gather(self._plain.close(self._close_timeout_s), self._runner.cleanup())
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    def _new_connection(self) -> asyncio.Protocol:
        full = len(self._plain.connections) + len(self._others()) >= self._limits.max_connections
        if full and not self._plain.connections.make_room():
            return _Refused()
        return self._plain.new_connection()

    def _others(self) -> list[RequestHandler]:
        """Connections that aiohttp has."""
        return [] if self._runner.server is None else self._runner.server.connections

    async def _cut_off_slow_clients(self) -> None:
        timeout_s = self._limits.client_timeout_s
        plain: SlowClients[Any] = SlowClients(timeout_s)
        others: SlowClients[RequestHandler] = SlowClients(timeout_s)
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(timeout_s / 4, 1.0))
            owing = [(each, each.num_requests) for each in self._plain.connections if each.owes]
            for connection in plain.overdue(owing, loop.time()):
                connection.abort()
            self._cut_off_largest()
            # What aiohttp waits for it does not say: it may also be the next request.
            self._handled = {each: self._handled.get(each, 0) for each in self._others()}
            waiting = [(each, number) for each, number in self._handled.items() if each not in self._under_way]
            for other in others.overdue(waiting, loop.time()):
                if other.transport is not None:
                    other.transport.abort()

    def _cut_off_largest(self) -> None:
        """Keep what all clients together have sent of unfinished requests within its limit."""
        received = sum(connection.received_bytes for connection in self._plain.connections)
        if received <= self._limits.max_received_bytes:
            return
        unfinished = sorted(self._plain.connections, key=lambda connection: -connection.received_bytes)
        for connection in unfinished:
            if received <= self._limits.max_received_bytes:
                break
            received -= connection.received_bytes
            connection.abort()

    @web.middleware
    async def _note_under_way(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        connection = request.protocol
        self._under_way.add(connection)
        self._handled[connection] = self._handled.get(connection, 0) + 1
        try:
            return await handler(request)
        finally:
            self._under_way.discard(connection)

    def _other_protocol(self) -> asyncio.Protocol:
        if self._runner.server is None:
            raise RuntimeError("not started")
        return self._runner.server()


def _same_socket(descriptor: int) -> socket.socket:
    """Another handle of a listening socket, for what asyncio does not let one do with its own."""
    return socket.socket(fileno=os.dup(descriptor))


def _accept_waiting(descriptor: int) -> list[socket.socket]:
    """Accept what waits at a listening socket."""
    taken = []
    with _same_socket(descriptor) as listening, contextlib.suppress(OSError):
        listening.setblocking(False)
        while True:
            connection, _ = listening.accept()
            connection.setblocking(False)
            taken.append(connection)
    return taken


class _Bodies:
    """Reads the bodies of requests that aiohttp has, within the limits of each and of all."""

    def __init__(self, max_body_bytes: int, limits: Limits) -> None:
        self._max_body_bytes = max_body_bytes
        self._limits = limits
        self._reserved_bytes = 0

    async def read(self, request: web.Request) -> bytes:
        """Read a whole body, decompressed."""
        length = request.content_length
        if length is not None and length > self._max_body_bytes:
            # Refused unread: this is what the limit is for.
            raise self._too_large()
        # How long chunks will be is not said.
        reserved = self._max_body_bytes if length is None else length
        if self._reserved_bytes + reserved > max(self._limits.max_received_bytes, self._max_body_bytes):
            raise Unavailable("too much is being received from all clients; try again shortly")
        self._reserved_bytes += reserved
        try:
            return await self._read(request)
        finally:
            self._reserved_bytes -= reserved

    async def _read(self, request: web.Request) -> bytes:
        timeout_s = self._limits.client_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                body = await request.read()
        except TimeoutError:
            raise web.HTTPRequestTimeout(reason=f"the request body did not arrive within {timeout_s:g} s") from None
        except web.HTTPRequestEntityTooLarge:
            raise self._too_large() from None
        except web.RequestPayloadError:
            raise InvalidRequest("the request body cannot be read; it is broken or cut short") from None
        encoding = request.headers.get("Content-Encoding", "").strip().lower()
        return await unfolded(body, encoding, self._max_body_bytes)

    def _too_large(self) -> RequestTooLarge:
        limit = self._max_body_bytes
        return RequestTooLarge(f"the request body is larger than the limit of {limit} bytes; send fewer rows")


def _build_app(table: list[Route], max_body_bytes: int, closing: Callable[[], bool], limits: Limits) -> web.Application:
    app = web.Application(client_max_size=max_body_bytes, middlewares=[_answer_errors_as_json])
    bodies = _Bodies(max_body_bytes, limits)
    for route in table:
        app.router.add_route(route.method, route.path, _adapted(route, bodies))

    async def close_connection(_request: web.Request, response: web.StreamResponse) -> None:
        if closing():
            response.force_close()
            response.headers["Connection"] = "close"

    app.on_response_prepare.append(close_connection)
    return app


def _adapted(route: Route, bodies: _Bodies) -> Handler:
    takes_body = route.method == "POST"

    async def handle(request: web.Request) -> web.Response:
        model, version = request.match_info.get("model", ""), request.match_info.get("version", "")
        # Nothing of the body is there: that such a request is important, nobody sees.
        admitted = route.gate is None or route.gate(model, version, b"")
        call = Call(
            model,
            version,
            request.headers.get(HEADER_LENGTH),
            await bodies.read(request) if takes_body else b"",
            request.headers.get("Accept-Encoding"),
            admitted,
        )
        return _response(await route.handler(call))

    return handle


@web.middleware
async def _answer_errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every exception into a JSON body; CancelledError passes, there is nobody to answer."""
    try:
        return await handler(request)
    except web.HTTPMethodNotAllowed as error:
        answer = error_answer(
            error.status, f"Method Not Allowed: {error.method}; allowed here is {error.headers['Allow']}"
        )
        answer.headers["Allow"] = error.headers["Allow"]
        return _response(answer)
    except web.HTTPException as error:
        # The router's own: no such path.
        sentence = (
            "Not Found: this server has no such path" if error.status == web.HTTPNotFound.status_code else error.reason
        )
        return _response(error_answer(error.status, sentence))
    except Exception as error:  # noqa: BLE001 - logged there
        return _response(answer_to(error))


def _response(answer: Answer) -> web.Response:
    return web.Response(status=answer.status, body=answer.body, headers=answer.headers)
