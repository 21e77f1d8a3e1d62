"""What the orchestrator adds to a request at low load: `python -m benchmarks.gateway`.

The same single-row requests for the same model go to Triton directly and through the orchestrator (a plan with that
one model and no batching delay), in interleaved pairs. Quoted is the median over pairs of the difference of medians;
Triton is pinned to core 0, orchestrator and load generator share the others. Virtual cores are kept awake
(`cascadeserve.virtual_machine`): nearly all of a request at low load is processes that wake each other, and what a
host takes to give a core back is not the orchestrator's.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from rich.console import Console

from cascadeserve.artefacts import write_json
from cascadeserve.local_stack import LocalStack
from cascadeserve.virtual_machine import cores_kept_awake
from examples.digits.data import rows
from planner.host import describe_host

_MODEL = "digits_cnn"
_STATE = Path(".cascadeserve/gateway").resolve()
_RATE_PER_S = 40


def _plan() -> dict[str, Any]:
    """The digits plan cut down to one model and one gear."""
    plan = msgspec.json.decode(Path("examples/digits/gear_plan.json").read_bytes())
    family = plan["families"]["digits"]
    family["models"] = {_MODEL: family["models"][_MODEL]}
    family |= {
        "reference_model": _MODEL,
        "ladder": [{"name": "alone", "stages": [{"model": _MODEL}], "reach": [1.0]}],
        "gears": [
            {"name": "only", "layout": "one", "min_rate_per_s": 0, "max_rate_per_s": 1000, "ladder_entry": "alone"}
        ],
    }
    plan["layouts"] = [{"name": "one", "instances": {"triton0": {_MODEL: 1}}}]
    return plan


async def _measure(pairs: int, seconds: float) -> dict[str, Any]:
    plan, data = _STATE / "plan.json", _STATE / "rows.npz"
    write_json(plan, _plan())
    drawn = rows("replay", 1_000)
    np.savez(data, **{"input:image": drawn.inputs, "label": drawn.labels})
    stack = LocalStack(_STATE, plan=plan, repository=Path("model_repository"))
    medians: dict[str, list[float]] = {"direct": [], "orchestrator": []}
    lost = 0
    with stack.log.with_name("replay.log").open("wb") as log:
        async with cores_kept_awake() as awake, stack.running():
            for pair in range(pairs):
                for name, url, model in (
                    ("direct", stack.triton_url, _MODEL),
                    ("orchestrator", stack.url, "digits"),
                ):
                    options = [f"--rate={_RATE_PER_S}", f"--duration={seconds}", f"--seed={pair}"]
                    report, _ = await stack.replay(_STATE / name, url, model, data, *options, log=log)
                    lost += report.ledger.lost
                    medians[name].append(report.p50_s or float("nan"))
    added = np.subtract(medians["orchestrator"], medians["direct"])
    return {
        "pairs": pairs,
        "rate_per_s": _RATE_PER_S,
        "direct_p50_s": float(np.median(medians["direct"])),
        "orchestrator_p50_s": float(np.median(medians["orchestrator"])),
        "added_p50_s": float(np.median(added)),
        "added_p50_range_s": [float(added.min()), float(added.max())],
        "lost": lost,
        "cores_kept_awake": awake,
        "host": describe_host(),
    }


@click.command()
@click.option("--pairs", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=1.0), default=5.0, show_default=True, help="Of each run.")
@click.option(
    "--result", type=click.Path(path_type=Path), default="benchmarks/results/local/gateway.json", show_default=True
)
def main(pairs: int, seconds: float, result: Path) -> None:
    """Measure, write the result, print it."""
    measured = asyncio.run(_measure(pairs, seconds))
    write_json(result, measured)
    Console().print(measured)


if __name__ == "__main__":
    main()
