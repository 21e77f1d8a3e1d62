"""What front processes gain on a host with more cores: `python -m benchmarks.fronts`.

Two networks of the digits family as a cascade of one gear, of which about 20 % of the rows see the second, on
--endpoints tritonservers with a core each: cheap ones, so that the orchestrator limits the rate. wrk keeps
--connections connections busy with single-row binary requests, on two cores of its own; the orchestrator has the rest.
It is started anew for every run, with none and with each number of fronts in turn. By that number, medians over the
runs: requests answered per second, the ratio to those of the same round without fronts, and CPU time per answered
request of the dispatcher and of all fronts.

With fewer than four cores beside those of the endpoints nothing is measured: NOT RUN.
wrk is `apt-get install wrk`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.gateway_cost import Requests, Server, counts, run_load, write_requests
from cascadeserve.artefacts import write_json
from cascadeserve.local_stack import LocalStack, cascadeserve_command, free_ports, wait_ready
from cascadeserve.process import spawn, stop
from examples.digits.data import rows
from planner.host import describe_host

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

_STATE = Path(".cascadeserve/fronts").resolve()
_MODELS = ("digits_mlp", "digits_cnn")
# gives about 20 % escalation; measured and reported
_THRESHOLD = 0.43
_NUM_ROWS = 1_000
_START_S = 30.0
_WARM_UP_S = 1.0
_WRK_CORES = 2
# the dispatcher's and one front's beside wrk's
_LEAST_OTHERS = 4


@dataclass(frozen=True)
class _Cores:
    triton: list[int]
    orchestrator: list[int]
    wrk: list[int]


def _plan(endpoints: int) -> dict[str, Any]:
    plan = msgspec.json.decode(Path("examples/digits/gear_plan.json").read_bytes())
    family = plan["families"]["digits"]
    models = {model: family["models"][model] for model in _MODELS}
    triggers = {
        model: {"min_batch": 1, "max_batch": of["max_batch"], "max_wait_s": 0.0} for model, of in models.items()
    }
    gear = {"name": "only", "layout": "one", "min_rate_per_s": 0.0, "max_rate_per_s": 100_000.0}
    stages = [{"model": _MODELS[0], "threshold": _THRESHOLD}, {"model": _MODELS[1]}]
    family |= {
        "models": models,
        "reference_model": _MODELS[1],
        "ladder": [{"name": "both", "stages": stages, "reach": [1.0, 0.2]}],
        "gears": [gear | {"ladder_entry": "both", "triggers": triggers}],
    }
    instances = {f"triton{number}": dict.fromkeys(_MODELS, 1) for number in range(endpoints)}
    plan["layouts"] = [{"name": "one", "instances": instances}]
    return plan


def _divided(endpoints: int) -> _Cores:
    free = sorted(os.sched_getaffinity(0))
    if len(free) < endpoints + _LEAST_OTHERS:
        raise SystemExit(f"NOT RUN: {endpoints + _LEAST_OTHERS} cores are needed, here are {len(free)}")
    return _Cores(free[:endpoints], free[endpoints:-_WRK_CORES], free[-_WRK_CORES:])


def _children(pid: int) -> list[int]:
    direct = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*direct, *(below for each in direct for below in _children(each))]


@contextlib.asynccontextmanager
async def _orchestrator(stack: LocalStack, plan: Path, fronts: int, cores: Sequence[int]) -> AsyncIterator[Server]:
    http, grpc_port = free_ports(2)
    command = cascadeserve_command(
        "serve", f"--plan={plan}", f"--cluster={stack.cluster}", f"--http-port={http}", f"--grpc-port={grpc_port}",
        *([f"--fronts={fronts}"] if fronts else []),
    )  # fmt: skip
    path = stack.log.with_name("serve.log")
    with path.open("ab") as log:
        process = await spawn(command, cores=cores, log=log)
        try:
            await wait_ready(f"http://127.0.0.1:{http}", process, timeout_s=_START_S, log=path)
            yield Server(process.pid, {"http": http, "grpc": grpc_port})
        finally:
            await stop(process, kill_after_s=10.0)


async def _run(server: Server, requests: Requests, cores: _Cores, connections: int, seconds: float) -> dict[str, float]:
    load = ("http", server, connections)
    await run_load(*load, _WARM_UP_S, requests, cores.wrk, threads=_WRK_CORES)
    processes = [server, *(Server(pid, {}) for pid in _children(server.pid))]
    before_s = [each.cpu_s() for each in processes]
    counted = await run_load(*load, seconds, requests, cores.wrk, threads=_WRK_CORES)
    used_s = [each.cpu_s() - was_s for each, was_s in zip(processes, before_s, strict=True)]
    _, failed, stages = await counts(server.ports["http"])
    answers = max(counted["answers"], 1.0)
    return {
        "answers_per_s": counted["answers"] / counted["seconds"],
        "p50_s": counted["p50_s"],
        "p99_s": counted["p99_s"],
        "dispatcher_cpu_s": used_s[0] / answers,
        "fronts_cpu_s": sum(used_s[1:]) / answers,
        "escalated": 1.0 - stages.get("0", 0.0) / max(sum(stages.values()), 1.0),
        "failed": failed + counted["errors"],
    }


async def _measure(
    cores: _Cores, numbers: Sequence[int], runs: int, seconds: float, connections: int, console: Console
) -> dict[str, Any]:
    stack = LocalStack(_STATE, repository=Path("model_repository"), models=_MODELS, cores=cores.triton)
    requests = write_requests(_STATE, rows("replay", _NUM_ROWS).inputs)
    plan = _STATE / "plan.json"
    write_json(plan, _plan(len(cores.triton)))
    measured: dict[int, list[dict[str, float]]] = {number: [] for number in numbers}
    async with stack.running():
        for run in range(runs):
            for number in numbers:
                async with _orchestrator(stack, plan, number, cores.orchestrator) as server:
                    measured[number].append(await _run(server, requests, cores, connections, seconds))
                console.print(f"{run + 1} of {runs}, {number} fronts: {measured[number][-1]['answers_per_s']:.0f}/s")
    alone = measured[numbers[0]]
    return {
        "host": describe_host(),
        "cores": {"triton": len(cores.triton), "orchestrator": len(cores.orchestrator), "wrk": len(cores.wrk)},
        "connections": connections,
        "runs": runs,
        "seconds": seconds,
        "failed": sum(run["failed"] for each in measured.values() for run in each),
        "fronts": {str(number): _summary(each, alone) for number, each in measured.items()},
    }


def _summary(runs: Sequence[dict[str, float]], alone: Sequence[dict[str, float]]) -> dict[str, Any]:
    ratios = [run["answers_per_s"] / beside["answers_per_s"] for run, beside in zip(runs, alone, strict=True)]
    medians: dict[str, Any] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return medians | {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}


def _table(measured: dict[str, Any]) -> Table:
    table = Table("fronts", "rows/s", "ratio", "range", "p50 ms", "p99 ms", "dispatcher us", "fronts us", "failed")
    for number, at in measured["fronts"].items():
        low, high = at["ratio_range"]
        table.add_row(
            number, f"{at['answers_per_s']:.0f}", f"{at['ratio']:.2f}", f"{low:.2f}..{high:.2f}",
            f"{at['p50_s'] * 1e3:.2f}", f"{at['p99_s'] * 1e3:.2f}", f"{at['dispatcher_cpu_s'] * 1e6:.0f}",
            f"{at['fronts_cpu_s'] * 1e6:.0f}", f"{at['failed']:.0f}",
        )  # fmt: skip
    return table


@click.command()
@click.option("--endpoints", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--fronts", "numbers", type=click.IntRange(min=1), multiple=True, default=(1, 2, 4), show_default=True)
@click.option("--connections", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=1.0), default=4.0, show_default=True, help="Of each run.")
@click.option(
    "--result", type=click.Path(path_type=Path), default="benchmarks/results/local/fronts.json", show_default=True
)
def main(
    *, endpoints: int, numbers: tuple[int, ...], connections: int, runs: int, seconds: float, result: Path
) -> None:
    """Measure, write the result, print it."""
    console = Console()
    cores = _divided(endpoints)
    measured = asyncio.run(_measure(cores, (0, *numbers), runs, seconds, connections, console))
    write_json(result, msgspec.to_builtins(measured))
    console.print(_table(measured))


if __name__ == "__main__":
    main()
