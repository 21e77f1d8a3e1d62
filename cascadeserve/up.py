"""`cascadeserve up`: the Tritons of a cluster on this machine, and the orchestrator in front of them."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cascadeserve.cluster import Cluster, read_cluster
from cascadeserve.errors import CascadeServeError, ServerStartFailed
from cascadeserve.gear_plan import GearPlan, read_gear_plan
from cascadeserve.local_triton.server import LocalTriton
from cascadeserve.local_triton.working_copy import model_names, prepare_working_copy
from cascadeserve.plan_fits import check_plan_fits_repository
from cascadeserve.process import spawn, stop
from cascadeserve.replay.settings import parse_cores

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)

RESTART_AFTER_S = 1.0
_ORCHESTRATOR_STOP_S = 20.0


@click.command()
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), required=True, help="Gear plan.")
@click.option("--cluster", "cluster_path", type=click.Path(path_type=Path), required=True, help="Cluster file.")
@click.option("--repository", type=click.Path(path_type=Path), default="model_repository", show_default=True)
@click.option("--state", type=click.Path(path_type=Path), default=".cascadeserve", show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address the orchestrator listens on.")
@click.option("--http-port", type=click.IntRange(1, 65535), default=8080, show_default=True)
@click.option("--grpc-port", type=click.IntRange(1, 65535), default=8081, show_default=True)
@click.option(
    "--fronts", type=click.IntRange(0, 64), default=0, show_default=True,
    help="Front processes of the orchestrator; see `serve`.",
)  # fmt: skip
@click.option("--cores", default="", help="Cores for the orchestrator, such as 1 or 2,3 [default: any].")
@click.argument("serve_options", nargs=-1, type=click.UNPROCESSED)
def up(
    plan_path: Path,
    cluster_path: Path,
    repository: Path,
    state: Path,
    host: str,
    http_port: int,
    grpc_port: int,
    fronts: int,
    cores: str,
    serve_options: tuple[str, ...],
) -> None:
    """Run a tritonserver for every endpoint of the cluster, and the orchestrator in front of them.

    A Triton that ends by itself is started again. Logs of the servers are under the state directory. At SIGHUP what is
    new in the repository is taken in, and the plan is read again and put in force without a pause; see `serve`.
    Further options of `serve` may follow behind `--`, such as `-- --max-rows 256`.
    """
    cluster = read_cluster(cluster_path)
    plan = read_gear_plan(plan_path, cluster)
    state = state.resolve()
    arguments = [
        "serve",
        f"--plan={plan_path}",
        f"--cluster={cluster_path}",
        f"--repository={state / 'model_repository'}",
        f"--host={host}",
        f"--http-port={http_port}",
        f"--grpc-port={grpc_port}",
        f"--fronts={fronts}",
        *serve_options,
    ]
    pinned = sorted(parse_cores(cores)) if cores else []
    model_names(repository)  # says so if it is no repository
    check_plan_fits_repository(plan, repository, path=plan_path)
    if absent := set(pinned) - os.sched_getaffinity(0):
        raise click.BadParameter(f"this process may not run on core {min(absent)}", param_hint="--cores")
    prepare = partial(prepare_working_copy, repository, cluster, state)
    sys.exit(asyncio.run(_run(plan, cluster, prepare, state, arguments, pinned)))


async def _run(
    plan: GearPlan, cluster: Cluster, prepare: Callable[[], Path], state: Path, arguments: list[str], cores: list[int]
) -> int:
    """Run everything until a signal comes or the orchestrator ends; returns the exit status."""
    working_copy = prepare()
    stop_event, hangup = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop_event.set)
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    (state / "logs").mkdir(exist_ok=True)
    logs = {endpoint.name: (state / "logs" / f"{endpoint.name}.log").open("ab") for endpoint in cluster.endpoints}
    servers = [
        LocalTriton(
            endpoint,
            repository=working_copy,
            models=sorted(plan.standing(plan.layouts[0]).get(endpoint.name, {})),
            state=state,
            log=logs[endpoint.name],
        )
        for endpoint in cluster.endpoints
    ]
    stopping = asyncio.create_task(stop_event.wait(), name="stop-signal")
    keepers: list[asyncio.Task[None]] = []
    try:
        starts = asyncio.create_task(_start_all(servers), name="start-tritons")
        await asyncio.wait({starts, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stop_event.is_set():
            starts.cancel()
            await asyncio.gather(starts, return_exceptions=True)
            return 0
        await starts
        orchestrator = await spawn([sys.executable, "-m", "cascadeserve", *arguments], cores=cores)
        keepers = [asyncio.create_task(_keep_up(server), name=f"keep-{server.endpoint.name}") for server in servers]
        keepers.append(asyncio.create_task(_pass_on(hangup, prepare, orchestrator), name="pass-on-hangup"))
        ended = asyncio.create_task(orchestrator.wait(), name="watch-orchestrator")
        try:
            await asyncio.wait({ended, stopping, *keepers}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # The orchestrator first: it answers what is open, for which it needs the servers.
            status = await stop(orchestrator, kill_after_s=_ORCHESTRATOR_STOP_S)
        if stop_event.is_set():
            return 0
        if status in (1, 2):  # it has said why
            return status
        raise ServerStartFailed(f"the orchestrator ended by itself with status {status}")
    finally:
        stopping.cancel()
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        await asyncio.gather(*(server.stop() for server in servers))
        for log in logs.values():
            log.close()


async def _start_all(servers: list[LocalTriton]) -> None:
    await asyncio.gather(*(server.start() for server in servers))


async def _keep_up(server: LocalTriton) -> None:
    """Start the server again whenever it ends by itself."""
    while True:
        if server.started:
            status = await server.wait()
            _log.error("tritonserver %s ended with status %d; starting it again", server.endpoint.name, status)
            await server.stop()
        await asyncio.sleep(RESTART_AFTER_S)
        try:
            await server.start()
        except CascadeServeError as error:
            _log.error("%s", error)


async def _pass_on(
    hangup: asyncio.Event, prepare: Callable[[], Path], orchestrator: asyncio.subprocess.Process
) -> None:
    """Take in what is new in the repository and have the orchestrator read its plan again, whenever asked to."""
    while True:
        await hangup.wait()
        hangup.clear()
        try:
            await asyncio.to_thread(prepare)
        except CascadeServeError as error:
            _log.error("the plan is not read again: %s", error)
            continue
        with suppress(ProcessLookupError):  # it has just ended
            orchestrator.send_signal(signal.SIGHUP)
