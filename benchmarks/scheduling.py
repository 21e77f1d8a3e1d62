"""Which scheduling is best? `python -m benchmarks.scheduling`: every balancer x order x admission, on two Azure traces.

Every request of an hour of two production LLM services, in its own rhythm, with the tokens in and out as its work. They
go to one model that takes one request at a time, 20 ms on average; the SLO is ten times that, and every request draws
a deadline of 1 to 4 SLOs. The trace is stretched or pressed to a share of what the servers can do.

    simulator   the whole trace; one and four servers; loads 0.7, 0.9 and 1.1
    Triton      so many seconds of it; one and two real servers with a model that sleeps; load 0.9. Of one server only
                the default balancer, since there is nothing to balance

Mean and p95 are of the answered requests, in ms; goodput is answers inside the SLO per second. *Stable* is a Poisson
load at 0.95 of the capacity, with the traces' work and no deadline: how much longer answers take in the last quarter of
it than in the second, in the simulator; and what they take on Triton over what the simulator says of the same load.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

# One core, whoever else measures on this machine: no thread pools behind numpy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.scheduling_load import SLO_S, TRACES, Trace, make_load, make_plan, poisson_load, read_trace, simulate
from benchmarks.scheduling_triton import Sleepers
from cascadeserve.artefacts import Artefact, write_json
from cascadeserve.gear_plan import Scheduling
from cascadeserve.policy.admission import ADMISSIONS
from cascadeserve.policy.balancing import BALANCERS
from cascadeserve.policy.ordering import ORDERS
from planner.host import describe_host
from planner.profile import Host

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from planner.simulator import Load

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "local" / "scheduling.json"
_SERVERS, _LOADS = (1, 4), (0.7, 0.9, 1.1)
_ENDPOINTS, _TRITON_LOAD = (1, 2), 0.9
_STABLE_LOAD, _STABLE_REQUESTS = 0.95, 200_000
DEFAULT = Scheduling()
# whether queues grow is seen where nothing is refused
_UNREFUSED = Scheduling(admission="none")
BASE = Scheduling(balancer="round_robin", order="fifo", admission="none")


class Cell(Artefact, frozen=True, kw_only=True):
    """One run; `answered` and `within_slo` are shares of all requests."""

    trace: str
    servers: int
    load: float
    balancer: str
    order: str
    admission: str
    mean_ms: float
    p95_ms: float
    goodput_per_s: float
    within_slo: float
    answered: float


class Against(Artefact, frozen=True, kw_only=True):
    """The default against round robin and FIFO without admission, as a ratio of each figure; `load` is the same."""

    trace: str
    servers: int
    load: float
    mean: float
    p95: float
    goodput: float


class SchedulingResult(Artefact, frozen=True, kw_only=True):
    """The whole run; `triton` is empty and what is measured there null where it was left out."""

    date: str
    command: str
    machine: Host
    default: Scheduling
    cells: int
    wanted_cells: int
    # of all traces and loads at the most servers, the largest
    worst_p95_against_base: float
    worst_goodput_against_base: float
    # largest over traces and servers; and for comparison that of a load of 1.05
    stable_growth: float
    unstable_growth: float
    # mean latency on Triton over that of the simulator, at the load that is to be stable, by number of endpoints
    stable_on_triton: dict[str, float] | None
    worst_stable_on_triton: float | None
    against: list[Against]
    simulated: list[Cell]
    triton_cells: int
    triton_wanted_cells: int
    triton_seconds: float
    # what a call takes a real server beside what is stated, while calls wait
    triton_call_ms: float | None
    triton_against: list[Against]
    triton: list[Cell]


def schedulings(servers: int) -> list[Scheduling]:
    """Every combination; with one server only one balancer, if it is a real one."""
    balancers = BALANCERS if servers > 1 else (DEFAULT.balancer,)
    return [
        Scheduling(balancer=balancer, order=order, admission=admission)  # type: ignore[arg-type]
        for balancer, order, admission in product(balancers, ORDERS, ADMISSIONS)
    ]


def cell(trace: str, servers: int, load: float, how: Scheduling, sent: Load, latency_s: NDArray[np.float64]) -> Cell:
    """Sum up a run: latency_s [n], NaN where refused."""
    answered_s = latency_s[~np.isnan(latency_s)]
    inside = int(np.count_nonzero(answered_s <= SLO_S))
    return Cell(
        trace=trace,
        servers=servers,
        load=load,
        balancer=how.balancer,
        order=how.order,
        admission=how.admission,
        mean_ms=1e3 * float(answered_s.mean()),
        p95_ms=1e3 * float(np.quantile(answered_s, 0.95)),
        goodput_per_s=inside / sent.duration_s,
        within_slo=inside / len(latency_s),
        answered=len(answered_s) / len(latency_s),
    )


def compare(cells: Sequence[Cell], base: Scheduling) -> list[Against]:
    """Compare the default with another scheduling wherever both ran."""
    by_key = {(each.trace, each.servers, each.load, each.balancer, each.order, each.admission): each for each in cells}
    found = []
    for where in dict.fromkeys((each.trace, each.servers, each.load) for each in cells):
        mine = by_key[*where, DEFAULT.balancer, DEFAULT.order, DEFAULT.admission]
        # of one real server there is one balancer
        theirs = (
            by_key.get((*where, base.balancer, base.order, base.admission))
            or by_key[*where, DEFAULT.balancer, base.order, base.admission]
        )
        found.append(
            Against(
                trace=where[0],
                servers=where[1],
                load=where[2],
                mean=mine.mean_ms / theirs.mean_ms,
                p95=mine.p95_ms / theirs.p95_ms,
                goodput=mine.goodput_per_s / theirs.goodput_per_s,
            )
        )
    return found


def simulated_cells(traces: Mapping[str, Trace], console: Console) -> list[Cell]:
    """Run the whole traces through the simulator."""
    cells = []
    for (name, trace), servers in track(list(product(traces.items(), _SERVERS)), "simulator", console=console):
        for load in _LOADS:
            sent, timeout_s = make_load(trace, load, servers)
            for how in (
                Scheduling(balancer=balancer, order=order, admission=admission)  # type: ignore[arg-type]
                for balancer, order, admission in product(BALANCERS, ORDERS, ADMISSIONS)
            ):
                plan = make_plan(trace, servers, how)
                cells.append(cell(name, servers, load, how, sent, simulate(plan, sent, timeout_s).latency_s))
    return cells


def growth(traces: Mapping[str, Trace], load: float) -> float:
    """Mean latency of the last quarter of a long Poisson load over that of the second quarter; the largest."""
    found = []
    for trace, servers in product(traces.values(), _SERVERS):
        sent = poisson_load(trace, load, servers, _STABLE_REQUESTS)
        plan = make_plan(trace, servers, _UNREFUSED)
        latency_s = simulate(plan, sent, sent.duration_s).latency_s
        quarters = np.array_split(latency_s, 4)
        # no deadline is short enough to hide a queue
        found.append(float(quarters[3].mean() / quarters[1].mean()) if not np.isnan(latency_s).any() else np.inf)
    return max(found)


async def on_triton(
    traces: Mapping[str, Trace], state: Path, seconds: float, stable_s: float, console: Console
) -> tuple[float, list[Cell], dict[str, float]]:
    """(seconds of a call beside the sleep, the cells, mean latency over the simulated one by number of endpoints)."""
    cells, stable = [], {}
    async with Sleepers(state, max(_ENDPOINTS)).running() as sleepers:
        trace = traces["conv"]
        call_s = await sleepers.call_s(trace)
        for (name, each), servers in product(traces.items(), _ENDPOINTS):
            sent, timeout_s = make_load(each, _TRITON_LOAD, servers, seconds=seconds)
            for how in track(schedulings(servers), f"Triton: {name}, {servers}", console=console):
                latency_s = await sleepers.run(each, servers, how, sent, timeout_s)
                cells.append(cell(name, servers, _TRITON_LOAD, how, sent, latency_s))
        for servers in _ENDPOINTS:
            sent = poisson_load(trace, _STABLE_LOAD, servers, None, seconds=stable_s)
            no_timeout_s = np.full(len(sent.rows), 10 * stable_s)
            measured_s = await sleepers.run(trace, servers, _UNREFUSED, sent, no_timeout_s)
            simulated_s = simulate(make_plan(trace, servers, _UNREFUSED), sent, no_timeout_s).latency_s
            stable[str(servers)] = float(np.nan_to_num(measured_s, nan=np.inf).mean() / simulated_s.mean())
    return call_s, cells, stable


@click.command()
@click.option("--triton/--no-triton", default=True, help="Leave the real servers out.")
@click.option("--state", type=click.Path(path_type=Path), default=".cascadeserve/scheduling", show_default=True)
@click.option("--seconds", type=click.FloatRange(min=1.0), default=10.0, show_default=True, help="Per run on Triton.")
@click.option("--stable-seconds", "stable_s", type=click.FloatRange(min=1.0), default=60.0, show_default=True)
@click.option("--result", type=click.Path(path_type=Path), default=RESULT)
def main(*, triton: bool, state: Path, seconds: float, stable_s: float, result: Path) -> None:
    """Run everything, write it down, and print the default against round robin and FIFO."""
    if absent := [path for path in TRACES.values() if not path.exists()]:
        raise SystemExit(f"NOT RUN: {absent[0]} is absent")
    console = Console(stderr=True)
    traces = {name: read_trace(path) for name, path in TRACES.items()}
    cells = simulated_cells(traces, console)
    against = compare(cells, BASE)
    call_s, real, stable = (None, [], None)
    if triton:
        call_s, real, stable = asyncio.run(on_triton(traces, state.resolve(), seconds, stable_s, console))
    most = [each for each in against if each.servers == max(_SERVERS)]
    document = SchedulingResult(
        date=datetime.now(UTC).date().isoformat(),
        command=shlex.join(["python", "-m", "benchmarks.scheduling", *sys.argv[1:]]),
        machine=describe_host(),
        default=DEFAULT,
        cells=len(cells),
        wanted_cells=len(traces) * len(_SERVERS) * len(_LOADS) * len(BALANCERS) * len(ORDERS) * len(ADMISSIONS),
        worst_p95_against_base=max(each.p95 for each in most),
        worst_goodput_against_base=min(each.goodput for each in most),
        stable_growth=growth(traces, _STABLE_LOAD),
        unstable_growth=growth(traces, 2.0 - _STABLE_LOAD),
        stable_on_triton=stable,
        worst_stable_on_triton=None if stable is None else max(stable.values()),
        against=against,
        simulated=cells,
        triton_cells=len(real),
        triton_wanted_cells=len(traces) * sum(len(schedulings(servers)) for servers in _ENDPOINTS),
        triton_seconds=seconds,
        triton_call_ms=None if call_s is None else 1e3 * call_s,
        triton_against=compare(real, BASE),
        triton=real,
    )
    write_json(result, document)
    table = Table(
        "where", "trace", "servers", "load", "mean", "p95", "goodput", title="the default, of round robin + FIFO"
    )
    for where, lines in (("simulator", against), ("Triton", document.triton_against)):
        for line in lines:
            figures = (f"{value:.2f}" for value in (line.mean, line.p95, line.goodput))
            table.add_row(where, line.trace, str(line.servers), str(line.load), *figures)
    Console().print(table)
    Console().print(f"growth at 0.95: {document.stable_growth:.2f}, at 1.05: {document.unstable_growth:.2f}", stable)


if __name__ == "__main__":
    main()
