"""The Azure traces as loads of one model, and the plan that schedules them: for `benchmarks.scheduling`."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from cascadeserve.artefacts import decode_json
from cascadeserve.gear_plan import GearPlan
from planner.profile import Profile
from planner.records import ModelAnswers, SearchRecords
from planner.simulator import Load, Simulation, Simulator

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cascadeserve.gear_plan import Scheduling

_FOLDER = Path("../shared/data/traces/azure-llm-2023")
TRACES = {name: _FOLDER / f"AzureLLMInferenceTrace_{name}.csv" for name in ("code", "conv")}
FAMILY, MODEL = "tokens", "sleeper"
# A row of the profile. No request of the traces is less.
_TOKENS_PER_ROW = 16
# what a request takes on average, and the SLO as a multiple of it
MEAN_SERVICE_S = 0.02
_SLO_SERVICES = 10.0
SLO_S = _SLO_SERVICES * MEAN_SERVICE_S
# deadlines: every request draws its own, of so many SLOs; 4 is what it has without a `timeout`
_TIMEOUT_SLOS = (1.0, 4.0)


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests: times_s [n] from 0, and work [n] in rows of the profile, one per 16 tokens in and out."""

    times_s: NDArray[np.float64]
    work: NDArray[np.float64]

    @property
    def row_s(self) -> float:
        """Busy time of a row with which a request takes `MEAN_SERVICE_S` on average."""
        return MEAN_SERVICE_S / float(self.work.mean())


def read_trace(path: Path) -> Trace:
    """Read one of the CSV files."""
    times_s, tokens = [], []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            times_s.append(datetime.fromisoformat(line["TIMESTAMP"][:26]).timestamp())
            tokens.append(int(line["ContextTokens"]) + int(line["GeneratedTokens"]))
    order = np.argsort(times_s, kind="stable")
    since_s = np.array(times_s)[order]
    return Trace(since_s - since_s[0], np.maximum(np.array(tokens)[order] / _TOKENS_PER_ROW, 1.0))


def make_load(
    trace: Trace, load: float, servers: int, *, seconds: float | None = None
) -> tuple[Load, NDArray[np.float64]]:
    """The trace at a share of what so many servers can do, in its own rhythm; and the timeout of each request.

    Of the trace as many requests from its beginning as last `seconds`, about.
    """
    n = len(trace.times_s) if seconds is None else int(seconds * load * servers / MEAN_SERVICE_S)
    work, times_s = trace.work[:n], trace.times_s[:n]
    duration_s = float(work.sum()) * trace.row_s / (load * servers)
    times_s = times_s * (duration_s / float(times_s[-1]))
    timeout_s = SLO_S * np.random.default_rng(0).uniform(*_TIMEOUT_SLOS, n)
    return Load(times_s, np.ones(n, np.int64), np.zeros(n, np.int64), duration_s, work), timeout_s


def poisson_load(trace: Trace, load: float, servers: int, requests: int | None, *, seconds: float = 0.0) -> Load:
    """Poisson arrivals at that load, `requests` of them or for `seconds`, with work drawn from that of the trace."""
    rng = np.random.default_rng(1)
    rate_per_s = load * servers / MEAN_SERVICE_S
    n = int(seconds * rate_per_s) if requests is None else requests
    times_s = np.cumsum(rng.exponential(1.0, n))
    work = rng.choice(trace.work, n)
    # at that load exactly, whatever was drawn
    duration_s = float(work.sum()) * trace.row_s / (load * servers)
    times_s *= duration_s / times_s[-1]
    return Load(times_s, np.ones(n, np.int64), np.zeros(n, np.int64), duration_s, work)


def make_plan(trace: Trace, servers: int, scheduling: Scheduling) -> GearPlan:
    """One model that takes one request at a time, on every endpoint."""
    endpoints = [f"e{index}" for index in range(servers)]
    family = {
        "inputs": [{"name": "seconds", "datatype": "FP32", "shape": [1]}],
        "num_classes": None,
        "models": {MODEL: {"max_batch": 1, "busy_s": [(1, trace.row_s)]}},
        "reference_model": MODEL,
        "slo_s": SLO_S,
        "max_rows_per_request": 1,
        "ladder": [{"name": "only", "stages": [{"model": MODEL}], "reach": [1.0]}],
        "gears": [
            {"name": "only", "layout": "all", "min_rate_per_s": 0.0, "max_rate_per_s": 1e9, "ladder_entry": "only"}
        ],
    }
    document = {
        "schema_version": 1,
        "name": "scheduling",
        "families": {FAMILY: family},
        "layouts": [{"name": "all", "instances": {endpoint: {MODEL: 1} for endpoint in endpoints}}],
        "scheduling": scheduling,
    }
    return decode_json(msgspec.json.encode(document), GearPlan)


def simulate(plan: GearPlan, load: Load, timeout_s: NDArray[np.float64] | float) -> Simulation:
    """Send a load to the plan, on devices that do as it says."""
    points = plan.families[FAMILY].models[MODEL].busy_s
    busy = [{"batch": rows, "concurrency": 1, "busy_s": seconds} for rows, seconds in points]
    document = {"schema_version": 1, "device_kind": "cpu", "models": {MODEL: {"busy": busy}}}
    profile = decode_json(msgspec.json.encode(document), Profile)
    zero = np.zeros(1, np.int64)
    records = SearchRecords(FAMILY, {MODEL: ModelAnswers(zero, np.ones(1, np.float32))}, zero, zero)
    simulator = Simulator(plan, FAMILY, records, dict.fromkeys(plan.layouts[0].instances, profile))
    return simulator.run(load, timeout_s=timeout_s)
