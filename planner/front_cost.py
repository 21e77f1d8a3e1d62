"""What the orchestrator itself costs: measured by running one in front of the endpoint that is profiled.

It serves the cheapest model alone, and its processor time is read while loads of three kinds pass: single rows in
batches of one, single rows in large batches, many rows per request. That gives its time per request, per batch and per
row. Load generator and orchestrator share their cores here, as they do in the demo, so the generator's own time per
request is part of it; where clients live elsewhere that errs on the safe side.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from scipy.optimize import nnls

from cascadeserve.artefacts import read_json, write_json
from cascadeserve.errors import CascadeServeError, ServerStartFailed
from cascadeserve.local_stack import free_ports
from cascadeserve.process import spawn, stop
from cascadeserve.report import ServingReport
from planner.profile import FrontCost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from planner.triton_calls import ServedModel

_READY_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 15.0
# above this rate the plan of the measurement fills its batches
_LARGE_BATCHES_FROM_PER_S = 500.0
_LARGE_BATCH, _LARGE_BATCH_WAIT_S = 16, 0.05
_FAMILY = "front_cost"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Phase:
    """A load of the measurement: rows per second, rows per request, seconds."""

    rate_per_s: float
    rows: int
    duration_s: float


# The first one warms up and gives path_s; no load may come near to what one core can take.
PHASES = (Phase(250.0, 1, 4.0), Phase(1000.0, 1, 3.0), Phase(1600.0, 32, 3.0), Phase(250.0, 1, 3.0))


@dataclass(frozen=True)
class Counted:
    """What passed in a phase and the processor time that it took."""

    requests: int
    batches: float
    rows: float
    cpu_s: float


def solve(counted: Sequence[Counted]) -> FrontCost:
    """Least squares without negative costs, each phase weighted alike: time per request, per batch and per row."""
    counts = np.array([[phase.requests, phase.batches, phase.rows] for phase in counted], float)
    spent_s = np.array([phase.cpu_s for phase in counted])
    (request_s, batch_s, row_s), _ = nnls(counts / spent_s[:, None], np.ones(len(counted)))
    return FrontCost(request_s=float(request_s), batch_s=float(batch_s), row_s=float(row_s))


@dataclass(frozen=True)
class FrontSession:
    """One measurement: a cluster file with the endpoint, its cheapest model, rows for it, and what `serve` may use."""

    cluster: Path
    endpoint: str
    model: ServedModel
    # of one row of it, alone on the device
    busy_s: float
    rows: Path
    state: Path
    cores: Sequence[int]

    async def measure(self, on_phase: Callable[[], None]) -> FrontCost:
        """Run all phases.

        Raises:
            CascadeServeError: the orchestrator did not come up, or requests failed.

        """
        shutil.rmtree(self.state, ignore_errors=True)
        self.state.mkdir(parents=True)
        write_json(self.state / "plan.json", self._plan())
        counted, lone_s = [], []
        async with self._serving() as (url, pid):
            for phase in PHASES:
                before = await _read(url, pid)
                report = await self._replay(url, phase)
                after = await _read(url, pid)
                batches, rows, cpu_s = np.subtract(after, before)
                counted.append(Counted(report.ledger.sent, batches, rows, cpu_s + (report.generator_cpu_s or 0.0)))
                if phase.rows == 1 and phase.rate_per_s < _LARGE_BATCHES_FROM_PER_S:
                    lone_s.append(report.p50_s or 0.0)
                on_phase()
        # the first phase warmed up
        cost = solve(counted[1:])
        known_s = self.busy_s + cost.request_s + cost.batch_s + cost.row_s
        return FrontCost(
            request_s=cost.request_s,
            batch_s=cost.batch_s,
            row_s=cost.row_s,
            # latency is what a lone request takes beyond what is known
            path_s=max(min(lone_s) - known_s, 0.0),
        )

    def _plan(self) -> dict[str, Any]:
        gear = {"layout": "one", "ladder_entry": "alone"}
        name, max_batch = self.model.name, self.model.max_batch
        large = {"min_batch": min(_LARGE_BATCH, max_batch), "max_batch": max_batch, "max_wait_s": _LARGE_BATCH_WAIT_S}
        return {
            "schema_version": 1,
            "name": "front-cost",
            "families": {
                _FAMILY: {
                    "inputs": [
                        {"name": one.name, "datatype": one.datatype, "shape": one.shape[1:]}
                        for one in self.model.signature.inputs
                    ],
                    "num_classes": 1,
                    "models": {name: {"max_batch": max_batch, "busy_s": [[1, self.busy_s]]}},
                    "reference_model": name,
                    "slo_s": 1.0,
                    "max_rows_per_request": max_batch,
                    "ladder": [{"name": "alone", "stages": [{"model": name}], "reach": [1.0]}],
                    "gears": [
                        gear | {"name": "small", "min_rate_per_s": 0.0, "max_rate_per_s": _LARGE_BATCHES_FROM_PER_S},
                        gear
                        | {
                            "name": "large",
                            "min_rate_per_s": _LARGE_BATCHES_FROM_PER_S,
                            "max_rate_per_s": 1e6,
                            "triggers": {name: large},
                        },
                    ],
                }
            },
            "layouts": [{"name": "one", "instances": {self.endpoint: {name: 1}}}],
        }

    @contextlib.asynccontextmanager
    async def _serving(self) -> AsyncIterator[tuple[str, int]]:
        http_port, grpc_port = free_ports(2)
        url = f"http://127.0.0.1:{http_port}"
        log_path = self.state / "serve.log"
        with log_path.open("wb") as log:
            process = await spawn(
                _command("serve", f"--plan={self.state / 'plan.json'}", f"--cluster={self.cluster}",
                         f"--http-port={http_port}", f"--grpc-port={grpc_port}", "--linger=0"),
                cores=self.cores,
                log=log,
            )  # fmt: skip
            try:
                await _wait_ready(url, process, log_path)
                yield url, process.pid
            finally:
                await stop(process, kill_after_s=_STOP_TIMEOUT_S)

    async def _replay(self, url: str, phase: Phase) -> ServingReport:
        report = self.state / "report.json"
        report.unlink(missing_ok=True)
        with (self.state / "replay.log").open("ab") as log:
            process = await spawn(
                _command("replay", f"--url={url}", f"--model={_FAMILY}", f"--rows={self.rows}",
                         f"--rate={phase.rate_per_s}", f"--duration={phase.duration_s}",
                         f"--rows-per-request={phase.rows}", f"--report={report}"),
                cores=self.cores,
                log=log,
            )  # fmt: skip
            try:
                await process.wait()
            finally:
                await stop(process, kill_after_s=_STOP_TIMEOUT_S)
        if not report.exists():
            raise CascadeServeError(f"the load generator failed; {log.name} says why")
        measured = read_json(report, ServingReport)
        if measured.ledger.failed or measured.ledger.lost:
            raise CascadeServeError(f"requests failed while the orchestrator was measured: {measured.errors}")
        return measured


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cascadeserve", *arguments]


async def _wait_ready(url: str, process: asyncio.subprocess.Process, log: Path) -> None:
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + _READY_TIMEOUT_S
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as session:
        while loop.time() < give_up_s and process.returncode is None:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{url}/v2/health/ready") as response:
                    if response.ok:
                        return
            await asyncio.sleep(0.1)
    raise ServerStartFailed(f"the orchestrator did not come up; {log} says why")


async def _read(url: str, pid: int) -> tuple[float, float, float]:
    """(batches, rows in them, processor seconds) since the orchestrator started."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        text = await response.text()
    batches = rows = 0.0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            batches += sample.value if sample.name == "cascadeserve_batch_rows_count" else 0.0
            rows += sample.value if sample.name == "cascadeserve_batch_rows_sum" else 0.0
    fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return batches, rows, (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
