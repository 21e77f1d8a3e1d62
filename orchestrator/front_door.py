"""The front door: one HTTP and one gRPC server over a data plane, opened together and closed in order."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from cascadeserve.errors import ServerStartFailed
from orchestrator.request_options import MAX_WORK
from orchestrator.supervise import forever
from orchestrator.wire.limits import MAX_ROWS, Limits, allow_connections
from orchestrator.wire.rest import RestServer
from orchestrator.wire.rpc import build_rpc_server
from orchestrator.wire.tensors import DataPlane
from orchestrator.wire.tls import Tls, TlsFiles

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from orchestrator.wire.others import Others

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Where to listen and what to allow."""

    host: str
    http_port: int
    grpc_port: int
    max_request_bytes: int
    # seconds after a stop signal in which open connections are still answered, and are closed one by one
    linger_s: float
    # seconds that requests in flight may take after that
    drain_s: float
    # processes that listen and parse in front of the dispatcher; 0: it does so itself
    fronts: int = 0
    max_rows: int = MAX_ROWS
    max_work: float = MAX_WORK
    # of each process that listens
    limits: Limits = field(default_factory=Limits)
    tls: TlsFiles | None = None


class ClosableDataPlane(DataPlane, Protocol):
    """A data plane that can be told of a shutdown, in this order: not ready any more, then no new request is taken."""

    draining: bool
    refusing: bool


class OpenRequests(Protocol):
    """What waits for the answers of a data plane."""

    @property
    def open_tickets(self) -> int:
        """Requests that have no answer yet."""

    async def drain(self, timeout_s: float) -> bool:
        """Wait until every request is answered; returns whether that came in time."""

    async def close(self) -> None:
        """Refuse what is still open."""


class FrontDoor:
    """Both servers; requests go to the data plane and nothing else is decided here."""

    def __init__(
        self,
        data_plane: ClosableDataPlane,
        requests: OpenRequests,
        settings: ServeSettings,
        *,
        others: Others,
        metrics: Callable[[], Awaitable[tuple[bytes, str]]],
        shares_ports: bool = False,
    ) -> None:
        """`requests` are those of the data plane; `others` has what is no cascade.

        `metrics` gives body and content type of `GET /metrics`; `shares_ports` says that other front processes listen
        on the same ports.

        Raises:
            InvalidArtefact: the files for TLS cannot be used.

        """
        self._data_plane = data_plane
        self._requests = requests
        self._settings = settings
        self._shares_ports = shares_ports
        self._tls = None if settings.tls is None else Tls(settings.tls)
        self._following: asyncio.Task[None] | None = None
        # tells gRPC's streams, which may be open for as long as their clients like
        self._ending = asyncio.Event()
        limits = settings.limits
        allowed = allow_connections(limits)
        if allowed < limits.max_connections:
            _log.warning("only %d connections are taken: more need a higher limit of open files (ulimit -n)", allowed)
            limits = replace(limits, max_connections=allowed)
        self._rest = RestServer(
            data_plane,
            others=others,
            max_body_bytes=settings.max_request_bytes,
            metrics=metrics,
            closing=lambda: data_plane.draining,
            close_timeout_s=settings.drain_s,
            limits=limits,
        )
        self._rpc = build_rpc_server(
            data_plane,
            others=others,
            max_message_bytes=settings.max_request_bytes,
            ending=self._ending,
            reuse_port=shares_ports,
            limits=limits,
        )

    async def open(self) -> None:
        """Listen on both ports.

        Raises:
            ServerStartFailed: one of them cannot be listened on.

        """
        settings, tls = self._settings, self._tls
        context = None if tls is None else tls.http_context()
        try:
            await self._rest.start(settings.host, settings.http_port, reuse_port=self._shares_ports, tls=context)
        except OSError as error:
            raise cannot_listen(settings.host, settings.http_port, "--http-port", error) from error
        try:
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            address = f"{host}:{settings.grpc_port}"
            if tls is None:
                self._rpc.add_insecure_port(address)
            else:
                self._rpc.add_secure_port(address, tls.grpc_credentials())
        except RuntimeError as error:
            await self._rest.close()
            raise cannot_listen(settings.host, settings.grpc_port, "--grpc-port") from error
        await self._rpc.start()
        if tls is not None:
            self._following = asyncio.create_task(forever("tls-files", tls.follow_files), name="tls-files")

    async def close(self) -> None:
        """Stop accepting, answer what is open, close."""
        settings, data_plane = self._settings, self._data_plane
        data_plane.draining = True
        await self._rest.stop_listening()
        # Clients with an open connection may be sending at this moment: each is answered, over HTTP told to close.
        await asyncio.sleep(settings.linger_s)
        data_plane.refusing = True
        self._ending.set()
        # gRPC tells its clients to go elsewhere and lets the calls under way finish. Those that came in but were not
        # taken by this loop yet it cancels, and under load they may be many: not before what was sent had its time.
        rpc_stopped = asyncio.create_task(self._rpc.stop(settings.drain_s), name="grpc-server-stop")
        if not await self._requests.drain(settings.drain_s):
            _log.warning("%d requests are refused unanswered", self._requests.open_tickets)
            await self._requests.close()
        await rpc_stopped
        await self._rest.close()
        if self._following is not None:
            self._following.cancel()


def cannot_listen(host: str, port: int, option: str, error: OSError | None = None) -> ServerStartFailed:
    """What to say where a port cannot be listened on."""
    why = f" ({error.strerror})" if error is not None else ""
    return ServerStartFailed(f"cannot listen on {host}:{port}{why}; choose another --host or {option}")
