"""The systems under load: orchestrator processes, and `cascadeserve replay` processes that probe them."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import aiohttp
import numpy as np

from benchmarks.gpu.client import BenchmarkFailed
from benchmarks.gpu.result import Probe
from cascadeserve.artefacts import read_json, write_json
from cascadeserve.process import spawn, stop
from cascadeserve.replay.summary import MAX_LAG_SHARE_OF_SLO
from cascadeserve.report import Ledger, ServingReport

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import GearPlan

_READY_TIMEOUT_S = 30.0
_STOP_S = 15.0
# what a probe may take beyond its own duration: start of the generators, answers under way, reports
_PROBE_GRACE_S = 40.0
# Least deadline of a request. The wheel's server can crash when a call's deadline passes while it executes (a race like
# triton-inference-server/server#8034), and a machine that does other work may stand still for four short SLOs.
_MIN_TIMEOUT_S = 2.0
_REPLAY_LOST = 1  # exit code for requests lost or answered twice, which the ledger tells as well


@dataclass
class System:
    """An orchestrator serving one plan."""

    name: str
    plan: GearPlan
    predicted_rate_per_s: float
    probes: list[Probe] = field(default_factory=list)
    rates_per_s: list[float] = field(default_factory=list)
    port: int = 0
    process: asyncio.subprocess.Process | None = None

    async def start(self, cluster: Path, state: Path) -> None:
        """Start the orchestrator and wait until it is ready."""
        plan_path = state / f"{self.name}-plan.json"
        write_json(plan_path, self.plan)
        self.port, grpc_port = free_ports(2)
        command = [
            *(sys.executable, "-m", "cascadeserve", "--log-level=warning", "serve"),
            *(f"--plan={plan_path}", f"--cluster={cluster}", f"--http-port={self.port}", f"--grpc-port={grpc_port}"),
        ]
        log_path = state / f"{self.name}-orchestrator.log"
        with log_path.open("wb") as log:
            self.process = await spawn(command, log=log)
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S):
                while not await _is_ready(f"http://127.0.0.1:{self.port}/v2/health/ready"):
                    if self.process.returncode is not None:
                        raise BenchmarkFailed(f"the orchestrator of {self.name!r} ended at once; {log_path} says why")
                    await asyncio.sleep(0.1)
        except TimeoutError as error:
            message = f"the orchestrator of {self.name!r} was not ready within {_READY_TIMEOUT_S:g} s; see {log_path}"
            raise BenchmarkFailed(message) from error

    async def stop(self) -> None:
        """Stop it."""
        if self.process is not None:
            await stop(self.process, kill_after_s=_STOP_S)

    def cpu_s(self) -> float:
        """Processor time it has used so far."""
        if self.process is None:
            raise RuntimeError("not started")
        return process_cpu_s(self.process.pid)


@dataclass(frozen=True, kw_only=True)
class Generator:
    """How load is made: `count` processes, `rows_per_request` rows each time, out of the rows file."""

    rows: Path
    rows_per_request: int
    count: int
    slo_s: float
    state: Path

    async def probe(self, system: System, rate_per_s: float, duration_s: float) -> Probe:
        """Load a system at one rate (rows per second) and judge it; the probe is kept with the system."""
        seed = 1000 * len(system.probes)
        folder = self.state / "probes"
        folder.mkdir(exist_ok=True)
        stems = [folder / f"{system.name}-{len(system.probes)}-{number}" for number in range(self.count)]
        cpu_before_s = system.cpu_s()
        async with asyncio.TaskGroup() as group:
            for number, stem in enumerate(stems):
                group.create_task(
                    self._replay(system, rate_per_s / self.count, duration_s, seed + number, stem), name=f"{stem.name}"
                )
        cpu_share = (system.cpu_s() - cpu_before_s) / duration_s
        reports = [read_json(stem.with_suffix(".json"), ServingReport) for stem in stems]
        latency_s, late_s = _latencies(stem.with_suffix(".npz") for stem in stems)
        ledger = total_ledger(report.ledger for report in reports)
        lag_s = max(report.generator_lag_p99_s for report in reports)
        p50_s, p95_s, p99_s = (_quantile(latency_s, share) for share in (0.5, 0.95, 0.99))
        stages = len(next(iter(system.plan.families.values())).ladder[0].stages)
        stage_rows = [0] * stages
        for shares in (shares for report in reports for shares in report.stages):
            stage_rows[shares.stage] += shares.rows
        found = Probe(
            rate_per_s=rate_per_s,
            answered_rate_per_s=sum(report.answered_rate_per_s for report in reports),
            duration_s=duration_s,
            rows_sent=sum(report.rows_sent for report in reports),
            p50_s=p50_s,
            p95_s=p95_s,
            p99_s=p99_s,
            verdict=judge(ledger, p95_s, _quantile(late_s, 0.95), self.slo_s),
            generator_lag_p99_s=lag_s,
            void=lag_s > MAX_LAG_SHARE_OF_SLO * self.slo_s,
            orchestrator_cpu_share=cpu_share,
            ledger=ledger,
            stage_rows=tuple(stage_rows),
        )
        system.probes.append(found)
        return found

    async def _replay(self, system: System, rate_per_s: float, duration_s: float, seed: int, stem: Path) -> None:
        command = [
            *(sys.executable, "-m", "cascadeserve", "replay"),
            *("--url", f"http://127.0.0.1:{system.port}", "--model", system.name, "--rows", str(self.rows)),
            *("--rate", f"{rate_per_s:.6g}", "--duration", f"{duration_s:g}", "--slo", f"{self.slo_s:.6g}"),
            *("--rows-per-request", str(self.rows_per_request), "--seed", str(seed)),
            *("--timeout", f"{max(4.0 * self.slo_s, _MIN_TIMEOUT_S):.6g}"),
            *("--report", str(stem.with_suffix(".json")), "--records", str(stem.with_suffix(".npz"))),
        ]
        log_path = stem.with_suffix(".log")
        with log_path.open("wb") as log:
            process = await spawn(command, log=log)
        try:
            async with asyncio.timeout(duration_s + _PROBE_GRACE_S):
                status = await process.wait()
        except TimeoutError as error:
            raise BenchmarkFailed(f"a load of {duration_s:g} s at {rate_per_s:.0f} rows/s did not end") from error
        finally:
            await stop(process, kill_after_s=1.0)
        if status not in (0, _REPLAY_LOST) or not stem.with_suffix(".json").exists():
            last = log_path.read_text(errors="replace").strip().splitlines()[-1:] or ["(no output)"]
            raise BenchmarkFailed(f"`cascadeserve replay` ended with status {status}: {last[0]}")


def judge(ledger: Ledger, p95_s: float | None, late_p95_s: float | None, slo_s: float) -> str:
    """`sustained`, or the first rule of a sustained rate that was broken.

    `late_p95_s` is over the last quarter of the load: above the SLO there, a queue was growing.
    """
    for what in ("lost", "duplicated", "failed", "refused"):
        if getattr(ledger, what):
            return what
    if p95_s is None or late_p95_s is None or p95_s > slo_s:
        return "p95 above SLO"
    return "queue grows" if late_p95_s > slo_s else "sustained"


def total_ledger(ledgers: Iterable[Ledger]) -> Ledger:
    """Sum of ledgers."""
    every = list(ledgers)
    return Ledger(**{name: sum(getattr(one, name) for one in every) for name in Ledger.__struct_fields__})


def _latencies(records: Iterable[Path]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Latency of all answered requests, and of those that were due in the last quarter of the load."""
    every, late = [], []
    for path in records:
        with np.load(path) as record:
            answered = record["outcome"] == record["outcome_names"].tolist().index("answered")
            scheduled_s, latency_s = record["scheduled_s"], record["done_s"] - record["scheduled_s"]
        every.append(latency_s[answered])
        late.append(latency_s[answered & (scheduled_s >= 0.75 * scheduled_s.max(initial=0.0))])
    return np.concatenate(every), np.concatenate(late)


def _quantile(values: NDArray[np.float64], share: float) -> float | None:
    return float(np.quantile(values, share)) if len(values) else None


def process_cpu_s(pid: int) -> float:
    """User and system time of a process, from /proc."""
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 - no path of a file that is ours
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_ports(count: int) -> list[int]:
    """Distinct ports that are free now; held together until all are chosen."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


async def _is_ready(url: str) -> bool:
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as session, session.get(url) as got:
            return got.status == 200  # noqa: PLR2004
    except (aiohttp.ClientError, TimeoutError):
        return False
