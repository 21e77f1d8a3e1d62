"""A whole serving stack on this machine for demos and benchmarks: `up` (or `triton`) and `replay` as processes.

Triton is pinned to the cores of the cluster file, everything else to the other cores, so that the load generator never
takes time from the models.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import sys
from typing import IO, TYPE_CHECKING, Any

import aiohttp
import numpy as np

from cascadeserve.artefacts import read_json
from cascadeserve.errors import CascadeServeError, ServerStartFailed
from cascadeserve.local_triton.working_copy import prepare_state_directory
from cascadeserve.process import spawn, stop
from cascadeserve.report import ServingReport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

_START_TIMEOUT_S = 90.0
_STOP_TIMEOUT_S = 40.0
TRITON_CORE = 0
_PORTS = range(15_000, 32_000)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now, all different.

    They are below those that Linux gives to outgoing connections (ip_local_port_range begins at 32768), so that none
    is taken by such a connection before its server listens.
    """
    free: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            return free
    raise CascadeServeError(f"fewer than {count} ports of 127.0.0.1 between {_PORTS[0]} and {_PORTS[-1]} are free")


class LocalStack:
    """Endpoints `triton0`, `triton1`, ... and an orchestrator, under a state directory, on free ports."""

    def __init__(
        self,
        state: Path,
        *,
        repository: Path,
        plan: Path | None = None,
        models: Sequence[str] = (),
        config_name: str | None = None,
        cores: Sequence[int] = (TRITON_CORE,),
    ) -> None:
        """Makes the state directory and a cluster file in it; nothing is started yet.

        Without a plan there is no orchestrator, only Triton with these `models` (default: all) in the configs named
        `config_name`, and `url` is that of the first. There is an endpoint on each of `cores`.
        """
        prepare_state_directory(state)
        self._state = state
        self._plan = plan
        self._repository = repository
        self._triton_options = [f"--model={model}" for model in models]
        if config_name is not None:
            self._triton_options.append(f"--config-name={config_name}")
        self._http_port, self._grpc_port, *ports = free_ports(2 + 3 * len(cores))
        self._triton_urls = [f"http://127.0.0.1:{port}" for port in ports[::3]]
        self.triton_url = self._triton_urls[0]
        self.url = self.triton_url if plan is None else f"http://127.0.0.1:{self._http_port}"
        self.grpc_address = f"127.0.0.1:{ports[1] if plan is None else self._grpc_port}"
        self.log = state / "up.log"
        self.cluster = state / "cluster.toml"
        endpoints = (
            f'[[endpoints]]\nname = "triton{number}"\n'
            f'http = "127.0.0.1:{http}"\ngrpc = "127.0.0.1:{grpc}"\nmetrics = "127.0.0.1:{metrics}"\n'
            f'device = {{ kind = "cpu", cores = [{core}] }}\n'
            for number, (core, http, grpc, metrics) in enumerate(
                zip(cores, ports[::3], ports[1::3], ports[2::3], strict=True)
            )
        )
        self.cluster.write_text("".join(("schema_version = 1\n", *endpoints)))
        # whatever else there is goes to the orchestrator and the load generator
        self._other_cores = sorted(os.sched_getaffinity(0) - set(cores)) or list(cores)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start everything, wait until it is ready, and stop it in the end."""
        with self.log.open("wb") as log:
            async with contextlib.AsyncExitStack() as started:
                for command, url in self._commands():
                    process = await spawn(command, log=log)
                    started.push_async_callback(stop, process, kill_after_s=_STOP_TIMEOUT_S)
                    await wait_ready(url, process, timeout_s=_START_TIMEOUT_S, log=self.log)
                yield

    def _commands(self) -> Iterator[tuple[list[str], str]]:
        common = [f"--cluster={self.cluster}", f"--repository={self._repository}"]
        if self._plan is None:
            for number, url in enumerate(self._triton_urls):
                state = self._state / (f"triton{number}" if number else "up")
                options = [f"--endpoint=triton{number}", f"--state={state}", *self._triton_options]
                yield [*cascadeserve_command("triton"), *common, *options], url
        else:
            cores = ",".join(map(str, self._other_cores))
            ports = [f"--http-port={self._http_port}", f"--grpc-port={self._grpc_port}"]
            options = [f"--plan={self._plan}", f"--state={self._state / 'up'}", *ports, f"--cores={cores}"]
            yield [*cascadeserve_command("up"), *common, *options], self.url

    async def replay(
        self, output: Path, url: str, model: str, rows: Path, *options: str, log: IO[bytes] | None = None
    ) -> tuple[ServingReport, dict[str, Any]]:
        """Run the load generator; returns its report and its records, kept as `<output>.json` and `<output>.npz`."""
        report, records = output.with_suffix(".json"), output.with_suffix(".npz")
        output.parent.mkdir(parents=True, exist_ok=True)
        command = [f"--url={url}", f"--model={model}", f"--rows={rows}", f"--records={records}", *options]
        measured = await run_replay(report, *command, cores=self._other_cores, log=log, before_others=True)
        with np.load(records) as arrays:
            return measured, {name: arrays[name] for name in arrays.files}


async def wait_ready(url: str, server: asyncio.subprocess.Process, *, timeout_s: float, log: Path) -> None:
    """Wait until a server answers that it is ready; raises ServerStartFailed, naming its log, if it does not."""
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + timeout_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as session:
        while loop.time() < give_up_s and server.returncode is None:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{url}/v2/health/ready") as response:
                    if response.status == 200:  # noqa: PLR2004
                        return
            await asyncio.sleep(0.1)
    raise ServerStartFailed(f"the servers did not come up; {log} says why")


async def run_replay(
    report: Path, *options: str, cores: Sequence[int], log: IO[bytes] | None, before_others: bool
) -> ServingReport:
    """Run the load generator as a process; `before_others` has it run as soon as it wants to, where that is allowed."""
    report.unlink(missing_ok=True)  # noqa: ASYNC240 - a local file, before a process of seconds
    # pinned from its first moment: while it still imports and reads it must not take time from the models either
    process = await spawn(cascadeserve_command("replay", f"--report={report}", *options), cores=cores, log=log)
    if before_others:
        run_first(process.pid)
    try:
        status = await process.wait()
    finally:
        await stop(process, kill_after_s=5.0)
    if not report.exists():  # noqa: ASYNC240
        raise CascadeServeError(f"the load generator ended with status {status} and wrote no report")
    return read_json(report, ServingReport)


def run_first(pid: int) -> bool:
    """Let a process run as soon as it wants to, before all others on its cores; False where we may not do that.

    A load generator that shares its cores is otherwise late by some milliseconds whenever something else is running. It
    takes its time from the orchestrator, never from the models, which have a core of their own.
    """
    try:
        os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        return False  # only root may, and who has been given real-time priority
    return True


def cascadeserve_command(*arguments: str) -> list[str]:
    """Command line of this package's commands, in this interpreter."""
    return [sys.executable, "-m", "cascadeserve", *arguments]
