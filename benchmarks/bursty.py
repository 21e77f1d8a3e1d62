"""Three policies under one bursty load on a real Triton: `python -m benchmarks.bursty`.

The load is an hour of the Azure code trace pressed into --seconds, so scaled that its busiest tenth of seconds has the
rate that the demo's plan is made for. Every policy plans for this load and the demo's SLO, as accurate as it can be and
at most 4 points below the largest model: a floor under which there is something to switch between.

    cascade          gears of cascades
    switching        gears of single models
    static-cascade   one cascade for all rates, the most accurate one that reaches the highest

By policy, medians over the repeats: `goodput`, the share of the requests that were answered within the SLO; `accuracy`
of the answered rows, each of the same weight; `right_in_time`, the share of all requests that were answered rightly
within the SLO, which holds both.

Triton has core 0; orchestrator and load generator share the others. With 3 repeats it takes 20 minutes, and 3 more
where the demo has not been run: its records and profile are used.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from planner.host import describe_host

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from cascadeserve.report import ServingReport

TRACE = Path("../shared/data/traces/azure-llm-2023/AzureLLMInferenceTrace_code.csv").resolve()
POLICIES = ("cascade", "switching", "static-cascade")
_BUSIEST = 0.1
_GOAL = """\
schema_version = 1

[families.digits]
slo_per_reference_batch = 10.0
below_reference = 0.04
# drafts: nothing is certified
max_epsilon = 1.0
max_rate_per_s = {top_per_s:.1f}
trace = {{ file = "{trace}", rate_per_s = {mean_per_s:.1f}, duration_s = {seconds:g} }}
"""


def busiest_over_mean(times_s: NDArray[np.float64], duration_s: float) -> float:
    """Rate of the busiest tenth of the seconds over the mean rate."""
    counts, _ = np.histogram(times_s, np.arange(0.0, duration_s + 0.5))
    busiest = np.sort(counts)[-max(round(_BUSIEST * len(counts)), 1) :]
    return float(busiest.mean() / counts.mean())


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
    """Medians over the repeats of a policy; null where the load generator was late in one."""
    told = not any(run["void"] for run in runs)
    names = ("goodput", "accuracy", "right_in_time")
    return {name: statistics.median(run[name] for run in runs) if told else None for name in names}


async def _measure(state: Path, seconds: float, repeats: int, console: Console) -> dict[str, Any]:
    steps = Steps(console)
    demo = (await make_plans(state, ["cascade"], steps))["cascade"]
    # many arrivals: how it is thinned is chance
    times_s = from_trace(TRACE, rng=np.random.default_rng(0), duration_s=seconds, rate_per_s=1_000.0)
    mean_per_s = demo.rate_per_s / busiest_over_mean(times_s, seconds)
    goal = state / "bursty.toml"
    text = _GOAL.format(top_per_s=demo.rate_per_s, trace=TRACE, mean_per_s=mean_per_s, seconds=seconds)
    write_atomically(goal, text.encode())
    planned = await make_plans(state, POLICIES, steps, goal)
    rows = draw_rows(state, "replay")
    with np.load(rows) as drawn:
        truth = drawn["label"]
    stacks = {name: LocalStack(state / name, repository=REPOSITORY, plan=each.path) for name, each in planned.items()}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in planned}
    options = (f"--slo={demo.slo_s}", "--shuffle")
    load = (f"--trace={TRACE}", f"--rate={mean_per_s:.1f}", f"--duration={seconds:g}")
    async with contextlib.AsyncExitStack() as servers:
        log = servers.enter_context((state / "load.log").open("ab"))
        for stack in stacks.values():
            await servers.enter_async_context(stack.running())
            await stack.replay(
                state / "bursty-run", stack.url, FAMILY, rows, "--rate=100", "--duration=2", *options, log=log
            )
        for seed in range(repeats):
            for name, stack in stacks.items():
                with steps.timed(f"{name}, {seed + 1} of {repeats}") as say:
                    report, records = await stack.replay(
                        state / "bursty-run", stack.url, FAMILY, rows, *load, *options, f"--seed={seed}", log=log
                    )
                    runs[name].append(read_run(report, records, truth, demo.slo_s))
                    say(f"  {runs[name][-1]}")
    return {
        "slo_s": demo.slo_s,
        "mean_rate_per_s": mean_per_s,
        "busy_rate_per_s": demo.rate_per_s,
        "seconds": seconds,
        "policies": {name: summarise(each) for name, each in runs.items()},
        "planned": {
            name: {
                "rate_per_s": each.rate_per_s,
                "gears": [gear.ladder_entry for gear in each.plan.families[FAMILY].gears],
            }
            for name, each in planned.items()
        },
        "runs": runs,
        "host": describe_host(),
        "wall_s": steps.wall_s,
    }


async def _measure_awake(state: Path, seconds: float, repeats: int, console: Console) -> dict[str, Any]:
    async with cores_kept_awake() as awake:
        return await _measure(state, seconds, repeats, console) | {"cores_kept_awake": awake}


@click.command()
@click.option("--seconds", type=click.FloatRange(min=5.0), default=120.0, show_default=True, help="Of each run.")
@click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--state", type=click.Path(path_type=Path), default=".cascadeserve/demo", show_default=True)
@click.option(
    "--result", type=click.Path(path_type=Path), default="benchmarks/results/local/bursty.json", show_default=True
)
def main(*, seconds: float, repeats: int, state: Path, result: Path) -> None:
    """Measure, write the result, print it."""
    if not TRACE.exists():
        raise SystemExit(f"NOT RUN: {TRACE} is absent")
    console = Console()
    state = state.resolve()
    prepare_state_directory(state)
    with alone(state):
        measured = asyncio.run(_measure_awake(state, seconds, repeats, console))
    write_json(result, measured)
    console.print({key: value for key, value in measured.items() if key not in {"host", "wall_s", "runs"}})


if __name__ == "__main__":
    main()
