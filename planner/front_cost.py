"""What the orchestrator itself costs: measured by running one in front of the endpoint that is profiled.

It serves the cheapest model alone, and its processor time is read while loads of three kinds pass: single rows in small
batches, single rows in large batches, many rows per request. That gives its time per request, per batch and per row.
All pass twice, so that a moment in which the core was slow does not become the cost of a batch. All three are loads
that keep it rather busy: at a low rate it sleeps and wakes between requests, which costs more for each and matters
less. How much of the time per request goes into its answer is read off the requests of large batches: they are answered
one after the other, so far apart. Load generator and orchestrator share their cores here, as they do in the demo, so
the generator's own time per request is part of it; where clients live elsewhere that errs on the safe side.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from scipy.optimize import nnls

from cascadeserve.artefacts import write_json
from cascadeserve.errors import CascadeServeError
from cascadeserve.local_stack import cascadeserve_command, free_ports, run_replay, wait_ready
from cascadeserve.process import spawn, stop
from planner.profile import FrontCost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from numpy.typing import NDArray

    from cascadeserve.report import ServingReport
    from planner.triton_calls import ServedModel

_READY_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 15.0
# triggers by their least batch, largest batch, longest wait
_SMALL, _LARGE = (1, 2, 0.0), (16, 64, 0.05)
_FAMILY = "front_cost"
# answers of one batch follow each other within that, those of two do not
_SAME_BATCH_S = 4e-3
_FEWEST_ANSWERS = 4
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Phase:
    """A load of the measurement: rows per second, rows per request, seconds; `counts` if it is one of the three."""

    rate_per_s: float
    rows: int
    duration_s: float
    counts: bool = True


_LONE = Phase(100.0, 1, 2.0, counts=False)
# by batches: first a load of lone requests, which warms up and shows their latency
PHASES = {
    _SMALL: (_LONE, Phase(800.0, 1, 2.0)),
    _LARGE: (Phase(800.0, 1, 1.0, counts=False), Phase(800.0, 1, 2.0), Phase(1600.0, 32, 2.0)),
}
_ROUNDS = 2
NUM_PHASES = _ROUNDS * sum(map(len, PHASES.values()))


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


def time_per_answer_s(done_s: NDArray[np.float64]) -> float:
    """Seconds from one answer to the next of the same batch, median over the batches; 0 where there are none."""
    done_s = np.sort(done_s[~np.isnan(done_s)])
    batches = np.split(done_s, np.flatnonzero(np.diff(done_s) > _SAME_BATCH_S) + 1)
    each_s = [(batch[-1] - batch[0]) / (len(batch) - 1) for batch in batches if len(batch) >= _FEWEST_ANSWERS]
    return float(np.median(each_s)) if each_s else 0.0


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
        counted: list[Counted] = []
        lone_s: list[float] = []
        answer_s: list[float] = []
        for batches, phases in _ROUNDS * [*PHASES.items()]:
            write_json(self.state / "plan.json", self._plan(*batches))
            async with self._serving() as (url, pid):
                for phase in phases:
                    before = await _read(url, pid)
                    report, done_s = await self._replay(url, phase)
                    sent, rows, cpu_s = np.subtract(await _read(url, pid), before)
                    if phase.counts:
                        cpu_s += report.generator_cpu_s or 0.0
                        counted.append(Counted(report.ledger.sent, sent, rows, cpu_s))
                        if batches == _LARGE and phase.rows == 1:
                            answer_s.append(time_per_answer_s(done_s))
                    elif phase is _LONE:
                        lone_s.append(report.p50_s or 0.0)
                    on_phase()
        cost = solve(counted)
        known_s = self.busy_s + cost.request_s + cost.batch_s + cost.row_s
        per_answer_s = min(statistics.fmean(answer_s), cost.request_s)
        return msgspec.structs.replace(
            cost,
            request_s=cost.request_s - per_answer_s,
            answer_s=per_answer_s,
            path_s=max(statistics.fmean(lone_s) - known_s, 0.0),
        )

    def _plan(self, min_batch: int, max_batch: int, max_wait_s: float) -> dict[str, Any]:
        name, most = self.model.name, self.model.max_batch
        trigger = {"min_batch": min(min_batch, most), "max_batch": min(max_batch, most), "max_wait_s": max_wait_s}
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
                    "models": {name: {"max_batch": most, "busy_s": [[1, self.busy_s]], "version": self.model.version}},
                    "reference_model": name,
                    "slo_s": 1.0,
                    "max_rows_per_request": most,
                    "ladder": [{"name": "alone", "stages": [{"model": name}], "reach": [1.0]}],
                    "gears": [
                        {
                            "name": "only",
                            "layout": "one",
                            "min_rate_per_s": 0.0,
                            "max_rate_per_s": 1e6,
                            "ladder_entry": "alone",
                            "triggers": {name: trigger},
                        }
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
                cascadeserve_command("serve", f"--plan={self.state / 'plan.json'}", f"--cluster={self.cluster}",
                         f"--http-port={http_port}", f"--grpc-port={grpc_port}", "--linger=0"),
                cores=self.cores,
                log=log,
            )  # fmt: skip
            try:
                await wait_ready(url, process, timeout_s=_READY_TIMEOUT_S, log=log_path)
                yield url, process.pid
            finally:
                await stop(process, kill_after_s=_STOP_TIMEOUT_S)

    async def _replay(self, url: str, phase: Phase) -> tuple[ServingReport, NDArray[np.float64]]:
        """Report, and when each request was answered [requests]."""
        records = self.state / "records.npz"
        with (self.state / "replay.log").open("ab") as log:
            measured = await run_replay(
                self.state / "report.json",
                f"--url={url}", f"--model={_FAMILY}", f"--rows={self.rows}", f"--rate={phase.rate_per_s}",
                f"--duration={phase.duration_s}", f"--rows-per-request={phase.rows}", f"--records={records}",
                cores=self.cores, log=log, before_others=True,
            )  # fmt: skip
        if measured.ledger.failed or measured.ledger.lost:
            raise CascadeServeError(f"requests failed while the orchestrator was measured: {measured.errors}")
        with np.load(records) as arrays:
            return measured, arrays["done_s"]


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
