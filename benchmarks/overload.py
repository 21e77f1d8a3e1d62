"""What becomes of more load than fits: `python -m benchmarks.overload`.

One model on one core, paced so that the plan's capacity, 120 rows/s, is small against what the load generator can send
(see `benchmarks/paced/model.py`; for itself it answers 134 rows/s in batches of 8). Single-row requests arrive as a
Poisson process at 1 to 10 times the capacity, each level for --seconds, from the lowest to the highest, --repeats
times. Every request says by its `timeout` that it is of use within the SLO only; with --default-deadline none does, and
it is for the door alone to keep the answers within it.

`goodput_kept` is the rate of answers within the SLO at 10 times the capacity over the highest of all levels, medians
over the repeats, `least_goodput_kept` that of the level where it is lowest; `worst_p95_of_slo` the largest p95 of
answered requests over the SLO; `memory_growth_bytes` how much the orchestrator's peak memory grew after the first run
at 1 x. They are null where a run's load generator was late in each of three tries.

Triton has core 0; orchestrator and load generator share the others. The defaults take 4 minutes.
"""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
import numpy as np
from rich.console import Console

from benchmarks.process_facts import cpu_s, find_orchestrator, peak_memory_bytes
from benchmarks.python_models import write_paced
from cascadeserve.artefacts import write_json
from cascadeserve.demo.family import FAMILY
from cascadeserve.demo.offline import draw_rows
from cascadeserve.local_stack import LocalStack
from cascadeserve.local_triton.working_copy import prepare_state_directory
from cascadeserve.replay.client import Outcome
from cascadeserve.replay.summary import is_void
from cascadeserve.virtual_machine import cores_kept_awake
from planner.host import describe_host

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from cascadeserve.report import ServingReport

LEVELS = (1.0, 1.1, 1.3, 1.5, 2.0, 3.0, 5.0, 10.0)
CAPACITY_PER_S = 120.0
_MODEL = "digits_cnn"
_SLO_S = 0.2
# seconds of processor time of a batch, and of each of its rows; what Triton takes beside it, for the plan
_FIRST_S, _ROW_S, _TRITON_S = 3e-3, 7e-3, 0.7e-3
_MAX_BATCH = 8
_TRIES = 3
_STATE = Path(".cascadeserve/overload").resolve()


class Level(msgspec.Struct, frozen=True):
    """One run: `load` in multiples of the capacity, rates in rows per second, times in seconds.

    `refusal_p50_s` is how long a refused request waited for its refusal, `orchestrator_cpu_s` per request.
    """

    load: float
    offered_per_s: float
    goodput_per_s: float
    p95_s: float | None
    refusal_p50_s: float | None
    refused: int
    failed: int
    lost: int
    generator_lag_p99_s: float
    void: bool
    orchestrator_cpu_s: float
    peak_memory_bytes: int


def plan_document() -> dict[str, Any]:
    """The digits plan cut down to one model, one gear up to the capacity and one that is degraded above it."""
    plan: dict[str, Any] = msgspec.json.decode(Path("examples/digits/gear_plan.json").read_bytes())
    family = plan["families"][FAMILY]
    busy_s = [(rows, _FIRST_S + _TRITON_S + _ROW_S * rows) for rows in (1, _MAX_BATCH, 64)]
    gear = {
        "layout": "one",
        "ladder_entry": "alone",
        "triggers": {_MODEL: {"min_batch": 1, "max_batch": _MAX_BATCH, "max_wait_s": 0.0}},
    }
    family |= {
        "models": {_MODEL: {"max_batch": 64, "busy_s": busy_s}},
        "reference_model": _MODEL,
        "slo_s": _SLO_S,
        "dispersion": 1.0,
        "ladder": [{"name": "alone", "stages": [{"model": _MODEL}], "reach": [1.0]}],
        "gears": [
            gear | {"name": "planned", "min_rate_per_s": 0.0, "max_rate_per_s": CAPACITY_PER_S},
            gear | {"name": "overload", "min_rate_per_s": CAPACITY_PER_S, "max_rate_per_s": None, "degraded": True},
        ],
    }
    plan["name"] = "overload"
    plan["layouts"] = [{"name": "one", "instances": {"triton0": {_MODEL: 1}}}]
    return plan


def read_level(
    load: float, report: ServingReport, records: Mapping[str, NDArray[Any]], *, used_s: float, memory_bytes: int
) -> Level:
    """Make a level of a run; `used_s` is the processor time that the orchestrator took for it."""
    refused = records["outcome"] == list(records["outcome_names"]).index(Outcome.REFUSED.name.lower())
    waited_s = (records["done_s"] - records["sent_s"])[refused]
    return Level(
        load=load,
        offered_per_s=report.offered_rate_per_s,
        goodput_per_s=report.offered_rate_per_s * (report.goodput or 0.0),
        p95_s=report.p95_s,
        refusal_p50_s=float(np.median(waited_s)) if len(waited_s) else None,
        refused=report.ledger.refused,
        failed=report.ledger.failed,
        lost=report.ledger.lost,
        generator_lag_p99_s=report.generator_lag_p99_s,
        void=is_void(report),
        orchestrator_cpu_s=used_s / report.ledger.sent,
        peak_memory_bytes=memory_bytes,
    )


def summarise(levels: Sequence[Level]) -> dict[str, Any]:
    """Summarise all levels of all repeats, in the order in which they were run."""
    by_load: dict[float, list[float]] = {}
    for level in levels:
        by_load.setdefault(level.load, []).append(level.goodput_per_s)
    goodput_per_s = {load: statistics.median(rates) for load, rates in by_load.items()}
    told = not any(level.void for level in levels)
    peak_per_s = max(goodput_per_s.values())
    return {
        "goodput_per_s": {f"{load:g}": rate_per_s for load, rate_per_s in goodput_per_s.items()},
        "goodput_kept": goodput_per_s[max(goodput_per_s)] / peak_per_s if told and peak_per_s else None,
        "least_goodput_kept": min(goodput_per_s.values()) / peak_per_s if told and peak_per_s else None,
        "worst_p95_of_slo": max((level.p95_s or float("inf")) / _SLO_S for level in levels) if told else None,
        "memory_growth_bytes": levels[-1].peak_memory_bytes - levels[0].peak_memory_bytes if told else None,
        "failed": sum(level.failed for level in levels),
        "lost": sum(level.lost for level in levels),
    }


@dataclass(frozen=True)
class _Bench:
    stack: LocalStack
    rows: Path
    seconds: float
    default_deadline: bool
    say: Console

    async def warm_up(self) -> None:
        options = ("--rate=80", "--duration=3", f"--slo={_SLO_S}")
        with self._log.open("ab") as log:
            await self.stack.replay(_STATE / "warm-up", self.stack.url, FAMILY, self.rows, *options, log=log)

    async def run(self, load: float, seed: int) -> Level:
        """Run a level; again if the generator was late."""
        pid = find_orchestrator(self.stack.url)
        options = (
            f"--rate={load * CAPACITY_PER_S}", f"--duration={self.seconds}", f"--slo={_SLO_S}", "--shuffle",
            f"--seed={seed}", *([] if self.default_deadline else [f"--timeout={_SLO_S}"]),
        )  # fmt: skip
        for _ in range(_TRIES):
            before_s = cpu_s(pid)
            with self._log.open("ab") as log:
                report, records = await self.stack.replay(
                    _STATE / "run", self.stack.url, FAMILY, self.rows, *options, log=log
                )
            level = read_level(load, report, records, used_s=cpu_s(pid) - before_s, memory_bytes=peak_memory_bytes(pid))
            p95 = "-" if level.p95_s is None else f"{level.p95_s * 1e3:.0f} ms"
            self.say.print(
                f"{load:4g} x  offered {level.offered_per_s:6.0f}, within the SLO {level.goodput_per_s:5.0f} rows/s, "
                f"p95 {p95}, refused {level.refused}, failed {level.failed}, lost {level.lost}"
                + (f", void: generator {level.generator_lag_p99_s * 1e3:.1f} ms late" if level.void else ""),
                soft_wrap=True,
            )
            if not level.void:
                break
        return level

    @property
    def _log(self) -> Path:
        return self.stack.log.with_name("replay.log")


async def _measure(seconds: float, repeats: int, *, default_deadline: bool) -> dict[str, Any]:
    prepare_state_directory(_STATE)
    repository, plan = _STATE / "model_repository", _STATE / "plan.json"
    write_paced(repository, _MODEL, _FIRST_S, _ROW_S)
    write_json(plan, plan_document())
    stack = LocalStack(_STATE / "stack", repository=repository, plan=plan)
    bench = _Bench(stack, draw_rows(_STATE, "replay"), seconds, default_deadline, Console(stderr=True))
    async with cores_kept_awake() as awake, stack.running():
        await bench.warm_up()
        levels = [await bench.run(load, seed) for seed in range(repeats) for load in LEVELS]
    return summarise(levels) | {
        "capacity_per_s": CAPACITY_PER_S,
        "slo_s": _SLO_S,
        "seconds": seconds,
        "repeats": repeats,
        "default_deadline": default_deadline,
        "host": describe_host(),
        "cores_kept_awake": awake,
        "levels": levels,
    }


@click.command()
@click.option("--seconds", type=click.FloatRange(min=1.0), default=20.0, show_default=True, help="Of each run.")
@click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--default-deadline", is_flag=True, help="Send no `timeout`: requests are given up after 4 SLOs.")
@click.option(
    "--result", type=click.Path(path_type=Path), default="benchmarks/results/local/overload.json", show_default=True
)
def main(*, seconds: float, repeats: int, default_deadline: bool, result: Path) -> None:
    """Measure, write the result, print it."""
    measured = asyncio.run(_measure(seconds, repeats, default_deadline=default_deadline))
    write_json(result, measured)
    Console().print({key: value for key, value in measured.items() if key not in {"levels", "host"}})


if __name__ == "__main__":
    main()
