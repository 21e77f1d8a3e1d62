"""The same counts, the planner's own way: `python -m benchmarks.endpoints_by_planner` after benchmarks.endpoints_saved.

Some cells of the grid are planned with `minimise = "cost"` on a cluster of 40 endpoints. Nothing is shared with
`benchmarks.endpoint_trials` but the planner itself: every entry is tuned anew on every number of endpoints that is
tried, and a plan with all its gears is made on the number that is found. So it also shows that a cascade plan needs no
more than the others where no result is handed from one policy to the next.
"""

from __future__ import annotations

import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

# One core, whoever else measures on this machine: no thread pools behind numpy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click

from benchmarks import endpoints_saved
from benchmarks.endpoint_families import load_family, load_trace
from benchmarks.endpoint_trials import ENDPOINTS, endpoint_names
from benchmarks.endpoints_saved import Cell, Result
from benchmarks.populations import ROOT
from cascadeserve.artefacts import Artefact, read_json, write_json
from cascadeserve.cluster import Cluster, CpuDevice, Endpoint
from cascadeserve.gear_plan import TensorSpec
from planner.checkpoint import Checkpoint
from planner.goal import FamilyGoal
from planner.host import describe_host
from planner.infeasible import Infeasible
from planner.inputs import Inputs
from planner.objectives import Planner
from planner.policies import Policy
from planner.profile import Host

if TYPE_CHECKING:
    from benchmarks.endpoint_families import Family, TraceLoad
    from cascadeserve.gear_plan import GearPlan

RESULT = ROOT / "benchmarks" / "results" / "local" / "endpoints_by_planner.json"
_KEPT = ROOT / "benchmarks" / "results" / "local" / "endpoints_by_planner"
_FIRST_PORT = 20_000
# the best single model stands at the edge of what it needs 32 for
_SPARE = 8
# family, trace, SLO multiple, accuracy: where cascades help much, little, and not at all
_CELLS = (
    ("digits", "azure", 8.0, "0.25 points below"),
    ("digits", "world-cup", 8.0, "1 points below"),
    ("cifar10", "azure", 8.0, "1 points below"),
    ("llama2-mmlu", "azure", 8.0, "95% of the span"),
    ("llama2-mmlu", "world-cup", 4.0, "2 points below"),
    ("command-speech", "world-cup", 16.0, "80% of the span"),
)
_COUNTED_AS: dict[Policy, str] = {"cascade": "cascade", "switching": "single"}


class Checked(Artefact, frozen=True, kw_only=True):
    """Endpoints of a policy in a cell by both ways, and the entries of the plan's gears.

    accuracy_over_rows is what the plan says of all rows of the trace; `planned` is None where the planner finds no plan
    on 40 endpoints.
    """

    family: str
    trace: str
    slo_multiple: float
    accuracy: str
    policy: Policy
    counted: int
    planned: int | None
    gears: list[str]
    accuracy_over_rows: float | None


class CheckResult(Artefact, frozen=True, kw_only=True):
    """The whole run; `largest_difference` is between the two counts of a policy in a cell, in endpoints."""

    date: str
    command: str
    machine: Host
    checked: list[Checked]
    largest_difference: int


def planned_endpoints(
    family: Family,
    *,
    policy: Policy,
    slo_s: float,
    floor: float,
    load: TraceLoad,
    peak_per_s: float,
    headroom: float,
    checkpoint: Checkpoint | None,
) -> tuple[int, GearPlan] | None:
    """(Fewest endpoints for a peak, the plan for them); None: 40 are too few."""
    goal = FamilyGoal(
        minimise="cost",
        slo_s=slo_s,
        min_accuracy=floor,
        # nothing is certified here: the accuracy on the search split is all that is asked for
        max_epsilon=1.0,
        dispersion=load.dispersion,
        headroom=headroom,
        max_rate_per_s=peak_per_s,
    )
    models = family.models.models
    inputs = Inputs(
        family=family.models.family,
        goal=goal,
        prior=tuple((rate / load.peak_per_s * peak_per_s, share) for rate, share in load.prior),
        profiles={family.profile.device_kind: family.profile},
        cluster=_cluster(family.profile.device_kind),
        search=family.models,
        tensors=(TensorSpec(name="x", datatype="FP32", shape=(1,)),),
        num_classes=None,
        largest_batch={name: family.profile.models[name].max_batch for name in models},
        digests={},
        policy=policy,
    )
    try:
        plan, settled = Planner(checkpoint=checkpoint).plan(inputs, None)
    except Infeasible:
        return None
    return len(settled.inputs.cluster.endpoints), plan


def _cluster(kind: str) -> Cluster:
    return Cluster(
        schema_version=1,
        endpoints=tuple(
            Endpoint(
                name=name,
                grpc=f"127.0.0.1:{_FIRST_PORT + 3 * index}",
                http=f"127.0.0.1:{_FIRST_PORT + 3 * index + 1}",
                metrics=f"127.0.0.1:{_FIRST_PORT + 3 * index + 2}",
                device=CpuDevice(cores=(0,)),
                device_kind=kind,
            )
            for index, name in enumerate(endpoint_names(ENDPOINTS + _SPARE))
        ),
    )


def _check(cell: Cell, family: Family, load: TraceLoad, policy: Policy) -> Checked:
    found = planned_endpoints(
        family,
        policy=policy,
        slo_s=cell.slo_s,
        floor=cell.floor,
        load=load,
        peak_per_s=cell.peak_per_s or 0.0,
        headroom=endpoints_saved.HEADROOM,
        checkpoint=Checkpoint(_KEPT),
    )
    planned = None if found is None else found[1].families[cell.family]
    return Checked(
        family=cell.family,
        trace=cell.trace,
        slo_multiple=cell.slo_multiple,
        accuracy=cell.accuracy,
        policy=policy,
        counted=cell.counts[_COUNTED_AS[policy]].endpoints,
        planned=None if found is None else found[0],
        gears=[] if planned is None else [gear.ladder_entry for gear in planned.gears if not gear.degraded],
        accuracy_over_rows=None if planned is None or planned.expected is None else planned.expected.accuracy,
    )


@click.command()
@click.option("--grid", type=click.Path(path_type=Path, exists=True), default=endpoints_saved.RESULT)
@click.option("--family", "families", multiple=True, help="Default: all of them.")
@click.option("--result", type=click.Path(path_type=Path), default=RESULT)
def main(grid: Path, families: tuple[str, ...], result: Path) -> None:
    """Plan some cells of a grid and write down both counts."""
    known = {(c.family, c.trace, c.slo_multiple, c.accuracy): c for c in read_json(grid, Result).cells if c.feasible}
    checked = []
    for place in _CELLS:
        cell = known.get(place)
        if cell is None or (families and cell.family not in families):
            continue
        family, load = load_family(cell.family), load_trace(cell.trace)
        for policy in _COUNTED_AS:
            checked.append(_check(cell, family, load, policy))
            click.echo(checked[-1], err=True)
    document = CheckResult(
        date=datetime.now(UTC).date().isoformat(),
        command=shlex.join(["python", "-m", "benchmarks.endpoints_by_planner", *sys.argv[1:]]),
        machine=describe_host(),
        checked=checked,
        largest_difference=max(
            (abs((each.planned or ENDPOINTS + _SPARE + 1) - each.counted) for each in checked), default=0
        ),
    )
    write_json(result, document)


if __name__ == "__main__":
    main()
