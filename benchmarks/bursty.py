"""Three policies under bursty loads on a real Triton: `python -m benchmarks.bursty`.

Two pieces of real traces, in --seconds each, and so scaled that the busiest quarter of a second has the highest rate of
the demo's plan:

    worldcup   the day of 1998-06-30 of the football World Cup's web site: two surges to eleven times the night's rate
    azure      the busiest minute of code completions in an Azure service, at its own speed if --seconds is 60: surges
               of seconds, made of bursts that have twice that rate for 50 ms. An index of dispersion of 8 is planned
               for, about the most for which there is a plan at all

Every policy plans for the demo's SLO, the load's mixture of rates, and that of its busiest second, or as far as a
cascade plan goes; as accurate as it can be, and at most 4 points below the largest model, a floor above which there is
something to switch between.

    cascade          gears of cascades
    switching        gears of single models
    static-cascade   one cascade for all rates, the most accurate one that reaches the highest

By trace and policy, medians over the repeats in which the load generator was not late: `goodput`, the share of the
requests that were answered within the SLO; `accuracy` of the answered rows, each of the same weight; `right_in_time`,
the share of all requests that were answered rightly within the SLO, which holds both. `cascade` says what the gears of
cascades come to on the trace on which they do worst: their goodput, and by how much they are above the others.

Triton has core 0; orchestrator and load generator share the others. The defaults take 16 minutes, and 3 more where the
demo has not been run: its records and profile are used.
"""

from __future__ import annotations

import asyncio
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console

from benchmarks.digits_plans import make_plans
from cascadeserve.artefacts import write_atomically, write_json
from cascadeserve.demo.family import FAMILY, REPOSITORY
from cascadeserve.demo.judging import answered_requests
from cascadeserve.demo.kept import alone
from cascadeserve.demo.offline import draw_rows
from cascadeserve.demo.steps import Steps
from cascadeserve.local_stack import LocalStack
from cascadeserve.local_triton.working_copy import prepare_state_directory
from cascadeserve.replay.arrivals import from_trace
from cascadeserve.replay.summary import is_void
from cascadeserve.virtual_machine import cores_kept_awake
from planner.goal import prior_of_arrivals
from planner.host import describe_host

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from cascadeserve.report import ServingReport

POLICIES = ("cascade", "switching", "static-cascade")
_MANY_PER_S = 1_000.0
# some SLOs
_BURST_S = 0.25
_DATA = Path("../shared/data/traces").resolve()
_GOAL = """\
schema_version = 1

[families.digits]
slo_per_reference_batch = 10.0
below_reference = 0.04
# drafts: nothing is certified
max_epsilon = 1.0
"""


@dataclass(frozen=True)
class Piece:
    """A piece of a trace; `start` and `end` as its file writes times."""

    path: Path
    start: str
    end: str
    # index of dispersion to plan for
    dispersion: float = 1.0

    def draw(self, seconds: float, rate_per_s: float) -> NDArray[np.float64]:
        """Times of arrival, pressed into so many seconds, of a mean rate."""
        rng = np.random.default_rng(0)
        return from_trace(self.path, rng=rng, duration_s=seconds, rate_per_s=rate_per_s, start=self.start, end=self.end)

    def options(self, seconds: float, rate_per_s: float) -> list[str]:
        """The same for `replay`."""
        window = [f"--trace-from={self.start}", f"--trace-to={self.end}"]
        return [f"--trace={self.path}", *window, f"--duration={seconds:g}", f"--rate={rate_per_s:.1f}"]


PIECES = {
    "worldcup": Piece(
        _DATA / "worldcup-1998" / "invocation_count.csv", start="1998-06-30 00:00:00", end="1998-07-01 00:00:00"
    ),
    "azure": Piece(
        _DATA / "azure-llm-2023" / "AzureLLMInferenceTrace_code.csv",
        start="2023-11-16 18:31:03",
        end="2023-11-16 18:32:03",
        dispersion=8.0,
    ),
}


def goal_text(top_per_s: float, times_s: NDArray[np.float64], dispersion: float) -> str:
    """Goal of a plan that reaches a rate and is made for these arrivals."""
    prior = ", ".join(f"[{rate:.4g}, {share:.4g}]" for rate, share in prior_of_arrivals(times_s, 1.0))
    # what it asks for must not be above what was found by a rounding
    load = f"dispersion = {dispersion:g}\nrate_prior = [{prior}]\n"
    return f"{_GOAL}max_rate_per_s = {math.floor(top_per_s)}\n{load}"


def highest_rate_per_s(times_s: NDArray[np.float64], duration_s: float, window_s: float) -> float:
    """Highest rate over a window of that length, one beside the other."""
    counts, _ = np.histogram(times_s, np.arange(0.0, duration_s + window_s / 2, window_s))
    return float(counts.max() / window_s)


def read_run(
    report: ServingReport, records: Mapping[str, NDArray[Any]], truth: NDArray[np.int64], slo_s: float
) -> dict[str, Any]:
    """Tell what a run of single-row requests comes to; `truth` is int64 [rows]."""
    right = records["label"] == truth[records["row_index"]]
    in_time = answered_requests(records) & (records["done_s"] - records["scheduled_s"] <= slo_s)
    return {
        "goodput": report.goodput,
        "accuracy": report.accuracy,
        "right_in_time": float(np.mean(right & in_time)),
        "p95_s": report.p95_s,
        "refused": report.ledger.refused,
        "failed": report.ledger.failed,
        "lost": report.ledger.lost,
        "gears": len({span.gear for span in report.gears}),
        "void": is_void(report),
    }


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the repeats of a policy; null where the load generator was late in all."""
    told = [run for run in runs if not run["void"]]
    names = ("goodput", "accuracy", "right_in_time")
    return {name: statistics.median(run[name] for run in told) if told else None for name in names}


def compare(traces: Sequence[Mapping[str, Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """What the cascade's gears are worth on the worst trace, by runs of trace and policy; null if a trace says nothing.

    Differences are medians over the repeats, in which the arrivals are the same for all.
    """
    worst: dict[str, Any] = {"goodput": _least([summarise(runs["cascade"])["goodput"] for runs in traces])}
    for name in ("accuracy", "right_in_time"):
        worst[f"{name}_above"] = {
            other: _least([_above(runs["cascade"], runs[other], name) for runs in traces]) for other in POLICIES[1:]
        }
    return worst


def _above(runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], name: str) -> float | None:
    pairs = [pair for pair in zip(runs, others, strict=True) if not any(run["void"] for run in pair)]
    return statistics.median(run[name] - other[name] for run, other in pairs) if pairs else None


def _least(values: Sequence[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return min(told) if len(told) == len(values) else None


@dataclass(frozen=True)
class _Bench:
    state: Path
    rows: Path
    truth: NDArray[np.int64]
    seconds: float
    repeats: int
    steps: Steps

    async def measure(self, name: str, piece: Piece, busiest_per_s: float, widest_per_s: float) -> dict[str, Any]:
        """Plan for a piece of a trace, and replay it to every plan in turns."""
        # many arrivals: how they are thinned is chance
        highest_per_s = highest_rate_per_s(piece.draw(self.seconds, _MANY_PER_S), self.seconds, _BURST_S)
        mean_per_s = busiest_per_s * _MANY_PER_S / highest_per_s
        times_s = piece.draw(self.seconds, mean_per_s)
        top_per_s = min(highest_rate_per_s(times_s, self.seconds, 1.0), widest_per_s)
        goal = self.state / f"{name}.toml"
        write_atomically(goal, goal_text(top_per_s, times_s, piece.dispersion).encode())
        planned = await make_plans(self.state, POLICIES, self.steps, goal)
        load = piece.options(self.seconds, mean_per_s)
        runs: dict[str, list[dict[str, Any]]] = {policy: [] for policy in planned}
        with (self.state / "load.log").open("ab") as log:
            for seed in range(self.repeats):
                for policy, each in planned.items():
                    with self.steps.timed(f"{name}, {policy}, {seed + 1} of {self.repeats}") as say:
                        # One at a time: two idle ones double the median latency of a third on the same two cores.
                        stack = LocalStack(self.state / policy, repository=REPOSITORY, plan=each.path)
                        async with stack.running():
                            await self._replay(stack, ["--rate=100", "--duration=2"], each.slo_s, log)
                            report, records = await self._replay(stack, [*load, f"--seed={seed}"], each.slo_s, log)
                        runs[policy].append(read_run(report, records, self.truth, each.slo_s))
                        say(f"  {runs[policy][-1]}")
        return {
            "mean_rate_per_s": mean_per_s,
            "planned_rate_per_s": top_per_s,
            "policies": {policy: summarise(each) for policy, each in runs.items()},
            "entries": {
                policy: [(gear.ladder_entry, gear.max_rate_per_s) for gear in each.plan.families[FAMILY].gears]
                for policy, each in planned.items()
            },
            "runs": runs,
        }

    async def _replay(
        self, stack: LocalStack, load: list[str], slo_s: float, log: IO[bytes]
    ) -> tuple[ServingReport, dict[str, NDArray[Any]]]:
        return await stack.replay(
            self.state / "bursty-run", stack.url, FAMILY, self.rows, *load, f"--slo={slo_s}", "--shuffle", log=log
        )


async def _measure(state: Path, seconds: float, repeats: int, console: Console) -> dict[str, Any]:
    steps = Steps(console)
    demo = (await make_plans(state, ["cascade"], steps))["cascade"]
    goal = state / "bursty.toml"
    write_atomically(goal, _GOAL.encode())
    widest = (await make_plans(state, ["cascade"], steps, goal))["cascade"]
    rows = draw_rows(state, "replay")
    with np.load(rows) as drawn:
        bench = _Bench(state, rows, drawn["label"], seconds, repeats, steps)
    found = {
        name: await bench.measure(name, piece, demo.rate_per_s, widest.rate_per_s) for name, piece in PIECES.items()
    }
    return {
        "slo_s": demo.slo_s,
        "busiest_per_s": demo.rate_per_s,
        "seconds": seconds,
        "cascade": compare([trace["runs"] for trace in found.values()]),
        "traces": found,
        "host": describe_host(),
        "wall_s": steps.wall_s,
    }


async def _measure_awake(state: Path, seconds: float, repeats: int, console: Console) -> dict[str, Any]:
    async with cores_kept_awake() as awake:
        return await _measure(state, seconds, repeats, console) | {"cores_kept_awake": awake}


@click.command()
@click.option("--seconds", type=click.FloatRange(min=5.0), default=60.0, show_default=True, help="Of each run.")
@click.option("--repeats", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--state", type=click.Path(path_type=Path), default=".cascadeserve/demo", show_default=True)
@click.option(
    "--result", type=click.Path(path_type=Path), default="benchmarks/results/local/bursty.json", show_default=True
)
def main(*, seconds: float, repeats: int, state: Path, result: Path) -> None:
    """Measure, write the result, print it."""
    for piece in PIECES.values():
        if not piece.path.exists():
            raise SystemExit(f"NOT RUN: {piece.path} is absent")
    console = Console()
    state = state.resolve()
    prepare_state_directory(state)
    with alone(state):
        measured = asyncio.run(_measure_awake(state, seconds, repeats, console))
    write_json(result, measured)
    for name, found in measured["traces"].items():
        console.print(name, found["policies"])


if __name__ == "__main__":
    main()
