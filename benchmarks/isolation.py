"""One row that cannot be answered, and requests that are dear to read: `python -m benchmarks.isolation`.

`poison`: a cascade of two digits models that fail every batch in which one row in a thousand is, which is marked (see
`benchmarks/poison/model.py`); nothing tells which row it was. Batches are filled, so that a marked row always has
company. `others_unanswered` counts the other requests, of one row each, that got no answer.

`loop_lag`: 2,000 rows/s in requests of 1 to 8 rows, half of the rate in binary tensors and half in JSON, whose numbers
a server has to read one by one. `within_5_ms` is the share of the moments, 50 a second, at which the orchestrator's
event loop was at most 5 ms late, by its metric; null where not every request was answered, since the loop had not the
load then. The two load generators share core 0 with Triton here, so that the orchestrator has the other core for
itself: what is late is the loop's own doing.

The defaults take 2.5 minutes.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import click
import msgspec
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from benchmarks.python_models import write_wrapped
from cascadeserve.artefacts import read_json, write_json
from cascadeserve.demo.family import EXAMPLE, FAMILY, REPOSITORY
from cascadeserve.demo.judging import answered_requests
from cascadeserve.demo.offline import draw_rows
from cascadeserve.errors import CascadeServeError
from cascadeserve.local_stack import TRITON_CORE, LocalStack, run_replay
from cascadeserve.local_triton.working_copy import prepare_state_directory
from cascadeserve.process import spawn, stop
from cascadeserve.report import ServingReport
from cascadeserve.virtual_machine import cores_kept_awake
from planner.host import describe_host

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

POISON_EVERY = 1_000
# no pixel is above 1
_MARK = 1e6
_STAGES = (("digits_mlp", 0.8), ("digits_cnn", None))
_SLO_S = 0.15
_RATE_PER_S = 500
_LAG_RATE_PER_S = 2_000
_ROWS_PER_REQUEST = "1-8"
_LATE_S = 0.005
_ROWS = 2_000
_PROGRAM = Path(__file__).with_name("poison") / "model.py"
_STATE = Path(".cascadeserve/isolation").resolve()


def plan_document(min_batch: int) -> dict[str, Any]:
    """The digits plan cut down to one cascade of two models, whose batches are filled up to `min_batch`."""
    plan: dict[str, Any] = msgspec.json.decode((EXAMPLE / "gear_plan.json").read_bytes())
    family = plan["families"][FAMILY]
    models = [model for model, _ in _STAGES]
    stages = [
        {"model": model} if threshold is None else {"model": model, "threshold": threshold}
        for model, threshold in _STAGES
    ]
    trigger = {"min_batch": min_batch, "max_batch": 64, "max_wait_s": 0.02}
    gear = {"layout": "one", "ladder_entry": "both", "triggers": dict.fromkeys(models, trigger)}
    family |= {
        "models": {model: family["models"][model] for model in models},
        "reference_model": models[-1],
        "slo_s": _SLO_S,
        "ladder": [{"name": "both", "stages": stages, "reach": [1.0, 0.3]}],
        "gears": [gear | {"name": "only", "min_rate_per_s": 0.0, "max_rate_per_s": 2.0 * _LAG_RATE_PER_S}],
    }
    plan["name"] = "isolation"
    plan["layouts"] = [{"name": "one", "instances": {"triton0": dict.fromkeys(models, 1)}}]
    return plan


def count_unanswered(records: Mapping[str, NDArray[Any]], poisoned: NDArray[np.bool_]) -> dict[str, int]:
    """Count requests of one row each by whether the row is poisoned, bool [rows]."""
    answered = answered_requests(records)
    mine = poisoned[records["row_index"]]
    return {
        "requests": len(answered),
        "poisoned": int(mine.sum()),
        "poisoned_answered": int((answered & mine).sum()),
        "others_unanswered": int((~answered & ~mine).sum()),
    }


def buckets(text: str, name: str) -> dict[float, float]:
    """Cumulative counts of a Prometheus histogram without labels, by upper bound."""
    return {
        float(sample.labels["le"]): sample.value
        for metric in text_string_to_metric_families(text)
        for sample in metric.samples
        if sample.name == f"{name}_bucket"
    }


def share_within(before: Mapping[float, float], after: Mapping[float, float], bound: float) -> float:
    """Share of what was observed between two looks at a histogram that was at most `bound`, one of its bounds."""
    every = after[float("inf")] - before[float("inf")]
    if not every:
        raise CascadeServeError("nothing was observed meanwhile")
    return (after[bound] - before[bound]) / every


def _draw_rows() -> tuple[Path, Path, NDArray[np.bool_]]:
    """Rows files, the second with a poisoned row in every thousand, and which they are."""
    plain, poisoned = _STATE / "rows.npz", _STATE / "poisoned.npz"
    with np.load(draw_rows(_STATE, "replay")) as drawn:
        image, label = drawn["input:image"][:_ROWS], drawn["label"][:_ROWS]
    np.savez(plain, **{"input:image": image, "label": label})
    marked = np.arange(_ROWS) % POISON_EVERY == POISON_EVERY // 2
    image[marked, 0, 0, 0] = _MARK
    np.savez(poisoned, **{"input:image": image, "label": label})
    return plain, poisoned, marked


async def _poison(rows: Path, marked: NDArray[np.bool_], seconds: float) -> dict[str, Any]:
    repository, plan = _STATE / "poisonous", _STATE / "poison-plan.json"
    for model, _ in _STAGES:
        write_wrapped(repository, model, _PROGRAM, {"poison_at_least": str(_MARK)})
    write_json(plan, plan_document(min_batch=8))
    stack = LocalStack(_STATE / "poison", repository=repository, plan=plan)
    options = (f"--rate={_RATE_PER_S}", f"--duration={seconds}", f"--slo={_SLO_S}")
    with stack.log.with_name("replay.log").open("wb") as log:
        async with stack.running():
            report, records = await stack.replay(_STATE / "poison-run", stack.url, FAMILY, rows, *options, log=log)
    return count_unanswered(records, marked) | {
        "rate_per_s": _RATE_PER_S,
        "p95_s": report.p95_s,
        "lost": report.ledger.lost,
        "errors": report.errors,
    }


async def _loop_lag(rows: Path, seconds: float) -> dict[str, Any]:
    plan = _STATE / "lag-plan.json"
    write_json(plan, plan_document(min_batch=1))
    stack = LocalStack(_STATE / "lag", repository=REPOSITORY, plan=plan)
    with stack.log.with_name("replay.log").open("wb") as log:
        async with stack.running():

            async def both(seconds: float) -> tuple[ServingReport, ServingReport]:
                common = [
                    f"--url={stack.url}", f"--model={FAMILY}", f"--rows={rows}", f"--slo={_SLO_S}",
                    f"--rate={_LAG_RATE_PER_S / 2}", f"--duration={seconds}",
                    f"--rows-per-request={_ROWS_PER_REQUEST}",
                ]  # fmt: skip
                cores = [TRITON_CORE]
                binary = run_replay(_STATE / "binary.json", *common, cores=cores, log=log, before_others=False)
                report = _STATE / "json.json"
                command = [sys.executable, "-m", "benchmarks.json_load", *common, "--seed=1", f"--report={report}"]
                process = await spawn(command, cores=cores, log=log)
                try:
                    first, status = await asyncio.gather(binary, process.wait())
                finally:
                    await stop(process, kill_after_s=5.0)
                if status != 0:
                    raise CascadeServeError(f"the JSON load ended with status {status}; {log.name} says why")
                return first, read_json(report, ServingReport)

            async def lags() -> dict[float, float]:
                async with aiohttp.ClientSession() as session, session.get(f"{stack.url}/metrics") as got:
                    return buckets(await got.text(), "cascadeserve_event_loop_lag_seconds")

            await both(3.0)
            before = await lags()
            reports = await both(seconds)
            after = await lags()
    unanswered = sum(each.ledger.refused + each.ledger.failed + each.ledger.lost for each in reports)
    within = {bound: share_within(before, after, bound) for bound in after if bound < float("inf")}
    return {
        "offered_per_s": sum(each.offered_rate_per_s for each in reports),
        "rows_per_request": _ROWS_PER_REQUEST,
        "p95_s": [each.p95_s for each in reports],
        "unanswered": unanswered,
        "share_within_s": {f"{bound:g}": share for bound, share in within.items()},
        "within_5_ms": None if unanswered else within[_LATE_S],
    }


async def _measure(seconds: float) -> dict[str, Any]:
    prepare_state_directory(_STATE)
    plain, poisoned, marked = _draw_rows()
    async with cores_kept_awake() as awake:
        return {
            "poison": await _poison(poisoned, marked, seconds),
            "loop_lag": await _loop_lag(plain, seconds),
            "seconds": seconds,
            "host": describe_host(),
            "cores_kept_awake": awake,
        }


@click.command()
@click.option("--seconds", type=click.FloatRange(min=2.0), default=60.0, show_default=True, help="Of each of the two.")
@click.option(
    "--result", type=click.Path(path_type=Path), default="benchmarks/results/local/isolation.json", show_default=True
)
def main(*, seconds: float, result: Path) -> None:
    """Measure, write the result, print it."""
    measured = asyncio.run(_measure(seconds))
    write_json(result, measured)
    Console().print({key: value for key, value in measured.items() if key != "host"})


if __name__ == "__main__":
    main()
