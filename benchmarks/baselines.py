"""The saving of the demo against other ways to serve its cascades: `python -m benchmarks.baselines`.

On one core, under constant load and the demo's SLO, the sustained rates of four systems, by the demo's own search:

    cascade   the plan, with its gears
    static    the plan of policy static-cascade: one cascade for all rates
    bls       the cascade of the plan's top gear as a Python model in Triton that asks the other models (business logic
              scripting); everything batched by Triton, and the best of 1 to 4 instances, which short runs tell
    ray       the same cascade as a composition of Ray Serve, batched as the gear batches; the interpreter is given by
              --ray-python, and without ray[serve] there it is left out

Models have core 0, the load generator and what is no model the other one: orchestrator, Ray's proxy and ingress. The
work of `bls` is all Triton's.

`static` and `bls` are measured in interleaved pairs with `cascade`; `ratio` is the median over the pairs of their rate
over its, `range` the ends of its 95 % bootstrap interval, null where a rate was not found. `ray` is searched once.

With 3 pairs it takes about 20 minutes, and 3 more where the demo has not been run: its records and profile are used.
Runs are kept under --state until all is done; an interrupted one goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
from rich.console import Console

from benchmarks.digits_plans import make_plans
from benchmarks.other_servers import BLS_MODEL, RayStack, bls_stack, ray_is_missing
from cascadeserve.artefacts import write_json
from cascadeserve.demo.compare import Findings
from cascadeserve.demo.family import FAMILY, REPOSITORY
from cascadeserve.demo.judging import median_range
from cascadeserve.demo.kept import alone, digest_file, digest_of
from cascadeserve.demo.measuring import RunFolder, System
from cascadeserve.demo.offline import draw_rows
from cascadeserve.demo.rate_search import Ask, Found, Verdict, search, search_near
from cascadeserve.demo.steps import Steps
from cascadeserve.local_stack import LocalStack
from cascadeserve.local_triton.working_copy import prepare_state_directory
from cascadeserve.virtual_machine import cores_kept_awake
from planner.host import describe_host

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from benchmarks.digits_plans import Planned

_POLICIES = ("cascade", "static-cascade")
BLS_INSTANCES = (1, 2, 3, 4)
# where the search begins, as a share of the plan's rate: what is far off costs runs
_BLS_GUESS, _RAY_GUESS = 0.7, 0.3


def search_by_probes(predicted_per_s: float) -> Generator[Ask, Verdict, Found]:
    """`search` without its long runs: near enough to choose by."""
    searching = search(predicted_per_s)
    ask = next(searching)
    try:
        while ask.kind == "probe":
            ask = searching.send((yield ask))
    except StopIteration as end:
        found: Found = end.value
        return found
    return Found(ask.rate_per_s, "nothing")


def compare_pairs(pairs: Sequence[dict[str, float]], name: str) -> dict[str, Any]:
    """Ratio of a system's rate to the cascade's over the pairs, each of rates by name."""
    if not all(pair[name] and pair["cascade"] for pair in pairs):
        return {"ratio": None, "range": None, "off_by": None}
    ratios = [pair[name] / pair["cascade"] for pair in pairs]
    ratio = statistics.median(ratios)
    return {"ratio": ratio, "range": median_range(ratios), "off_by": abs(ratio - 1.0)}


@dataclass(frozen=True)
class _Bench:
    state: Path
    rows: Path
    slo_s: float
    runs: RunFolder
    steps: Steps
    log: IO[bytes]

    def findings(
        self, name: str, stack: LocalStack | RayStack, predicted_per_s: float, servers: contextlib.AsyncExitStack,
        model: str = FAMILY,
    ) -> Findings:  # fmt: skip
        system = System(name, stack, model, self.rows, self.slo_s, self.runs, servers, self.log)
        return Findings(system, predicted_per_s)

    async def choose_bls(self, top: Planned) -> tuple[int, dict[int, float]]:
        """Find the number of instances that goes furthest, and how far each does, in rows per second."""
        rates = {}
        guess_per_s = _BLS_GUESS * top.rate_per_s
        for instances in BLS_INSTANCES:
            async with contextlib.AsyncExitStack() as servers:
                stack = bls_stack(self.state / "bls", top.top_stages, instances)
                each = self.findings(f"bls-{instances}", stack, guess_per_s, servers, BLS_MODEL)
                with self.steps.timed(f"bls, instances: {instances}") as say:
                    found, _ = await each.system.search(search_by_probes(guess_per_s), say)
            rates[instances] = found.rate_per_s or 0.0
            guess_per_s = found.rate_per_s or guess_per_s
        return max(rates, key=lambda instances: rates[instances]), rates

    async def ray(self, python: str, top: Planned) -> Findings:
        """Search the rate of Ray Serve."""
        stack = RayStack(self.state / "ray", python, top.top_stages, top.top_gear.triggers)
        async with contextlib.AsyncExitStack() as servers:
            each = self.findings("ray", stack, _RAY_GUESS * top.rate_per_s, servers)
            with self.steps.timed("ray") as say:
                each.add(*await each.system.search(search(each.predicted_per_s), say))
        return each

    async def in_pairs(self, systems: dict[str, Findings], pairs: int) -> list[dict[str, float]]:
        """Search every system's rate, then look again near it, in turns; returns the latter."""
        for name, each in systems.items():
            with self.steps.timed(f"sustained rate: {name}") as say:
                each.add(*await each.system.search(search(each.predicted_per_s), say))
        near = {name: each.rate_per_s or each.predicted_per_s for name, each in systems.items()}
        for each in systems.values():
            each.rates_per_s, each.confirmed = [], []
        with self.steps.timed("pairs") as say:
            for number in range(pairs):
                for name, each in systems.items():
                    say(f"pair {number + 1} of {pairs}: {name}")
                    each.add(*await each.system.search(search_near(near[name]), say))
                    near[name] = each.rates_per_s[-1] or near[name]
        return [{name: each.rates_per_s[number] for name, each in systems.items()} for number in range(pairs)]


def _tell(each: Findings) -> dict[str, Any]:
    result = each.result()
    return {
        "rows_per_s": result.sustained_rows_per_s,
        "p95_s": result.p95_s,
        "accuracy": result.accuracy,
        "limited_by": result.limited_by,
    }


async def _measure(state: Path, pairs: int, ray_python: str, console: Console) -> dict[str, Any]:
    steps = Steps(console)
    planned = await make_plans(state, _POLICIES, steps)
    top, rows = planned["cascade"], draw_rows(state, "replay")
    about = digest_of(plans=[digest_file(each.path) for each in planned.values()], rows=digest_file(rows), pairs=pairs)
    runs = RunFolder(state / "baseline-runs", about)
    with (state / "load.log").open("ab") as log:
        bench = _Bench(state, rows, top.slo_s, runs, steps, log)
        instances, bls_rates = await bench.choose_bls(top)
        missing = ray_is_missing(ray_python)
        ray = await bench.ray(ray_python, top) if missing is None else None
        async with contextlib.AsyncExitStack() as servers:
            systems = {
                name: bench.findings(
                    name, LocalStack(state / name, repository=REPOSITORY, plan=each.path), each.rate_per_s, servers
                )
                for name, each in planned.items()
            }
            systems["bls"] = bench.findings(
                "bls", bls_stack(state / "bls", top.top_stages, instances), bls_rates[instances], servers, BLS_MODEL
            )
            rates = await bench.in_pairs(systems, pairs)
    runs.clear()
    return {
        "slo_s": top.slo_s,
        "stages": top.top_stages,
        "systems": {name: _tell(each) for name, each in systems.items()},
        "pairs": rates,
        "static": compare_pairs(rates, "static-cascade"),
        "bls": compare_pairs(rates, "bls")
        | {"instances": instances, "rows_per_s_by_instances": {str(count): rate for count, rate in bls_rates.items()}},
        "ray": {"not_run": missing} if ray is None else _tell(ray),
        "host": describe_host(),
        "wall_s": steps.wall_s,
    }


async def _measure_awake(state: Path, pairs: int, ray_python: str, console: Console) -> dict[str, Any]:
    async with cores_kept_awake() as awake:
        return await _measure(state, pairs, ray_python, console) | {"cores_kept_awake": awake}


@click.command()
@click.option("--pairs", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--state", type=click.Path(path_type=Path), default=".cascadeserve/demo", show_default=True)
@click.option(
    "--ray-python", default=sys.executable, help="Interpreter with ray[serve] and onnxruntime [default: this one]."
)
@click.option(
    "--result", type=click.Path(path_type=Path), default="benchmarks/results/local/baselines.json", show_default=True
)
def main(*, pairs: int, state: Path, ray_python: str, result: Path) -> None:
    """Measure, write the result, print it."""
    console = Console()
    state = state.resolve()
    prepare_state_directory(state)
    with alone(state):
        measured = asyncio.run(_measure_awake(state, pairs, ray_python, console))
    write_json(result, measured)
    console.print({key: value for key, value in measured.items() if key not in {"host", "wall_s"}})


if __name__ == "__main__":
    main()
