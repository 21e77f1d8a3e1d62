"""How fast is the simulator? `python -m benchmarks.simulator_speed`, in simulated rows per second of one core.

Two stages on one device, single rows, a gear that is held but whose demand is worked out at every tick. Nothing can
come of a busy device or of large batches: utilisation is about 0.6 and batches hold less than 4 rows on average. The
process is pinned to one core. Counted is `Simulator.run` from the load to the result; compiling, which is done once
per installation and then kept, and drawing the load stand apart. Rows per second is the median over the runs, by
process CPU time; by the clock it is what a noisy neighbour leaves.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

# One core, whoever else measures on this machine: no thread pools behind numpy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click
import msgspec
import numpy as np
from rich.console import Console

from cascadeserve.artefacts import Artefact, decode_json, write_json
from cascadeserve.gear_plan import GearPlan
from cascadeserve.replay.arrivals import poisson
from planner.host import describe_host
from planner.profile import Host, Profile
from planner.records import ModelAnswers, SearchRecords

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "local" / "simulator_speed.json"
_RECORDS = 10_000
_ESCALATED = 0.25
_BUSY_S = {"small": [(1, 0.0005), (64, 0.0040)], "large": [(1, 0.0020), (64, 0.0640)]}
# at which the device is about this busy
_RATE_PER_S, _UTILISATION = 632.0, 0.6


class SpeedResult(Artefact, frozen=True, kw_only=True):
    """The whole run; `mean_batch` is over the batches of both models, by model beside it."""

    date: str
    command: str
    machine: Host
    rows: int
    runs: int
    rows_per_s: float
    rows_per_s_by_clock: float
    slowest_rows_per_s: float
    utilisation: float
    # from 0.6
    utilisation_off_by: float
    mean_batch: float
    mean_batch_by_model: dict[str, float]
    refused: int
    # the first run of all, which compiles
    compile_s: float
    compile_cpu_s: float


def _plan() -> GearPlan:
    stages = [{"model": "small", "threshold": _ESCALATED}, {"model": "large"}]
    models = {name: {"max_batch": 64, "busy_s": points} for name, points in _BUSY_S.items()}
    family = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}],
        "num_classes": 2,
        "models": models,
        "reference_model": "large",
        "slo_s": 0.1,
        "max_rows_per_request": 1,
        "ladder": [{"name": "both", "stages": stages, "reach": [1.0, _ESCALATED]}],
        "gears": [
            {"name": "only", "layout": "all", "min_rate_per_s": 0.0, "max_rate_per_s": 1000.0, "ladder_entry": "both"}
        ],
    }
    layout = {"name": "all", "instances": {"device": dict.fromkeys(_BUSY_S, 1)}}
    document = {"schema_version": 1, "name": "speed", "families": {"made": family}, "layouts": [layout]}
    return decode_json(msgspec.json.encode(document), GearPlan)


def _profile() -> Profile:
    models = {
        name: {"busy": [{"batch": rows, "concurrency": 1, "busy_s": seconds} for rows, seconds in points]}
        for name, points in _BUSY_S.items()
    }
    return decode_json(msgspec.json.encode({"schema_version": 1, "device_kind": "cpu", "models": models}), Profile)


def _records() -> SearchRecords:
    evenly = ((np.arange(_RECORDS) + 0.5) / _RECORDS).astype(np.float32)
    zeros = np.zeros(_RECORDS, np.int64)
    models = {name: ModelAnswers(zeros, np.random.default_rng(0).permutation(evenly)) for name in _BUSY_S}
    return SearchRecords("made", models, zeros, np.arange(_RECORDS))


def measure(rows: int, runs: int, *, cache: Path) -> SpeedResult:
    """Simulate about `rows` rows `runs` times; the machine code is compiled anew into the empty folder `cache`."""
    # before the import, which reads it
    os.environ["XDG_CACHE_HOME"] = str(cache)
    from planner.simulator import Simulator, draw_load  # noqa: PLC0415

    duration_s = rows / _RATE_PER_S
    rng = np.random.default_rng(1)
    load = draw_load(poisson(_RATE_PER_S, duration_s, rng), duration_s, _RECORDS, rng)
    first = draw_load(np.array([0.0]), 0.1, _RECORDS, rng)
    simulator = Simulator(_plan(), "made", _records(), {"device": _profile()})
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    simulator.run(first)
    compile_s, compile_cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    cpu_s, clock_s = [], []
    for _ in range(runs):
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        outcome = simulator.run(load)
        cpu_s.append(time.process_time() - started_cpu_s)
        clock_s.append(time.perf_counter() - started_s)
    total = len(load.row_index)
    utilisation = outcome.busy_s["device"] / duration_s
    return SpeedResult(
        date=datetime.now(UTC).date().isoformat(),
        command=shlex.join(["python", "-m", "benchmarks.simulator_speed", *sys.argv[1:]]),
        machine=describe_host(),
        rows=total,
        runs=runs,
        rows_per_s=total / float(np.median(cpu_s)),
        rows_per_s_by_clock=total / float(np.median(clock_s)),
        slowest_rows_per_s=total / max(cpu_s),
        utilisation=utilisation,
        utilisation_off_by=abs(utilisation - _UTILISATION),
        mean_batch=sum(outcome.batch_rows.values()) / sum(outcome.batches.values()),
        mean_batch_by_model={name: outcome.batch_rows[name] / outcome.batches[name] for name in _BUSY_S},
        refused=outcome.refused,
        compile_s=compile_s,
        compile_cpu_s=compile_cpu_s,
    )


@click.command()
@click.option("--rows", type=click.IntRange(min=1000), default=2_000_000, show_default=True, help="Of each run, about.")
@click.option("--runs", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--result", type=click.Path(path_type=Path), default=RESULT)
def main(rows: int, runs: int, result: Path) -> None:
    """Measure, write the result, print it."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(prefix="cascadeserve-speed-") as folder:
        measured = measure(rows, runs, cache=Path(folder))
    Console().print(
        f"{measured.rows_per_s:,.0f} rows/s on one core ({measured.rows_per_s_by_clock:,.0f} by the clock) at "
        f"utilisation {measured.utilisation:.3f} and {measured.mean_batch:.2f} rows per batch; compiled in "
        f"{measured.compile_s:.1f} s"
    )
    write_json(result, measured)


if __name__ == "__main__":
    main()
