"""The composition root: builds every part, runs them, and takes them down in order."""

from __future__ import annotations

import asyncio
import logging
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascadeserve.errors import ServerStartFailed
from orchestrator.dataplane import CascadeDataPlane
from orchestrator.dispatcher import Dispatcher
from orchestrator.foreign_load import ForeignLoad
from orchestrator.gear_loop import GearLoop
from orchestrator.health import EndpointMonitor
from orchestrator.instance_config import InstanceConfig
from orchestrator.metrics import Metrics
from orchestrator.plan_change import PlanChange
from orchestrator.reconciler import Reconciler
from orchestrator.state import EndpointState, FamilyState
from orchestrator.supervise import forever
from orchestrator.triton import TritonBackend
from orchestrator.wire.rest import RestServer
from orchestrator.wire.rpc import build_rpc_server

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
    ) -> None:
        """`read_plan` reads the plan to serve, now and whenever `plan_change` is asked for another.

        `repository` is what the endpoints serve, needed for changing instances; `backends` replaces Triton in tests.
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
        for monitor in self.monitors.values():
            monitor.on_up = self.reconciler.endpoint_came_up
        self.dispatcher.flights.on_endpoint_error = self._endpoint_failed
        self.dispatcher.flights.on_dead_model = self._model_died
        # tests have no addresses
        watched = endpoints if backends is None else []
        self.foreign_loads = {
            each.name: ForeignLoad(each, cluster.endpoint(each.name).metrics, self.metrics) for each in watched
        }
        self.data_plane = CascadeDataPlane(self.dispatcher, self.metrics, on_arrival=self.gear_loop.on_arrival)

    async def run_loops(self) -> None:
        """Run every control loop; if one ends, all end and the error is raised."""
        async with asyncio.TaskGroup() as group:
            for name, monitor in self.monitors.items():
                group.create_task(forever(f"monitor-{name}", monitor.run), name=f"monitor-{name}")
                group.create_task(forever(f"watch-{name}", monitor.watch), name=f"watch-{name}")
            for name, watch in self.foreign_loads.items():
                group.create_task(forever(f"foreign-load-{name}", watch.run), name=f"foreign-load-{name}")
            group.create_task(forever("reconciler", self.reconciler.run), name="reconciler")
            group.create_task(forever("gear-loop", self.gear_loop.run), name="gear-loop")
            group.create_task(forever("plan-change", self.plan_change.run), name="plan-change")

    async def close(self) -> None:
        """Refuse what is left and close the connections to the endpoints."""
        await self.dispatcher.close()
        for endpoint in self.dispatcher.endpoints:
            await endpoint.backend.close()
        for watch in self.foreign_loads.values():
            await watch.close()

    def _endpoint_failed(self, endpoint: EndpointState) -> None:
        self.dispatcher.endpoint_is_down(endpoint)
        self.monitors[endpoint.name].kick()

    def _model_died(self, endpoint: EndpointState, name: str) -> None:
        self.dispatcher.model_is_dead(endpoint, name)
        self.reconciler.look_again()


async def serve(
    read_plan: Callable[[], GearPlan], cluster: Cluster, settings: ServeSettings, *, repository: Path | None
) -> None:
    """Serve until SIGTERM or SIGINT; then stop accepting, answer what is open, and leave.

    At SIGHUP the plan is read again and put in force without a pause.
    """
    orchestrator = Orchestrator(read_plan, cluster, repository=repository)
    plan = orchestrator.reconciler.plan
    if repository is None and len(plan.layouts) > 1:
        _log.warning(
            "the plan has %d layouts but no --repository was given: counts stay as they are", len(plan.layouts)
        )
    stop = asyncio.Event()
    _install_signal_handlers(stop)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, orchestrator.plan_change.ask)
    loops = asyncio.create_task(orchestrator.run_loops(), name="control-loops")
    rest_server, rpc_server = await _listen(orchestrator, settings)
    _log.info("listening on http://%s:%d and grpc://%s:%d", settings.host, settings.http_port, settings.host,
              settings.grpc_port)  # fmt: skip
    stopping = asyncio.create_task(stop.wait(), name="stop-signal")
    try:
        await asyncio.wait({loops, stopping}, return_when=asyncio.FIRST_COMPLETED)
        await _shut_down(orchestrator, settings, rest_server, rpc_server)
    finally:
        stopping.cancel()
        await orchestrator.close()
        loops.cancel()
        results = await asyncio.gather(loops, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]


async def _listen(orchestrator: Orchestrator, settings: ServeSettings) -> tuple[RestServer, grpc.aio.Server]:
    data_plane = orchestrator.data_plane
    rest_server = RestServer(
        data_plane,
        max_body_bytes=settings.max_request_bytes,
        metrics=orchestrator.metrics.render,
        closing=lambda: data_plane.draining,
        close_timeout_s=settings.drain_s,
    )
    rpc_server = build_rpc_server(data_plane, max_message_bytes=settings.max_request_bytes)
    try:
        await rest_server.start(settings.host, settings.http_port)
    except OSError as error:
        where = f"{settings.host}:{settings.http_port}"
        raise ServerStartFailed(
            f"cannot listen on {where} ({error.strerror}); choose another --host or --http-port"
        ) from error
    try:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        rpc_server.add_insecure_port(f"{host}:{settings.grpc_port}")
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
