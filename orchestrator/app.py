"""The composition root: builds every part, runs them, and takes them down in order."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import TYPE_CHECKING

from cascadeserve.collector import spare_what_lives
from cascadeserve.errors import Overloaded
from cascadeserve.policy.admission import DEADLINE_SLOS, LAST_GEAR_SLOS, NONE, wait_ahead_s
from orchestrator.dataplane import CascadeDataPlane
from orchestrator.dispatcher import Dispatcher
from orchestrator.entry import Ahead, Entry
from orchestrator.foreign_load import ForeignLoad
from orchestrator.front_door import FrontDoor
from orchestrator.fronts.hub import Hub
from orchestrator.gear_loop import GearLoop
from orchestrator.health import EndpointMonitor
from orchestrator.instance_config import InstanceConfig
from orchestrator.metrics import Metrics
from orchestrator.plan_change import PlanChange
from orchestrator.probe_rows import ProbeRows, say_what_is_not_probed
from orchestrator.reconciler import Reconciler
from orchestrator.request_options import MAX_WORK
from orchestrator.state import EndpointState, FamilyState
from orchestrator.supervise import forever
from orchestrator.triton import TritonBackend
from orchestrator.wire.limits import MAX_ROWS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from cascadeserve.cluster import Cluster
    from cascadeserve.gear_plan import GearPlan
    from orchestrator.backend import Backend
    from orchestrator.front_door import ServeSettings

_log = logging.getLogger(__name__)


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
        max_work: float = MAX_WORK,
    ) -> None:
        """`read_plan` reads the plan to serve, now and whenever `plan_change` is asked for another.

        `repository` is what the endpoints serve, needed for changing instances; `backends` replaces Triton in tests.
        A request may have `max_rows`, and each of them claim `max_work`.
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
        self.probe_rows = {each.name: ProbeRows(each, self.dispatcher, self.metrics) for each in endpoints}
        self.dispatcher.flights.on_endpoint_error = self._endpoint_failed
        self.dispatcher.flights.on_dead_model = self._model_died
        # tests have no addresses
        watched = endpoints if backends is None else []
        self.foreign_loads = {
            each.name: ForeignLoad(each, cluster.endpoint(each.name).metrics, self.metrics) for each in watched
        }
        self.entry = Entry(on_refusal=self._overloaded, on_lag=self.metrics.loop_lag)
        # told at every look what is ahead of requests
        self.on_look: Callable[[Mapping[str, Ahead]], None] = lambda _: None
        self.data_plane = CascadeDataPlane(
            self.dispatcher, self.metrics, self.entry, on_arrival=self.gear_loop.on_arrival, max_rows=max_rows,
            max_work=max_work,
        )  # fmt: skip

        passing = self.dispatcher.passing
        passing.is_ours = lambda model: model in self.dispatcher.families or self.reconciler.owns(model)
        passing.is_closing = lambda: self.data_plane.refusing
        passing.on_lost = lambda endpoint: self.monitors[endpoint.name].kick()

    async def run_loops(self) -> None:
        """Run every control loop; if one ends, all end and the error is raised."""
        async with asyncio.TaskGroup() as group:
            for name, monitor in self.monitors.items():
                group.create_task(forever(f"monitor-{name}", monitor.run), name=f"monitor-{name}")
                group.create_task(forever(f"watch-{name}", monitor.watch), name=f"watch-{name}")
            for name, probe_rows in self.probe_rows.items():
                group.create_task(forever(f"probe-rows-{name}", probe_rows.run), name=f"probe-rows-{name}")
            for name, watch in self.foreign_loads.items():
                group.create_task(forever(f"foreign-load-{name}", watch.run), name=f"foreign-load-{name}")
            group.create_task(forever("reconciler", self.reconciler.run), name="reconciler")
            group.create_task(forever("gear-loop", self.gear_loop.run), name="gear-loop")
            group.create_task(forever("plan-change", self.plan_change.run), name="plan-change")
            group.create_task(forever("entry", lambda: self.entry.run(self.show_entry)), name="entry")

    def show_entry(self) -> None:
        """Tell the entry what is ahead of a request of each family; nothing while the dispatcher has no endpoint."""
        queues = self._ahead()
        self.entry.show(queues)
        for name, ahead in queues.items():
            self.metrics.predicted_wait(name, self.entry.lag_s() + ahead.wait_s)
        self.on_look(queues)

    def _ahead(self) -> dict[str, Ahead]:
        up_slots = sum(endpoint.slots for endpoint in self.dispatcher.endpoints if endpoint.up)
        queues = {}
        for name, family in self.dispatcher.families.items():
            models = family.in_gear()
            hosts = [each for each in self.dispatcher.endpoints if any(each.hosts(model) for model in models)]
            slots = sum(endpoint.slots for endpoint in hosts)
            # without any, the dispatcher has a better sentence
            if family.admission == NONE or not slots:
                continue
            family_slots = min(up_slots * self.gear_loop.share(name), slots)
            in_flight_s = sum(endpoint.work_s for endpoint in hosts)
            queues[name] = Ahead(
                slo_s=family.plan.slo_s,
                own_s=sum(family.full_batch_s(stage.model) for stage in family.entry.stages),
                surge_slos=DEADLINE_SLOS if family.has_faster_gear else LAST_GEAR_SLOS,
                wait_s=wait_ahead_s(in_flight_s, self.dispatcher.roughly_queued_work_s(family), slots, family_slots),
                row_s=family.work_per_row_s / family_slots,
            )
        return queues

    async def close(self) -> None:
        """Refuse what is left and close the connections to the endpoints."""
        await self.dispatcher.close()
        for endpoint in self.dispatcher.endpoints:
            await endpoint.backend.close()
        for watch in self.foreign_loads.values():
            await watch.close()

    def refused(self, name: str, outcome: str, rows: float) -> None:
        """Count a request that was refused before it got to the data plane; `rows` is 0 if it was wrong.

        Demand is what comes, not what is let in.
        """
        self.metrics.request(name, outcome, 0.0)
        self.metrics.statistics.failed(name, 0.0, asyncio.get_running_loop().time())
        if rows and (family := self.dispatcher.families.get(name)) is not None:
            self.gear_loop.on_arrival(family, rows)

    def _overloaded(self, name: str, rows: float) -> None:
        self.refused(name, Overloaded.__name__, rows)

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
    orchestrator = Orchestrator(
        read_plan, cluster, repository=repository, max_rows=settings.max_rows, max_work=settings.max_work
    )
    plan = orchestrator.reconciler.plan
    if repository is None and len(plan.layouts) > 1:
        _log.warning(
            "the plan has %d layouts but no --repository was given: counts stay as they are", len(plan.layouts)
        )
    say_what_is_not_probed(plan)
    stop = asyncio.Event()
    _install_signal_handlers(stop)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, orchestrator.plan_change.ask)
    door = _front_door(orchestrator, settings)
    loops = [asyncio.create_task(orchestrator.run_loops(), name="control-loops")]
    stopping = asyncio.create_task(stop.wait(), name="stop-signal")
    try:
        await door.open()
        spare_what_lives()
        if isinstance(door, Hub):
            loops.append(asyncio.create_task(door.run(), name="keep-fronts"))
        _log.info("listening on %s://%s:%d and grpc://%s:%d", "http" if settings.tls is None else "https",
                  settings.host, settings.http_port, settings.host, settings.grpc_port)  # fmt: skip
        await asyncio.wait({*loops, stopping}, return_when=asyncio.FIRST_COMPLETED)
        _log.info("stopping: not ready from now on, no new connections")
        await door.close()
        _log.info("stopped")
    finally:
        stopping.cancel()
        await orchestrator.close()
        for loop in loops:
            loop.cancel()
        results = await asyncio.gather(*loops, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


def _front_door(orchestrator: Orchestrator, settings: ServeSettings) -> FrontDoor | Hub:
    """Where requests come in: in this process, or in front processes of its own."""
    data_plane, dispatcher, metrics = orchestrator.data_plane, orchestrator.dispatcher, orchestrator.metrics
    if settings.fronts:
        hub = Hub(
            data_plane, settings, models=lambda: dispatcher.families, others=dispatcher.passing.names, metrics=metrics,
            on_refusal=orchestrator.refused,
        )  # fmt: skip
        orchestrator.on_look = lambda queues: hub.show(queues, orchestrator.entry.lag_s())
        return hub

    async def show_metrics() -> tuple[bytes, str]:
        return metrics.render()

    return FrontDoor(data_plane, dispatcher, settings, others=dispatcher.passing, metrics=show_metrics)


def _install_signal_handlers(stop: asyncio.Event) -> None:
    """First signal: stop in order. A second one meets the default action and ends the process at once."""
    loop = asyncio.get_running_loop()

    def begin_stop() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, begin_stop)
