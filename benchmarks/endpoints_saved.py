"""How many endpoints does a cascade save? `python -m benchmarks.endpoints_saved` plans a grid of goals and counts.

A **cell** is a family, a trace, an SLO for 95 % of the requests (a multiple of what the largest model takes for one
row), and an accuracy that whatever is in force keeps on the search split. The peak of the trace is scaled so that the
best single model that is accurate enough needs just 32 endpoints, alike and of one slot each. Then every policy is
asked for the fewest endpoints with which it still has a plan for that peak: one whose entry sustains, by the simulator,
the peak over a headroom of 0.9 under arrivals as bursty as the trace's.

A plan reaches as far as its fastest gear, so in endpoints `static-cascade` is the same as `cascade` and `switching` as
`single`: these two and the ensembles are what there is to count. The candidates are those of the planner: its ladder
for the accuracy, which holds the single models, so that a cascade plan never needs more than theirs. What cascades of
two models and more need by themselves stands beside it.

What was simulated is kept in benchmarks/results/local, and a run that was interrupted goes on from there.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from datetime import UTC, datetime
from statistics import median
from typing import TYPE_CHECKING, Literal, TypeVar

# One core, whoever else measures on this machine: no thread pools behind numpy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.endpoint_families import LOADS, NAMES, load_family, load_trace
from benchmarks.endpoint_trials import ENDPOINTS, Needed, Trials, row_work_s
from benchmarks.populations import ROOT, AbsentError
from cascadeserve.artefacts import Artefact, write_atomically
from cascadeserve.gear_plan import LadderEntry, Stage
from planner.checkpoint import Checkpoint
from planner.host import describe_host
from planner.ladder import entry_names
from planner.planning import LADDER_SIZE
from planner.policies import Policy, policy_ladder
from planner.profile import Host, batch_busy_s
from planner.search import evaluate, reference_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.endpoint_families import Family, TraceLoad

T = TypeVar("T")
RESULT = ROOT / "benchmarks" / "results" / "local" / "endpoints_saved.json"
_KEPT = ROOT / "benchmarks" / "results" / "local" / "endpoints_saved"

SLO_MULTIPLES = (2.0, 4.0, 8.0, 16.0, 32.0)
# shares of the way from the worst to the best single model, and points below the latter
SPAN_FRACS = (0.20, 0.40, 0.60, 0.80, 0.95)
POINTS_BELOW = (2.0, 1.0, 0.5, 0.25)
HEADROOM = 0.9
BAR_FAMILY = "digits"
# an ensemble is none of the planner's
Counted = Policy | Literal["ensemble"]
COUNTED: tuple[Counted, ...] = ("cascade", "single", "ensemble", "reference")


class Count(Artefact, frozen=True, kw_only=True):
    """Fewest endpoints, the ladder entry that needs them, and the share of the rows that its last model is asked about.

    With `at_least` the number is by arithmetic, too many to simulate.
    """

    endpoints: int
    entry: str
    to_last: float
    at_least: bool = False


class Cell(Artefact, frozen=True, kw_only=True):
    """One goal. `counts` has the policies that can keep it; without any single model the cell is not feasible.

    `saving` is what the best of single models and ensembles needs over what a cascade plan does; `only_reference`: no
    other single model is accurate enough; `several` is what cascades of two models and more need; a cascade of more
    than one model may need more than a single model does.
    """

    family: str
    trace: str
    slo_multiple: float
    slo_s: float
    # as "60 % of the span" or "0.5 points below"
    accuracy: str
    floor: float
    only_reference: bool
    feasible: bool
    peak_per_s: float | None = None
    counts: dict[str, Count] = msgspec.field(default_factory=dict)
    several: Count | None = None
    saving: float | None = None


class TraceFigures(Artefact, frozen=True, kw_only=True):
    """Index of dispersion, and rates as they are in the trace."""

    dispersion: float
    peak_per_s: float
    mean_per_s: float


class FamilyFacts(Artefact, frozen=True, kw_only=True):
    """What the models, and ensembles, of a family answer rightly, and rows per second of full batches of 64 at most."""

    rows: int
    reference: str
    accuracies: dict[str, float]
    most_rows_per_s: dict[str, float]


class Result(Artefact, frozen=True, kw_only=True):
    """The whole run, and what the bars are decided by; these are None where a family or a trace is absent.

    `never_more_violations` are the feasible cells in which a cascade plan needs more than some baseline, and
    `median_saving` is over the digits cells that no single model but the reference is accurate enough for.
    """

    date: str
    command: str
    machine: Host
    endpoints: int
    headroom: float
    same_as: dict[str, str]
    traces: dict[str, TraceFigures]
    families: dict[str, FamilyFacts]
    cells: list[Cell]
    feasible: int
    infeasible: int
    never_more_violations: int | None
    median_saving: float | None
    # of this run; with `resumed` some of it had been simulated before
    wall_s: float
    resumed: bool


def floors(accuracies: Sequence[float]) -> dict[str, float]:
    """Accuracies to ask for, given those of the single models."""
    worst, best = min(accuracies), max(accuracies)
    of_span = {f"{frac:.0%} of the span": worst + frac * (best - worst) for frac in SPAN_FRACS}
    return of_span | {f"{points:g} points below": best - points / 100 for points in POINTS_BELOW}


class Candidates:
    """Entries of every policy for every accuracy that is asked for, under one SLO."""

    def __init__(self, family: Family, slo_s: float) -> None:
        """Search once, choose a ladder for every accuracy."""
        self._work_s = row_work_s(family, slo_s)
        self.reference = reference_model(family.models)
        self._family = family
        self.accuracy = {name: self._accuracy([Stage(model=name)]) for name in family.models.models}
        self.floors = floors(list(self.accuracy.values()))
        self._chosen = {
            (policy, label): self._ladder(policy, floor) for label, floor in self.floors.items() for policy in COUNTED
        }
        # one name per cascade, whichever ladder it stands on
        stages = list(dict.fromkeys(entry.stages for entries in self._chosen.values() for entry in entries))
        self._name_of = dict(zip(stages, entry_names(stages), strict=True))

    def of(self, policy: Counted, label: str) -> list[LadderEntry]:
        """Entries that a policy may use at an accuracy."""
        return [msgspec.structs.replace(e, name=self._name_of[e.stages]) for e in self._chosen[policy, label]]

    def all(self) -> list[LadderEntry]:
        """Every entry, once."""
        found = {e.name: e for policy, label in self._chosen for e in self.of(policy, label)}
        return list(found.values())

    def _accuracy(self, stages: Sequence[Stage]) -> float:
        return evaluate(self._family.models, stages, self._work_s).accuracy

    def _ladder(self, policy: Counted, floor: float) -> list[LadderEntry]:
        if policy == "ensemble":
            return [e for e in _ensembles(self._family) if (e.accuracy or 0.0) >= floor]
        # as planner.planning takes them
        entries = policy_ladder(
            policy, self._family.models, self._work_s, reference=self.reference, size=LADDER_SIZE, floor=floor
        )
        known = [msgspec.structs.replace(entry, accuracy=self._accuracy(entry.stages)) for entry in entries]
        return [entry for entry in known if (entry.accuracy or 0.0) >= floor]


def _ensembles(family: Family) -> list[LadderEntry]:
    answers, truth = family.with_ensembles.models, family.models.truth
    return [
        LadderEntry(
            name=name, stages=(Stage(model=name),), reach=(1.0,), accuracy=float((answers[name].label == truth).mean())
        )
        for name in family.ensembles
    ]


def measure(
    family: Family,
    trace: TraceLoad,
    candidates: Candidates,
    *,
    multiple: float,
    labels: Sequence[str],
    checkpoint: Checkpoint | None,
) -> list[Cell]:
    """Cells of one family, trace and SLO."""
    slo_s = slo(family, multiple)
    trials = Trials(family, candidates.all(), slo_s=slo_s, dispersion=trace.dispersion, checkpoint=checkpoint)
    sustained: dict[str, float] = {}
    return [_cell(family, trace, candidates, trials, multiple, label, sustained) for label in labels]


def _cell(
    family: Family,
    trace: TraceLoad,
    candidates: Candidates,
    trials: Trials,
    multiple: float,
    label: str,
    sustained: dict[str, float],
) -> Cell:
    singles = candidates.of("single", label)
    cell = Cell(
        family=family.models.family,
        trace=trace.name,
        slo_multiple=multiple,
        slo_s=slo(family, multiple),
        accuracy=label,
        floor=candidates.floors[label],
        only_reference={entry.stages[0].model for entry in singles} == {candidates.reference},
        feasible=False,
    )
    rate_per_s = 0.0
    for entry in sorted(singles, key=trials.most_per_s, reverse=True):
        if entry.name not in sustained and trials.most_per_s(entry) * ENDPOINTS > rate_per_s:
            sustained[entry.name] = trials.sustained_per_s(entry, ENDPOINTS)
        rate_per_s = max(rate_per_s, sustained.get(entry.name, 0.0))
    if rate_per_s == 0.0:
        return cell
    several = [entry for entry in candidates.of("cascade", label) if len(entry.stages) > 1]
    found = {policy: trials.fewest(candidates.of(policy, label), rate_per_s) for policy in COUNTED}
    counts = {policy: _count(needed) for policy, needed in found.items() if needed is not None}
    beaten = min(counts[policy].endpoints for policy in ("single", "ensemble") if policy in counts)
    needed = trials.fewest(several, rate_per_s)
    return msgspec.structs.replace(
        cell,
        feasible=True,
        peak_per_s=HEADROOM * rate_per_s,
        counts=counts,
        several=None if needed is None else _count(needed),
        saving=beaten / counts["cascade"].endpoints if "cascade" in counts else None,
    )


def _count(needed: Needed) -> Count:
    return Count(
        endpoints=needed.endpoints,
        entry=needed.entry.name,
        to_last=needed.entry.reach[-1],
        at_least=needed.at_least,
    )


def slo(family: Family, multiple: float) -> float:
    """SLO in seconds."""
    return multiple * batch_busy_s(family.profile.models[family.largest], 1, 1)


def never_more_violations(cells: Sequence[Cell]) -> int:
    """Feasible cells in which a cascade plan needs more endpoints than some baseline."""
    return sum(
        "cascade" not in cell.counts
        or any(count.endpoints < cell.counts["cascade"].endpoints for count in cell.counts.values())
        for cell in cells
        if cell.feasible
    )


def median_saving(cells: Sequence[Cell], family: str = BAR_FAMILY) -> float | None:
    """Over the feasible cells of a family whose accuracy no single model but the reference has."""
    savings = [cell.saving for cell in cells if cell.family == family and cell.only_reference and cell.saving]
    return median(savings) if savings else None


def _facts(family: Family) -> FamilyFacts:
    answers = family.with_ensembles.models
    full = {name: model.entries(family.profile.slots + 1)[-1] for name, model in family.profile.models.items()}
    return FamilyFacts(
        rows=len(family.models),
        reference=reference_model(family.models),
        accuracies={name: float((each.label == family.models.truth).mean()) for name, each in answers.items()},
        most_rows_per_s={name: entry.batch / entry.busy_s for name, entry in full.items() if name in answers},
    )


def _present(what: Sequence[str], load: Callable[[str], T]) -> dict[str, T]:
    found: dict[str, T] = {}
    for name in what:
        try:
            found[name] = load(name)
        except AbsentError as error:
            click.echo(f"{name}: not run, {error}", err=True)
    return found


@click.command()
@click.option("--family", "families", multiple=True, type=click.Choice(NAMES), help="Default: all of them.")
@click.option("--trace", "traces", multiple=True, type=click.Choice(LOADS), help="Default: all of them.")
@click.option("--quick", is_flag=True, help="One SLO and two accuracies of each family.")
@click.option("--result", type=click.Path(path_type=Path), default=RESULT)
def main(families: tuple[str, ...], traces: tuple[str, ...], quick: bool, result: Path) -> None:  # noqa: FBT001
    """Count the endpoints of every policy in every cell, and write it down."""
    started_s, resumed = time.monotonic(), _KEPT.exists()
    loads = _present(traces or LOADS, load_trace)
    here = _present(families or NAMES, load_family) if loads else {}
    complete = len(loads) == len(traces or LOADS) and len(here) == len(families or NAMES)
    multiples = (8.0,) if quick else SLO_MULTIPLES
    cells: list[Cell] = []
    for name, family in here.items():
        for multiple in multiples:
            candidates = Candidates(family, slo(family, multiple))
            labels = list(candidates.floors)
            labels = labels[-5:-3] if quick else labels
            for load in loads.values():
                cells += measure(
                    family, load, candidates, multiple=multiple, labels=labels, checkpoint=Checkpoint(_KEPT)
                )
                click.echo(
                    f"{name}, {load.name}, SLO {multiple:g} x: "
                    + ", ".join("-" if cell.saving is None else f"{cell.saving:.2f}" for cell in cells[-len(labels) :])
                    + f" ({time.monotonic() - started_s:.0f} s)",
                    err=True,
                )
    document = Result(
        date=datetime.now(UTC).date().isoformat(),
        command=shlex.join(["python", "-m", "benchmarks.endpoints_saved", *sys.argv[1:]]),
        machine=describe_host(),
        endpoints=ENDPOINTS,
        headroom=HEADROOM,
        same_as={"static-cascade": "cascade", "switching": "single"},
        traces={
            name: TraceFigures(dispersion=load.dispersion, peak_per_s=load.peak_per_s, mean_per_s=load.mean_per_s)
            for name, load in loads.items()
        },
        families={name: _facts(family) for name, family in here.items()},
        cells=cells,
        feasible=sum(cell.feasible for cell in cells),
        infeasible=sum(not cell.feasible for cell in cells),
        never_more_violations=never_more_violations(cells) if complete else None,
        median_saving=median_saving(cells) if complete else None,
        wall_s=time.monotonic() - started_s,
        resumed=resumed,
    )
    _show(document)
    result.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(result, _with_cells_in_lines(document))


def _with_cells_in_lines(document: Result) -> bytes:
    """JSON that a person can compare: one cell per line."""
    rest = msgspec.json.encode(msgspec.structs.replace(document, cells=[]))
    cells = b",\n    ".join(msgspec.json.encode(cell) for cell in document.cells)
    return msgspec.json.format(rest, indent=2).replace(b'"cells": []', b'"cells": [\n    ' + cells + b"\n  ]") + b"\n"


def _show(document: Result) -> None:
    table = Table("family", "feasible", "infeasible", "median saving", "where only the reference will do")
    for name in document.families:
        own = [cell for cell in document.cells if cell.family == name]
        savings = [cell.saving for cell in own if cell.saving]
        only = median_saving(own, name)
        table.add_row(
            name,
            str(len(savings)),
            str(len(own) - len(savings)),
            f"{median(savings):.2f}" if savings else "-",
            "-" if only is None else f"{only:.2f}",
        )
    Console().print(table)
    print(f"cells in which a cascade plan needs more than a baseline: {document.never_more_violations}")


if __name__ == "__main__":
    main()
