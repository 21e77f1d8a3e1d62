"""Real Tritons with a model that sleeps for a time given by its input, and loads through the dispatcher to them."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.scheduling_load import FAMILY, MODEL, make_plan
from cascadeserve.artefacts import write_atomically
from cascadeserve.cluster import Cluster, CpuDevice, Endpoint
from cascadeserve.errors import Overloaded
from cascadeserve.gear_plan import Scheduling
from cascadeserve.local_stack import TRITON_CORE, free_ports
from cascadeserve.local_triton.server import LocalTriton
from cascadeserve.local_triton.working_copy import prepare_state_directory, prepare_working_copy
from orchestrator.app import Orchestrator
from orchestrator.request_options import RequestOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from numpy.typing import NDArray

    from benchmarks.scheduling_load import Trace
    from planner.simulator import Load

_CONFIG = """backend: "python"
max_batch_size: 1
input [ { name: "seconds" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [
  { name: "label" data_type: TYPE_INT64 dims: [ 1 ] },
  { name: "certainty" data_type: TYPE_FP32 dims: [ 1 ] }
]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""
# for what a call takes beside its work: enough of it to be of the usual length
_CALLS, _WORK = 200, 50.0
_PATIENCE_S = 60.0


class Sleepers:
    """So many servers on one core, which sleeping does not take."""

    def __init__(self, state: Path, servers: int) -> None:
        """`state` is a folder for the repository, the working copy and the logs."""
        prepare_state_directory(state)
        self._state = state
        ports = iter(free_ports(3 * servers))
        self._endpoints = [
            Endpoint(
                name=f"e{index}",
                **{kind: f"127.0.0.1:{next(ports)}" for kind in ("grpc", "http", "metrics")},
                device=CpuDevice(cores=(TRITON_CORE,)),
            )
            for index in range(servers)
        ]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Sleepers]:
        """Start the servers, and stop them in the end."""
        source = self._state / "sleeper_repository"
        model = Path(__file__).with_name("sleeper") / "model.py"
        (source / MODEL / "1").mkdir(parents=True, exist_ok=True)
        write_atomically(source / MODEL / "config.pbtxt", f'name: "{MODEL}"\n{_CONFIG}'.encode())
        write_atomically(source / MODEL / "1" / "model.py", model.read_bytes())
        copy = prepare_working_copy(source, self._cluster(len(self._endpoints)), self._state)
        async with contextlib.AsyncExitStack() as stack:
            for endpoint in self._endpoints:
                log = stack.enter_context((self._state / f"{endpoint.name}.log").open("wb"))
                server = LocalTriton(endpoint, repository=copy, models=[MODEL], state=self._state, log=log)
                await server.start()
                stack.push_async_callback(server.stop)
            yield self

    async def call_s(self, trace: Trace) -> float:
        """Seconds that a server is busy with a call beside what is stated, while calls wait: mean of some hundred."""
        async with self._orchestrator(trace, 1, Scheduling(admission="none")) as orchestrator:
            loop = asyncio.get_running_loop()
            began_s = loop.time()
            await asyncio.gather(*(_submit(orchestrator, _WORK, trace.row_s, _PATIENCE_S) for _ in range(_CALLS)))
            return max((loop.time() - began_s) / _CALLS - _WORK * trace.row_s, 0.0)

    async def run(
        self,
        trace: Trace,
        servers: int,
        how: Scheduling,
        sent: Load,
        timeout_s: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Send a load to the first servers; returns latency [n] from the scheduled times, NaN where refused."""
        loop = asyncio.get_running_loop()
        latency_s = np.full(len(sent.times_s), np.nan)
        works = np.ones(len(sent.rows)) if sent.work is None else sent.work
        async with self._orchestrator(trace, servers, how) as orchestrator:
            start_s = loop.time() + 0.1
            futures: list[asyncio.Future[Any]] = []
            door = orchestrator.entry
            looking = asyncio.create_task(door.run(orchestrator.show_entry))

            def answer(index: int, done: asyncio.Future[Any]) -> None:
                if done.exception() is None:
                    latency_s[index] = loop.time() - start_s - sent.times_s[index]

            for index, time_s in enumerate(sent.times_s.tolist()):
                if (left_s := start_s + time_s - loop.time()) > 0:
                    await asyncio.sleep(left_s)
                try:
                    door.admit(FAMILY)
                except Overloaded:
                    continue
                door.took(FAMILY, float(works[index]))
                future = _submit(orchestrator, float(works[index]), trace.row_s, float(timeout_s[index]))
                future.add_done_callback(lambda done, index=index: answer(index, done))
                futures.append(future)
            await asyncio.gather(*futures, return_exceptions=True)
            looking.cancel()
        return latency_s

    def _cluster(self, servers: int) -> Cluster:
        return Cluster(schema_version=1, endpoints=tuple(self._endpoints[:servers]))

    @contextlib.asynccontextmanager
    async def _orchestrator(self, trace: Trace, servers: int, how: Scheduling) -> AsyncIterator[Orchestrator]:
        cluster = self._cluster(servers)
        plan = make_plan(trace, servers, how)
        orchestrator = Orchestrator(lambda: plan, cluster, repository=None)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                while not all(endpoint.up for endpoint in orchestrator.dispatcher.endpoints):
                    for monitor in orchestrator.monitors.values():
                        await monitor.probe()
            yield orchestrator
        finally:
            await orchestrator.close()


def _submit(orchestrator: Orchestrator, work: float, row_s: float, timeout_s: float) -> asyncio.Future[Any]:
    dispatcher = orchestrator.dispatcher
    seconds = np.array([[work * row_s]], np.float32)
    return dispatcher.submit(
        dispatcher.families[FAMILY],
        [seconds],
        timeout_s=timeout_s,
        want_scores=False,
        options=RequestOptions(work_per_row=work),
    )
