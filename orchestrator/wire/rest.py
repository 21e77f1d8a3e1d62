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

from cascadeserve.errors import Overloaded
from orchestrator.wire.bodies import Bodies
from orchestrator.wire.codec_http import HEADER_LENGTH
from orchestrator.wire.endpoints import answer_to, routes
from orchestrator.wire.exchange import JSON, Answer, Call, Route, error_answer
from orchestrator.wire.greetings import Greetings
from orchestrator.wire.handed_over import HandedOver, note
from orchestrator.wire.limits import Limits
from orchestrator.wire.others import deadlines
from orchestrator.wire.plain_http import PlainHttp
from orchestrator.wire.watch import Watch

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

    from orchestrator.wire.others import Others
    from orchestrator.wire.tensors import DataPlane

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# Connections that wait to be accepted; the kernel caps it at net.core.somaxconn. Where it is full the kernel drops the
# client's SYN, which is sent again after a second: longer than most requests may take.
_BACKLOG = 4096
# asyncio accepts as many in one go as its backlog says, half a second for all of these, so it is told another number.
_ACCEPTED_IN_ONE_GO = 32
# One of so many connections may be at its TLS handshake before the oldest of these makes room.
_GREETINGS_SHARE = 8


class _Refused(asyncio.Protocol):
    """A connection too many: told so and closed."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        body = error_answer(503, "too many connections are open; try again shortly").body
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: {JSON}\r\nContent-Length: {len(body)}\r\n"
        with contextlib.suppress(OSError):
            cast("asyncio.Transport", transport).write(f"{head}Connection: close\r\n\r\n".encode() + body)
        transport.close()


class _Aborted(asyncio.Protocol):
    """The same where it would have to be told within TLS, which costs more than most requests."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).abort()


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
        self._watch: asyncio.Task[None] | None = None
        table = routes(data_plane, metrics, others, max_listed_elements=self._limits.max_listed_elements)
        bodies = Bodies(max_body_bytes, self._limits, deadlines(data_plane, others))
        app = _build_app(table, closing, bodies, data_plane.unread)
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,
            shutdown_timeout=close_timeout_s,
        )
        self._handed_over = HandedOver(self._runner, bodies.arriving, self._limits.client_timeout_s)
        self._plain = PlainHttp(
            table, max_body_bytes=max_body_bytes, closing=closing, hand_over=self._handed_over.new_connection
        )
        self._close_timeout_s = close_timeout_s
        self._listener: asyncio.Server | None = None
        self._greetings: Greetings | None = None
        # the connections that were taken last, until they are made
        self._late: asyncio.Future[list[Any]] | None = None

    async def start(self, host: str, port: int, *, reuse_port: bool = False, tls: ssl.SSLContext | None = None) -> None:
        """Listen; `reuse_port` lets several front processes share the port.

        Raises:
            OSError: the address cannot be bound.

        """
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        self._greetings = None if tls is None else Greetings(tls, self._plain.new_connection)
        try:
            self._listener = await loop.create_server(
                self._new_connection, host, port, backlog=_ACCEPTED_IN_ONE_GO, reuse_port=reuse_port
            )
            for listening in self._listener.sockets:
                with _same_socket(listening.fileno()) as same:
                    same.listen(_BACKLOG)
        except OSError:
            await self._runner.cleanup()
            raise
        self._watch = asyncio.create_task(self._look_at_clients(), name="slow-clients")

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
        make = functools.partial(loop.connect_accepted_socket, self._new_connection)
        self._late = asyncio.gather(*map(make, late), return_exceptions=True)

    async def close(self) -> None:
        """Close idle connections at once and the others with their answers."""
        await self.stop_listening()
        if self._late is not None:
            await self._late
        if self._greetings is not None:
            self._greetings.end()
        await asyncio.gather(self._plain.close(self._close_timeout_s), self._runner.cleanup())
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    def _new_connection(self) -> asyncio.Protocol:
        greeting = 0 if self._greetings is None else len(self._greetings)
        full = len(self._plain.connections) + len(self._handed_over) + greeting >= self._limits.max_connections
        has_room = not full or self._make_room(greeting)
        if self._greetings is not None:
            return self._greetings.begin() if has_room else _Aborted()
        return self._plain.new_connection() if has_room else _Refused()

    def _make_room(self, greeting: int) -> bool:
        """Cut off one connection, if there is one without a request under way: whose client loses least."""
        if self._greetings is not None and greeting > self._limits.max_connections // _GREETINGS_SHARE:
            return self._greetings.cut_oldest()
        plain, others = self._plain.connections, self._handed_over
        return (
            plain.cut_silent()
            or others.cut_idle()
            or plain.cut_begun()
            or others.cut_arriving()
            or plain.cut_idle()
            or (self._greetings is not None and self._greetings.cut_oldest())
        )

    async def _look_at_clients(self) -> None:
        loop = asyncio.get_running_loop()
        watch = Watch(self._limits)
        while True:
            await asyncio.sleep(min(self._limits.client_timeout_s / 4, 1.0))
            watch.look(self._plain.connections, self._handed_over, loop.time())


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


def _build_app(
    table: list[Route],
    closing: Callable[[], bool],
    bodies: Bodies,
    unread: Callable[[str, str], None],
) -> web.Application:
    app = web.Application(middlewares=[note, _answer_errors_as_json])
    for route in table:
        app.router.add_route(route.method, route.path, _adapted(route, bodies, unread))

    async def finish_headers(_request: web.Request, response: web.StreamResponse) -> None:
        # aiohttp's and Python's versions, which are nobody's business; plain answers have no such header either
        response.headers.popall("Server", None)
        if closing():
            response.force_close()
            response.headers["Connection"] = "close"

    app.on_response_prepare.append(finish_headers)
    return app


def _adapted(route: Route, bodies: Bodies, unread: Callable[[str, str], None]) -> Handler:
    takes_body = route.method == "POST"

    async def handle(request: web.Request) -> web.Response:
        model, version = request.match_info.get("model", ""), request.match_info.get("version", "")
        # Nothing of the body is there: that such a request is important, nobody sees.
        admitted = route.gate is None or route.gate(model, version, b"")
        try:
            body, waited_s = await bodies.read(request) if takes_body else (b"", 0.0)
        except Overloaded:
            if route.gate is not None:
                unread(model, version)
            raise
        call = Call(
            model,
            version,
            request.headers.get(HEADER_LENGTH),
            body,
            request.headers.get("Accept-Encoding"),
            admitted,
            waited_s,
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
