"""The composition root: builds every part, runs them, and takes them down in order."""

from __future__ import annotations

import asyncio
import logging
import signal
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cascadeserve.errors import ServerStartFailed
from orchestrator.dataplane import MAX_ROWS, CascadeDataPlane
from orchestrator.dispatcher import Dispatcher
from orchestrator.gear_loop import GearLoop
from orchestrator.health import EndpointMonitor
from orchestrator.instance_config import InstanceConfig
from orchestrator.metrics import Metrics
from orchestrator.plan_change import PlanChange
from orchestrator.reconciler import Reconciler
from orchestrator.state import EndpointState, FamilyState
from orchestrator.supervise import forever
from orchestrator.triton import TritonBackend
from orchestrator.wire.limits import Limits, allow_connections
from orchestrator.wire.rest import RestServer
from orchestrator.wire.rpc import build_rpc_server
from orchestrator.wire.tls import Tls, TlsFiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import grpc

    from cascadeserve.cluster import Cluster
    from cascadeserve.gear_plan import GearPlan
    from orchestrator.backend import Backend

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Where to listen and what to allow."""

    host: str
    http_port: int
    grpc_port: int
    max_request_bytes: int
    max_rows: int
    limits: Limits
    tls: TlsFiles | None
    # seconds after a stop signal in which open connections are still answered, and are closed one by one
    linger_s: float
    # seconds that requests in flight may take after that
    drain_s: float


class Orchestrator:
    """One dispatcher over the endpoints of a cluster, with its control loops."""

    def __init__(
        self,
        read_plan: Callable[[], GearPlan],
        cluster: Cluster,
        *,
        repository: Path | None,
        backends: dict[str, Backend] | None = None,
        max_rows: int = MAX_ROWS,
    ) -> None:
        """`read_plan` reads the plan to serve, now and whenever `plan_change` is asked for another.

        `repository` is what the endpoints serve, needed for changing instances; `backends` replaces Triton in tests.
        A request may have `max_rows`.
        """
        self.metrics = Metrics()
        plan = read_plan()
        slots = {endpoint.name: endpoint.slots for endpoint in cluster.endpoints}
        endpoints = [
            EndpointState(
                endpoint.name,
                backends[endpoint.name] if backends is not None else TritonBackend(endpoint.grpc, endpoint.http),
                endpoint.slots,
                endpoint.slots / max(slots.values()),
            )
            for endpoint in cluster.endpoints
        ]
        families = [FamilyState.in_gear_for(0.0, name, plan, plan.layouts[0].name, slots) for name in plan.families]
        self.dispatcher = Dispatcher(families, endpoints, metrics=self.metrics)
        config = None if repository is None else InstanceConfig(repository, cluster)
        self.reconciler = Reconciler(plan, self.dispatcher, config=config, metrics=self.metrics)
        self.gear_loop = GearLoop(plan, self.dispatcher, self.reconciler, self.metrics)
        self.plan_change = PlanChange(read_plan, self.dispatcher, self.reconciler, self.gear_loop, self.metrics)
        self.monitors = {endpoint.name: EndpointMonitor(endpoint, self.dispatcher) for endpoint in endpoints}
        self.dispatcher.flights.on_endpoint_error = self._endpoint_failed
        self.data_plane = CascadeDataPlane(
            self.dispatcher, self.metrics, on_arrival=self.gear_loop.on_arrival, max_rows=max_rows
        )

    async def run_loops(self) -> None:
        """Run every control loop; if one ends, all end and the error is raised."""
        async with asyncio.TaskGroup() as group:
            for name, monitor in self.monitors.items():
                group.create_task(forever(f"monitor-{name}", monitor.run), name=f"monitor-{name}")
            group.create_task(forever("reconciler", self.reconciler.run), name="reconciler")
            group.create_task(forever("gear-loop", self.gear_loop.run), name="gear-loop")
            group.create_task(forever("plan-change", self.plan_change.run), name="plan-change")

    async def close(self) -> None:
        """Refuse what is left and close the connections to the endpoints."""
        await self.dispatcher.close()
        for endpoint in self.dispatcher.endpoints:
            await endpoint.backend.close()

    def _endpoint_failed(self, endpoint: EndpointState) -> None:
        self.dispatcher.endpoint_is_down(endpoint)
        self.monitors[endpoint.name].kick()


async def serve(
    read_plan: Callable[[], GearPlan], cluster: Cluster, settings: ServeSettings, *, repository: Path | None
) -> None:
    """Serve until SIGTERM or SIGINT; then stop accepting, answer what is open, and leave.

    At SIGHUP the plan is read again and put in force without a pause.
    """
    orchestrator = Orchestrator(read_plan, cluster, repository=repository, max_rows=settings.max_rows)
    plan = orchestrator.reconciler.plan
    if repository is None and len(plan.layouts) > 1:
        _log.warning(
            "the plan has %d layouts but no --repository was given: counts stay as they are", len(plan.layouts)
        )
    tls = None if settings.tls is None else Tls(settings.tls)
    stop = asyncio.Event()
    _install_signal_handlers(stop)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, orchestrator.plan_change.ask)
    loops = asyncio.create_task(orchestrator.run_loops(), name="control-loops")
    rest_server, rpc_server = await _listen(orchestrator, settings, tls)
    following = None if tls is None else asyncio.create_task(forever("tls-files", tls.follow_files), name="tls-files")
    _log.info("listening on %s://%s:%d and grpc://%s:%d", "http" if tls is None else "https", settings.host,
              settings.http_port, settings.host, settings.grpc_port)  # fmt: skip
    stopping = asyncio.create_task(stop.wait(), name="stop-signal")
    try:
        await asyncio.wait({loops, stopping}, return_when=asyncio.FIRST_COMPLETED)
        await _shut_down(orchestrator, settings, rest_server, rpc_server)
    finally:
        stopping.cancel()
        if following is not None:
            following.cancel()
        await orchestrator.close()
        loops.cancel()
        results = await asyncio.gather(loops, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]


async def _listen(
    orchestrator: Orchestrator, settings: ServeSettings, tls: Tls | None
) -> tuple[RestServer, grpc.aio.Server]:
    data_plane = orchestrator.data_plane
    limits = settings.limits
    allowed = allow_connections(limits)
    if allowed < limits.max_connections:
        _log.warning("only %d connections are taken: more need a higher limit of open files (ulimit -n)", allowed)
        limits = replace(limits, max_connections=allowed)
    rest_server = RestServer(
        data_plane,
        max_body_bytes=settings.max_request_bytes,
        metrics=orchestrator.metrics.render,
        closing=lambda: data_plane.draining,
        close_timeout_s=settings.drain_s,
        limits=limits,
    )
    rpc_server = build_rpc_server(data_plane, max_message_bytes=settings.max_request_bytes, limits=limits)
    try:
        await rest_server.start(settings.host, settings.http_port, tls=None if tls is None else tls.http_context())
    except OSError as error:
        where = f"{settings.host}:{settings.http_port}"
        raise ServerStartFailed(
            f"cannot listen on {where} ({error.strerror}); choose another --host or --http-port"
        ) from error
    try:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{settings.grpc_port}"
        if tls is None:
            rpc_server.add_insecure_port(address)
        else:
            rpc_server.add_secure_port(address, tls.grpc_credentials())
    except RuntimeError as error:
        await rest_server.close()
        raise ServerStartFailed(
            f"cannot listen on {settings.host}:{settings.grpc_port}; choose another --host or --grpc-port"
        ) from error
    await rpc_server.start()
    return rest_server, rpc_server


async def _shut_down(
    orchestrator: Orchestrator,
    settings: ServeSettings,
    rest_server: RestServer,
    rpc_server: grpc.aio.Server,
) -> None:
    data_plane = orchestrator.data_plane
    _log.info("stopping: not ready from now on, no new connections")
    data_plane.draining = True
    rest_server.stop_listening()
    # gRPC tells its clients to go elsewhere and lets the calls under way finish.
    rpc_stopped = asyncio.create_task(rpc_server.stop(settings.linger_s + settings.drain_s), name="grpc-server-stop")
    # Clients with an open HTTP connection may be sending at this moment: each is answered and told to close.
    await asyncio.sleep(settings.linger_s)
    data_plane.refusing = True
    if not await orchestrator.dispatcher.drain(settings.drain_s):
        _log.warning("%d requests are refused unanswered", orchestrator.dispatcher.open_tickets)
        await orchestrator.dispatcher.close()
    await rpc_stopped
    await rest_server.close()
    _log.info("stopped")


def _install_signal_handlers(stop: asyncio.Event) -> None:
    """First signal: stop in order. A second one meets the default action and ends the process at once."""
    loop = asyncio.get_running_loop()

    def begin_stop() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, begin_stop)
