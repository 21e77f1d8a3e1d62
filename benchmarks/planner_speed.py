"""How long does a plan take? `python -m benchmarks.planner_speed`: by models, endpoints and ranges of rates.

The family is made up: 10,000 search rows, models whose busy times rise from 1 to 40 ms for one row (a row more takes an
eighth of that), the SLO ten times that of the largest, the rates of a Zipf prior. The endpoints are alike, with one
slot each. Every plan is made in a process of its own, on two cores at most, from scratch: seconds are those of the
whole process, start and imports included, and memory is its highest. Only the simulator is compiled before, as it is
once per installation. Nothing is certified, since that takes no time to speak of.
"""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

# One thread per process: no thread pools behind numpy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click
import msgspec
from rich.console import Console

from benchmarks.growth_plot import draw_growth
from benchmarks.search import made_up_family
from cascadeserve.artefacts import Artefact, write_json
from cascadeserve.cluster import Cluster, CpuDevice, Endpoint
from cascadeserve.gear_plan import TensorSpec
from planner.goal import FamilyGoal, Zipf, rate_prior
from planner.host import describe_host
from planner.inputs import Inputs
from planner.planning import plan_family
from planner.profile import BusyEntry, Host, ModelProfile, Profile

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "local" / "planner_speed.json"
_CORES = 2
_ROWS = 10_000
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
# of one row, of the smallest and of the largest model; and what each further row takes of that
_BUSY_S, _ROW_FRAC = (0.001, 0.040), 0.125
_SLO_BATCHES = 10.0
# rows per second that the prior goes up to: what the plan reaches, about
_RATE_PER_ENDPOINT = 1_600.0
_GAIN = 3.2
_MODELS, _ENDPOINTS, _RANGES = 5, 16, 20
_BAR_RUNS = 3


class Size(Artefact, frozen=True, kw_only=True):
    """What is planned for."""

    models: int = _MODELS
    endpoints: int = _ENDPOINTS
    ranges: int = _RANGES


class Point(Artefact, frozen=True, kw_only=True):
    """One plan: seconds of the process, by the clock and of the processor, those of planning, its most memory."""

    size: Size
    wall_s: float
    cpu_s: float
    plan_s: float
    peak_rss_bytes: int
    gears: int
    top_rate_per_s: float


class PlannerSpeed(Artefact, frozen=True, kw_only=True):
    """The whole run; `bar` is the median by wall_s of `bar_runs`, with the most memory of all of them."""

    date: str
    command: str
    machine: Host
    cores: int
    bar: Point
    bar_runs: tuple[Point, ...]
    by_models: tuple[Point, ...]
    by_endpoints: tuple[Point, ...]
    by_ranges: tuple[Point, ...]


def made_up_inputs(size: Size, rows: int = _ROWS) -> Inputs:
    """All that a plan of this size is made from."""
    steps = max(size.models - 1, 1)
    search, _ = made_up_family(rows, size.models, gain=_GAIN / steps)
    lowest_s, highest_s = _BUSY_S
    models = {}
    for index, name in enumerate(search.models):
        one_s = lowest_s * (highest_s / lowest_s) ** (index / steps)
        busy = [(batch, one_s * (1.0 + _ROW_FRAC * (batch - 1))) for batch in _BATCHES]
        models[name] = ModelProfile(busy=tuple(BusyEntry(batch=n, concurrency=1, busy_s=s) for n, s in busy))
    endpoints = tuple(
        Endpoint(
            name=f"e{index}",
            grpc=f"10.0.{index // 250}.{index % 250 + 1}:8001",
            http=f"10.0.{index // 250}.{index % 250 + 1}:8000",
            metrics=f"10.0.{index // 250}.{index % 250 + 1}:8002",
            device=CpuDevice(cores=(0,)),
        )
        for index in range(size.endpoints)
    )
    zipf = Zipf(ranges=size.ranges, max_rate_per_s=_RATE_PER_ENDPOINT * size.endpoints)
    goal = FamilyGoal(slo_per_reference_batch=_SLO_BATCHES, max_epsilon=0.05, zipf=zipf)
    return Inputs(
        family=search.family,
        goal=goal,
        prior=rate_prior(goal, Path("goal.toml"), 0),
        profiles={"cpu": Profile(schema_version=1, device_kind="cpu", models=models)},
        cluster=Cluster(schema_version=1, endpoints=endpoints),
        search=search,
        tensors=(TensorSpec(name="x", datatype="FP32", shape=(3,)),),
        num_classes=10,
        largest_batch=dict.fromkeys(models, _BATCHES[-1]),
        digests={},
    )


def plan_once(size: Size) -> Point:
    """Make a plan in this process; its `wall_s` is that of planning, until `measured` knows better."""
    inputs = made_up_inputs(size)
    started_s = time.perf_counter()
    family = plan_family(inputs, None).families[inputs.family]
    plan_s = time.perf_counter() - started_s
    planned = [gear for gear in family.gears if not gear.degraded]
    return Point(
        size=size,
        wall_s=plan_s,
        cpu_s=time.process_time(),
        plan_s=plan_s,
        # Linux counts in KiB
        peak_rss_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        gears=len(planned),
        top_rate_per_s=planned[-1].upper_rate_per_s,
    )


def measured(size: Size) -> Point:
    """Make a plan in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.planner_speed", "--once", msgspec.json.encode(size).decode()]
    started_s = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    wall_s = time.perf_counter() - started_s
    point = msgspec.structs.replace(msgspec.json.decode(done.stdout, type=Point), wall_s=wall_s)
    click.echo(f"{size}: {wall_s:.1f} s, {point.peak_rss_bytes / 2**20:.0f} MiB, {point.gears} gears", err=True)
    return point


def median_run(runs: list[Point]) -> Point:
    """Median of an odd number of runs by wall_s, with the most memory of all."""
    middle = median(run.wall_s for run in runs)
    found = next(run for run in runs if run.wall_s == middle)
    return msgspec.structs.replace(found, peak_rss_bytes=max(run.peak_rss_bytes for run in runs))


@click.command()
@click.option("--bar-only", is_flag=True, help="Leave out how the time grows.")
@click.option("--result", type=click.Path(path_type=Path), default=RESULT)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw how the time grows, as SVG.")
@click.option("--once", help="Make one plan of this size and print what it took.", hidden=True)
def main(bar_only: bool, result: Path, plot: Path | None, once: str | None) -> None:  # noqa: FBT001 - an option
    """Measure, write the result, print it."""
    if once is not None:
        click.echo(msgspec.json.encode(plan_once(msgspec.json.decode(once, type=Size))))
        return
    cores = sorted(os.sched_getaffinity(0))[:_CORES]
    os.sched_setaffinity(0, cores)
    # compiles the simulator, if that was not done yet
    measured(Size(models=2, endpoints=1, ranges=1))
    runs = [measured(Size()) for _ in range(_BAR_RUNS)]
    bar = median_run(runs)

    def grown(sizes: list[Size]) -> tuple[Point, ...]:
        return () if bar_only else tuple(bar if size == Size() else measured(size) for size in sizes)

    found = PlannerSpeed(
        date=datetime.now(UTC).date().isoformat(),
        command=shlex.join(["python", "-m", "benchmarks.planner_speed", *sys.argv[1:]]),
        machine=describe_host(),
        cores=len(cores),
        bar=bar,
        bar_runs=tuple(runs),
        by_models=grown([Size(models=models) for models in (2, 3, 5, 8, 12)]),
        by_endpoints=grown([Size(endpoints=endpoints) for endpoints in (1, 2, 4, 16, 64, 256)]),
        by_ranges=grown([Size(ranges=ranges) for ranges in (1, 5, 20, 64)]),
    )
    write_json(result, found)
    if plot is not None and not bar_only:
        draw_growth(plot, found)
    Console().print(
        f"{bar.size.models} models x {bar.size.endpoints} endpoints x {bar.size.ranges} ranges: {bar.wall_s:.1f} s "
        f"({bar.cpu_s:.1f} s of the processor), {bar.peak_rss_bytes / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()
